"""The one thread that touches the engine: others hand it jobs, calls and cancellations, and it works as long as there is work."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from d2moe.errors import BusyError, RequestError, StoppingError
from d2moe.runtime.scheduler import Ended, Job, Observer, Scheduler

if TYPE_CHECKING:
    from d2moe.runtime.engine import Engine

T = TypeVar("T")
log = logging.getLogger("d2moe.worker")


class Worker:
    """Runs a Scheduler. Methods may be called from any thread. `queue`: jobs that may wait beside the running ones."""

    def __init__(self, engine: Engine, queue: int = 64, observer: Observer | None = None):
        self.engine, self.queue, self._observer = engine, queue, observer
        self._scheduler = Scheduler(engine, self)
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._live = 0  # jobs that were accepted and have not ended
        self._job_s = 1.0  # how long a job takes, for those who ask when to come back
        self._closing = self._stop = False
        self._thread = threading.Thread(target=self._run, name="d2moe-engine", daemon=True)
        self._thread.start()

    @property
    def live(self) -> int:
        """Jobs running or waiting."""
        return self._live

    @property
    def running(self) -> int:
        return len(self._scheduler.running)

    @property
    def most_running(self) -> int:
        return self._scheduler.most_running

    @property
    def accepting(self) -> bool:
        """Whether new jobs are taken: the thread is alive and not about to stop."""
        return self._thread.is_alive() and not self._closing

    def submit(self, jobs: list[Job]) -> None:
        """Queue all of `jobs` or none; BusyError when they do not fit the queue, RequestError if they never would, StoppingError
        at the end."""
        with self._wake:
            if not self.accepting:
                raise StoppingError("the server is stopping and takes no new requests")
            most = self.most_running + self.queue
            if len(jobs) > most:
                raise RequestError(f"{len(jobs)} answers in one request, at most {most} may run and wait here")
            if len(jobs) > most - self._live:
                waiting = max(1, self._live - self.most_running)
                after = math.ceil(self._job_s * waiting / self.most_running)
                raise BusyError(
                    f"{self._live} requests are running or waiting, of {most} that may; try again later",
                    min(max(after, 1), 60),
                )
            self._live += len(jobs)
            now = time.perf_counter()
            for job in jobs:
                job.submitted = now
                self._inbox.append(partial(self._scheduler.add, job))
            self._wake.notify()

    def cancel(self, jobs: list[Job]) -> None:
        """End `jobs` before the next step; those that have ended stay as they are."""
        with self._wake:
            for job in jobs:
                job.cancelled = True
            self._wake.notify()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` in the engine's thread between two steps."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        with self._wake:
            if not self._thread.is_alive() or self._stop:
                raise StoppingError("the server is stopping")
            self._inbox.append(run)
            self._wake.notify()
        return future

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more jobs, let those under way end for `drain_s` seconds, cancel the rest, and stop."""
        with self._wake:
            self._closing = True
            self._wake.wait_for(lambda: not self._live, timeout=drain_s)
            self._stop = True
            self._wake.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._inbox or self._scheduler.running or self._scheduler.waiting or self._stop)
                inbox = list(self._inbox)
                self._inbox.clear()
                stop = self._stop
            for call in inbox:
                call()
            if stop:
                self._scheduler.abandon(StoppingError("the server was stopped before the answer ended"))
                return
            try:
                self._scheduler.step()
            except Exception as error:  # a bug must not leave clients waiting for ever
                log.exception("a step failed")
                self._scheduler.abandon(error)

    # What the scheduler reports passes through here.

    def stepped(self, jobs: int, tokens: int, seconds: float) -> None:
        if self._observer:
            self._observer.stepped(jobs, tokens, seconds)

    def token(self, job: Job, gap_s: float) -> None:
        if self._observer:
            self._observer.token(job, gap_s)

    def ended(self, job: Job, outcome: Ended) -> None:
        if outcome.error and not isinstance(outcome.error, (RequestError, StoppingError)):
            log.error("an answer failed: %s", outcome.error)
        with self._wake:
            self._live -= 1
            if job.admitted:
                self._job_s += 0.1 * (job.last - job.admitted - self._job_s)
            self._wake.notify_all()
        if self._observer:
            self._observer.ended(job, outcome)
