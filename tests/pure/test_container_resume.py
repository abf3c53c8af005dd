"""The writer under kill -9 at every system call, on full disks, and under changed facts."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import containers
import numpy as np
import pytest
from containers import EXPERTS, FACTS, FILES, LAYERS, SHAPES, contents, dense_tensor, fill, make, nested

from d2moe.container import Container, ContainerWriter, RecordLayout
from d2moe.container.verify import verify
from d2moe.errors import ContainerError, D2MoeError, StorageError

# Runs in its own process, so that forking is safe: one child per system call at which it dies.
CRASHES = textwrap.dedent("""
    import os, signal, shutil, sys, traceback
    from pathlib import Path
    from containers import FACTS, contents, fill, make
    from d2moe.container import Container, ContainerWriter

    CALLS = ("pwrite", "write", "fsync", "posix_fallocate", "ftruncate", "rename", "mkdir", "unlink")
    folder = Path(sys.argv[1])
    reference = contents(make(folder / "reference.d2moe"))
    dst, partial = folder / "x.d2moe", folder / "x.d2moe.partial"

    class Counting(ContainerWriter):
        def __init__(self, *a, pipe, **k):
            self.pipe = pipe
            super().__init__(*a, **k)
        def add_dense(self, *a, **k):
            super().add_dense(*a, **k); real_write(self.pipe, b"d")
        def add_record(self, *a, **k):
            super().add_record(*a, **k); real_write(self.pipe, b"e")

    real_write = os.write

    def attempt(dies_at, torn):
        '''One child that dies at its call number `dies_at`; returns what it had finished, and whether it lived.'''
        out, into = os.pipe()
        pid = os.fork()
        if pid == 0:
            count = 0
            def patched(name, real):
                def call(*a, **k):
                    nonlocal count
                    if "unlink" == name and not str(a[0]).endswith("journal"):
                        return real(*a, **k)
                    count += 1
                    if count == dies_at:
                        if torn and name in ("pwrite", "write"):  # half of it arrives
                            data = memoryview(a[1])
                            real(a[0], data[: len(data) // 2], *a[2:])
                        elif torn:  # dies right after instead of right before
                            try:
                                real(*a, **k)
                            except OSError:
                                pass
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*a, **k)
                return call
            for name in CALLS:
                setattr(os, name, patched(name, getattr(os, name)))
            status = 1
            try:
                with Counting(dst, pipe=into, **FACTS) as writer:
                    fill(writer)
                    writer.finish()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(into)
        log = b""
        while piece := os.read(out, 4096):
            log += piece
        os.close(out)
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, (dies_at, status)
        return len(log), not os.WIFSIGNALED(status)

    for torn in (False, True):
        at = 0
        while True:
            at += 1
            shutil.rmtree(dst, ignore_errors=True); shutil.rmtree(partial, ignore_errors=True)
            before, lived = attempt(at, torn)
            if not lived:
                if dst.exists():
                    assert contents(dst) == reference, ("looks whole, is not", at)
                    continue
                if at % 3 == 0:  # and a second death while resuming
                    more, _ = attempt(2 + at % 5, torn)
                    before += more
                if not dst.exists():
                    redone, finished = attempt(0, torn)
                    # Every piece that was finished before the kill is not done again.
                    assert finished and before + redone <= 18, (at, before, redone)
            assert contents(dst) == reference and not partial.exists(), at
            if lived:  # it made fewer calls than that
                break
        print(at - 1, "calls survived, torn" if torn else "calls survived", flush=True)
""")


def environment() -> dict[str, str]:
    here = Path(containers.__file__)
    paths = [str(here.parents[2] / "src"), str(here.parent)]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def test_killed_at_every_system_call(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CRASHES, str(tmp_path)], env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    counts = [int(line.split()[0]) for line in done.stdout.splitlines()]
    assert len(counts) == 2 and min(counts) >= 50  # the injection did reach the calls


SLOW = textwrap.dedent("""
    import sys, time
    from containers import FACTS, fill
    from d2moe.container import ContainerWriter
    add = ContainerWriter.add_record
    ContainerWriter.add_record = lambda *a: (time.sleep(0.02), add(*a))
    with ContainerWriter(sys.argv[1], **FACTS) as writer:
        print("begun", flush=True)
        fill(writer)
        writer.finish()
""")


def test_killed_at_random_moments(tmp_path: Path) -> None:
    reference = contents(make(tmp_path / "reference.d2moe"))
    rng = np.random.default_rng(1)
    for i in range(3):
        dst = tmp_path / f"{i}.d2moe"
        command = [sys.executable, "-c", SLOW, str(dst)]
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE)
        assert process.stdout and process.stdout.readline() == b"begun\n"
        time.sleep(float(rng.uniform(0, 0.12)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if not dst.exists():
            with ContainerWriter(dst, **FACTS) as writer:
                fill(writer)
                writer.finish()
        assert contents(dst) == reference


def begin(dst: Path, experts: int = 2) -> Path:
    """An unfinished container with `embed.base` and the first experts of layer 0."""
    with ContainerWriter(dst, **FACTS) as writer:
        writer.add_dense("embed.base", dense_tensor("embed.base"))
        for expert in range(experts):
            writer.add_expert(0, expert, nested(0, expert))
    return dst.with_name(dst.name + ".partial")


def test_what_is_damaged_since_is_done_again(tmp_path: Path) -> None:
    partial = begin(tmp_path / "x.d2moe")
    path = partial / "experts" / "layer-000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1 - FACTS["record"].record_bytes] ^= 1  # last byte of expert 1 of 3
    path.write_bytes(data)
    with ContainerWriter(tmp_path / "x.d2moe", **FACTS) as writer:
        assert writer.done_experts(0) == {0}
        assert writer.is_dense_done("embed.base") and not writer.is_dense_done("final_norm")
        fill(writer)
        writer.finish()
    assert verify(tmp_path / "x.d2moe").problems == ()


def test_a_lost_file_is_done_again_even_if_it_was_complete(tmp_path: Path) -> None:
    partial = begin(tmp_path / "x.d2moe", EXPERTS)
    (partial / "experts" / "layer-000.safetensors").unlink()
    with ContainerWriter(tmp_path / "x.d2moe", **FACTS) as writer:
        assert writer.done_experts(0) == frozenset()
        writer.add_expert(0, 1, nested(0, 1))
    with ContainerWriter(tmp_path / "x.d2moe", **FACTS) as writer:  # the old promises are not believed now either
        assert writer.done_experts(0) == {1}
        fill(writer)
        writer.finish()
    assert verify(tmp_path / "x.d2moe").problems == ()


def test_finished_files_are_not_written_again(tmp_path: Path) -> None:
    begin(tmp_path / "x.d2moe", EXPERTS)
    with ContainerWriter(tmp_path / "x.d2moe", **FACTS) as writer:
        with pytest.raises(ContainerError, match="finished already"):
            writer.add_expert(0, 1, nested(0, 0))
        writer.close()
        with pytest.raises(ContainerError, match="the writer was closed"):
            writer.add_expert(2, 1, nested(2, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": {"name": "random/tiny", "sha256": "cd"}}, r'source.sha256 was "ab", now it is "cd"'),
        ({"quantizer": {"name": "joint-clip"}}, r"quantizer.group was 32, now it is null"),
        ({"record": RecordLayout(64, 48, 64), "dense": {"final_norm": ("F32", (64,))}}, "group was 32, now it is 64"),
        ({"layers": (0, 1)}, r"layers was \[0, 2\], now it is \[0, 1\]"),
        ({"files": FILES | {"config.json": b"{}"}}, "files.config.json was"),
        ({"dense": dict(reversed(SHAPES.items()))}, "dense was"),
    ],
)
def test_other_facts_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    partial = begin(tmp_path / "x.d2moe")
    before = contents(partial)
    with pytest.raises(ContainerError, match=message):
        ContainerWriter(tmp_path / "x.d2moe", **(FACTS | change))
    assert contents(partial) == before


def test_two_writers_at_once(tmp_path: Path) -> None:
    with (
        ContainerWriter(tmp_path / "x.d2moe", **FACTS),
        pytest.raises(StorageError, match="another conversion is writing it"),
    ):
        ContainerWriter(tmp_path / "x.d2moe", **FACTS)
    ContainerWriter(tmp_path / "x.d2moe", **FACTS).close()


def test_a_damaged_journal(tmp_path: Path) -> None:
    partial = begin(tmp_path / "x.d2moe")
    lines = (partial / "journal").read_bytes().splitlines(keepends=True)
    (partial / "journal").write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # a line cut by a kill
    with ContainerWriter(tmp_path / "x.d2moe", **FACTS) as writer:
        assert writer.done_experts(0) == {0}
    (partial / "journal").write_bytes(b"\0" * 500)
    with pytest.raises(ContainerError, match=r"journal: is damaged.*delete .*x.d2moe.partial and convert again"):
        ContainerWriter(tmp_path / "x.d2moe", **FACTS)


def test_complete_but_for_the_rename(tmp_path: Path) -> None:
    make(tmp_path / "x.d2moe").rename(tmp_path / "x.d2moe.partial")
    with pytest.raises(ContainerError, match="made from other facts"):
        ContainerWriter(tmp_path / "x.d2moe", **(FACTS | {"source": {}}))
    with ContainerWriter(tmp_path / "x.d2moe", **FACTS) as writer:
        assert writer.done_experts(2) == set(range(EXPERTS)) and writer.is_dense_done("final_norm")
        writer.finish()
    assert verify(tmp_path / "x.d2moe").problems == ()


# Full disks


@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failing_write_can_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    real, calls = getattr(os, call), 0

    def failing(*a: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= 2:
            raise OSError(number, os.strerror(number))
        return real(*a)

    monkeypatch.setattr(os, call, failing)
    message = "resumes" if number == errno.EIO else r"[\d,]{4,} more bytes are needed.*resumes"
    with (
        pytest.raises(StorageError, match=message) as e,
        ContainerWriter(tmp_path / "x.d2moe", **FACTS) as writer,
    ):
        fill(writer)
    assert os.strerror(number) in str(e.value) and "x.d2moe.partial" in str(e.value)
    monkeypatch.undo()
    assert not (tmp_path / "x.d2moe").exists()
    with ContainerWriter(tmp_path / "x.d2moe", **FACTS) as writer:
        fill(writer)
        writer.finish()
    assert verify(tmp_path / "x.d2moe").problems == ()


def test_a_file_size_limit(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))  # Python ignores the signal, the call fails
    try:
        with (
            pytest.raises(StorageError, match=r"layer-000.safetensors: writing failed: File too large; [\d,]+ more"),
            ContainerWriter(tmp_path / "x.d2moe", **FACTS) as writer,
        ):
            fill(writer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=512k", "none", disk], capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_made(small_disk: Path) -> None:
    (small_disk / "other").write_bytes(bytes(400_000))
    with pytest.raises(StorageError, match=r"needs [\d,]+ more bytes, .*disk has [\d,]+ free; make room for"):
        ContainerWriter(small_disk / "x.d2moe", **FACTS)
    assert [p.name for p in small_disk.iterdir()] == ["other"]


def test_a_disk_that_fills_up_meanwhile(small_disk: Path) -> None:
    with (
        pytest.raises(StorageError, match=r"No space left on device; [\d,]+ more bytes are needed.*resumes"),
        ContainerWriter(small_disk / "x.d2moe", **FACTS) as writer,
    ):
        for expert in range(EXPERTS):
            writer.add_expert(0, expert, nested(0, expert))
        with (small_disk / "other").open("wb", buffering=0) as f:
            for _ in range(1000):
                try:
                    f.write(bytes(4096))
                except OSError:
                    break
        fill(writer)
    with pytest.raises(D2MoeError):
        Container.open(small_disk / "x.d2moe")
    (small_disk / "other").unlink()
    with ContainerWriter(small_disk / "x.d2moe", **FACTS) as writer:
        assert writer.done_experts(LAYERS[0]) == set(range(EXPERTS))
        fill(writer)
        writer.finish()
    assert verify(small_disk / "x.d2moe").problems == ()
