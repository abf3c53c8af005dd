"""How many CPUs this process may use: affinity, and the CPU quota of its cgroup and of every one above it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from d2moe.runtime import memory

FOLDERS = memory.cgroup_folders
PROGRAM = "from d2moe.runtime.memory import usable_cpus; print(usable_cpus())"


def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str]) -> int:
    """`usable_cpus` on 16 CPUs where the process's cgroup file is `own` and the file system holds `files`."""
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(memory, "cgroup_folders", lambda c: FOLDERS(c, tmp_path / "cgroup", tmp_path / "own"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    return memory.usable_cpus()


def test_version_2_counts_the_groups_above(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"cpu.max": "max 100000", "a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000"}
    assert found(tmp_path, monkeypatch, "0::/a/b\n", files) == 3
    assert found(tmp_path, monkeypatch, "0::/a/b\n", files | {"a/b/cpu.max": "250000 100000"}) == 2
    assert found(tmp_path, monkeypatch, "0::/a/b\n", files | {"a/b/cpu.max": "50000 100000"}) == 1
    assert found(tmp_path, monkeypatch, "0::/\n", {"cpu.max": "max 100000"}) == 16


def test_version_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = "5:cpu,cpuacct:/x\n4:memory:/\n"
    files = {"cpu/x/cpu.cfs_quota_us": "400000", "cpu/x/cpu.cfs_period_us": "100000", "cpu/cpu.cfs_quota_us": "-1"}
    assert found(tmp_path, monkeypatch, own, files) == 4
    # Inside a container the path is often that of the host, and only the root is there.
    files = {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}
    assert found(tmp_path, monkeypatch, "5:cpu,cpuacct:/docker/far\n", files) == 2


def test_nothing_known_means_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(tmp_path, monkeypatch, "", {}) == 16
    assert found(tmp_path, monkeypatch, "0::/a\n", {"a/cpu.max": "nonsense"}) == 16


def test_a_real_quota() -> None:
    """One CPU of quota in a cgroup of our own, of whichever version can be written."""
    for root, limits in (
        (Path("/sys/fs/cgroup/cpu"), {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "100000"}),
        (Path("/sys/fs/cgroup"), {"cpu.max": "100000 100000"}),
    ):
        group = root / f"d2moe-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            for name, text in limits.items():
                (group / name).write_text(text)
            enter = f"from pathlib import Path; Path({str(group / 'cgroup.procs')!r}).write_text('0'); "
            out = subprocess.run([sys.executable, "-c", enter + PROGRAM], capture_output=True, text=True, check=False)
            assert out.stdout.strip() == "1", out.stderr
            return
        except OSError:
            continue
        finally:
            with contextlib.suppress(OSError):
                group.rmdir()
    pytest.skip("NOT TESTED: a real CPU quota; no cgroup can be made here")
