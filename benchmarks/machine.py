"""What of the machine a benchmark changes and gives back: control groups of the memory controller, read-ahead, the page cache.

All of it needs root, or a system that lets this user write those files.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import click


class Group:
    """A control group of the memory controller, version 1 or 2, that holds what runs in it to `limit` bytes, swap included."""

    def __init__(self, limit: int):
        version1 = Path("/sys/fs/cgroup/memory")
        self._old = version1.is_dir()
        self.path = (version1 if self._old else Path("/sys/fs/cgroup")) / f"d2moe-benchmark-{os.getpid()}"
        self.path.mkdir()
        try:
            (self.path / ("memory.limit_in_bytes" if self._old else "memory.max")).write_text(str(limit))
        except OSError:
            self.path.rmdir()
            raise
        with contextlib.suppress(OSError):  # a kernel that does not count swap
            file, most = ("memory.memsw.limit_in_bytes", limit) if self._old else ("memory.swap.max", 0)
            (self.path / file).write_text(str(most))

    def join(self) -> None:
        (self.path / "cgroup.procs").write_text("0")

    def over(self) -> dict[str, int]:
        """Most bytes it held (file pages of its libraries and the model included, which go when they must) and processes killed."""
        names = ("memory.max_usage_in_bytes", "memory.oom_control") if self._old else ("memory.peak", "memory.events")
        most, kills = ((self.path / name).read_text() for name in names)
        found = re.search(r"^oom_kill (\d+)", kills, re.M)
        return {"most_bytes": int(most), "killed": int(found[1]) if found else 0}


@contextlib.contextmanager
def group_of(limit: int) -> Iterator[Group | None]:
    """A control group if this user may make one; else None, and the resident memory alone is watched."""
    try:
        group = Group(limit)
    except OSError as error:
        click.echo(f"no control group ({error}): resident memory alone is watched", err=True)
        yield None
        return
    try:
        yield group
    finally:
        group.path.rmdir()


def drop_caches() -> None:
    """Forget all clean pages of files, after what is dirty was written. OSError without root."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def read_ahead_file(folder: Path) -> Path | None:
    """Where the read-ahead (KiB) of the disk under `folder` is set; None if it has no such place, as a network's or overlay's."""
    number = folder.stat().st_dev
    block = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if block.exists():
        disk = block.resolve()
        for place in (disk, disk.parent):  # a partition's queue is its disk's
            file = place / "queue" / "read_ahead_kb"
            if file.is_file() and os.access(file, os.W_OK):
                return file
    return None


@contextlib.contextmanager
def read_ahead(file: Path | None, kib: int | None) -> Iterator[None]:
    """Read-ahead of `kib` KiB for files that are opened meanwhile, then what it was; None of either changes nothing."""
    if file is None or kib is None:
        yield
        return
    before = file.read_text()
    try:
        file.write_text(str(kib))
        yield
    finally:
        file.write_text(before)
