"""What reads, threads and memory may do wrong: one clear error or a stated fallback, the same answer afterwards, nothing hangs or leaks.

A small library is compiled and preloaded into a fresh process, where it makes the compiled core's own system calls fail (faults.c).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import d2moe
from d2moe.errors import MemoryBudgetError
from d2moe.runtime import memory
from d2moe.runtime.config import EngineConfig
from d2moe.runtime.engine import Engine
from d2moe.runtime.request import Chunk

MODEL = d2moe.builtin_model()

BEGIN = """
import ctypes, hashlib, os, signal, sys, threading, time
import numpy as np
import d2moe
from d2moe.errors import StorageError
from d2moe.runtime.config import EngineConfig
from d2moe.runtime.engine import Engine
from d2moe.runtime.memory import resident_bytes
from d2moe.runtime.request import Chunk
shim = ctypes.CDLL(None)
tokens = np.random.default_rng(int(sys.argv[1])).integers(0, 4096, 60).astype(np.int32)

def answer(engine, sequence=None):
    sequence = sequence or engine.new_sequence()
    rows = [engine.step([Chunk(sequence, part, 4, "all")]) for part in np.split(tokens, [40, 41, 50])]
    sequence.free()
    return np.concatenate(rows).tobytes()

def load(**options):
    options = {"context": 256, "expert_memory_bytes": 1_000_000, **options}
    return Engine.load(os.environ.get("MODEL") or d2moe.builtin_model(), EngineConfig(**options))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CC", "cc"))
    assert compiler, "a C compiler is needed"
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    source = Path(__file__).with_name("faults.c")
    subprocess.run([compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", source, "-o", library], check=True)
    return library


@pytest.fixture(scope="module")
def run(shim):
    seed = int(np.random.default_rng().integers(1 << 31))

    def go(code, **environment):
        print("seed", seed)
        done = subprocess.run(
            [sys.executable, "-c", BEGIN + code, str(seed)], capture_output=True, text=True, check=False, timeout=300,
            env=os.environ | {"LD_PRELOAD": str(shim)} | environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return go


def test_an_error_of_the_disk_is_one_error(run):
    """EIO in the middle of a step: this request hears of it, the sequence is as before, the next answer is the right one."""
    run("""
with load() as engine:
    expected = answer(engine)
    sequence = engine.new_sequence()
    for _ in range(5):
        engine.step([Chunk(sequence, tokens[:20], 3, "none")])
        length = sequence.length
        shim.fault(ord("e"))
        try:
            engine.step([Chunk(sequence, tokens, 8, "all")])
        except StorageError as error:
            assert "Input/output error" in str(error) and "expert" in str(error) and "d2moe verify" in str(error), error
        else:
            raise AssertionError("no error")
        assert shim.fault_hits() >= 1 and sequence.length == length
        shim.fault(0)
        sequence.free()
        ledger = engine.ledger
        held = [int(ledger.prefix_bytes[engine.experts.width(l, e)]) for l in range(ledger.layers) for e in range(ledger.experts)]
        assert sum(held) == ledger.used_bytes <= ledger.limit_bytes
        assert answer(engine) == expected
""")


@pytest.mark.parametrize("direct", [True, False])
def test_short_reads_are_gone_on_with(run, direct):
    run(f"""
with load(direct=False) as engine:
    expected = answer(engine)
with load(direct={direct}) as engine:
    shim.fault(ord("s"))
    assert answer(engine) == expected and shim.fault_hits() > engine.counters.reads
    shim.fault(0)
    assert answer(engine) == expected
""")


def test_a_filesystem_that_refuses_direct_reads(run):
    """At open, as tmpfs, or at the first read only: read through the page cache, and said so."""
    code = """
with load() as engine:
    shim.fault(ord("d"))
    before = engine.describe()["direct"]
    found = answer(engine)
    print(before, engine.describe()["direct"], shim.fault_hits() > 0, hashlib.sha256(found).hexdigest())
"""
    late, early, plain = run(code).split(), run(code, FAULT_OPEN="1").split(), run(code.replace('shim.fault(ord("d"))', "")).split()
    assert early[:3] == ["False", "False", "False"] and late[3] == early[3] == plain[3]
    if plain[0] == "True":
        assert late[:3] == ["True", "False", "True"]


@pytest.mark.parametrize("threads", [0, 1, 2, 5])
def test_threads_that_cannot_start(run, threads):
    """Those that can are used; without any the step does all itself. The engine says how many there are."""
    code = """
shim.fault_threads(LEFT)
with load(threads=4, read_depth=4) as engine:
    about = engine.describe()
    print(about["threads"], about["read_depth"], hashlib.sha256(answer(engine)).hexdigest())
"""
    few, all_of_them = (run(code.replace("LEFT", str(left))).split() for left in (threads, -1))
    assert all_of_them[:2] == ["4", "4"] and few[2] == all_of_them[2]
    assert [int(n) for n in few[:2]] == [1 + min(threads, 3), max(0, threads - 3)]


def test_a_file_replaced_or_cut_while_it_is_open(run, tmp_path):
    """Replaced: the old one is read on. Cut anywhere: an error that names it. Whole again: as before."""
    shutil.copytree(MODEL, tmp_path / "model.d2moe")
    run("""
from pathlib import Path
file = Path(os.environ["MODEL"]) / "experts" / "layer-002.safetensors"
whole = file.read_bytes()
with load() as engine:
    expected = answer(engine)
    with file.open("r+b") as f:
        f.truncate(len(whole) // 2 + 1234)
    for _ in range(2):
        sequence = engine.new_sequence()
        try:
            engine.step([Chunk(sequence, tokens, 8, "all")])
        except StorageError as error:
            assert "layer-002" in str(error) and "the file ends" in str(error), error
        else:
            raise AssertionError("no error")
        sequence.free()
    file.write_bytes(whole)  # in place: it is the file that is open
    assert answer(engine) == expected
    other = file.with_name("other")
    other.write_bytes(os.urandom(len(whole)))
    os.replace(other, file)
    assert answer(engine) == expected
""", MODEL=str(tmp_path / "model.d2moe"))  # fmt: skip


def test_ctrl_c_in_the_middle_of_a_token(run):
    """A real signal while reads are on their way: KeyboardInterrupt soon, the engine as before, its memory given back at the end."""
    run("""
with load() as engine:
    expected = answer(engine)
    for delay in (0.01, 0.05, 0.11):
        shim.fault(ord("l"))
        sequence = engine.new_sequence()
        threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT)).start()
        begin = time.monotonic()
        try:
            while True:
                engine.set_memory(engine.budget.fixed + 20 * engine.container.record.record_bytes)
                engine.step([Chunk(sequence, tokens[:3], 8)])
                sequence.free()
        except KeyboardInterrupt:
            assert time.monotonic() - begin < 30
        shim.fault(0)
        sequence.free()
        assert answer(engine) == expected
    before, held = resident_bytes(), engine.ledger.used_bytes
assert before - resident_bytes() > 0.8 * held, (before, resident_bytes(), held)
""")


def test_ctrl_c_ends_a_run_of_the_command(shim, tmp_path):
    """`d2moe run` with a slow disk: one line, status 130, at once."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", "import sys, d2moe.cli; sys.exit(d2moe.cli.main())",
         "run", "builtin", "Once upon a time", "--expert-memory", "1MB", "--max-tokens", "900"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"LD_PRELOAD": str(shim)},
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors and time.monotonic() - begin < 30, errors


def test_a_budget_above_the_cgroups_limit(tmp_path, monkeypatch):
    """Refused before anything is loaded, with the limit; not where the model needs less than the limit anyway."""
    folder = tmp_path / "cgroup"
    folder.mkdir()
    (folder / "memory.current").write_text("0")
    monkeypatch.setattr(memory, "cgroup_folders", lambda controller: [folder])
    (folder / "memory.max").write_text(str(150_000_000))
    with pytest.raises(MemoryBudgetError, match=r"a budget of [\d.]+ MB is more than a cgroup allows this process, 150\.0 MB"):
        Engine.load(MODEL, EngineConfig(context=256, memory_bytes=10**12, reserve_bytes=100_000_000))
    (folder / "memory.max").write_text(str(10**9))
    with Engine.load(MODEL, EngineConfig(context=256, memory_bytes=10**12)) as engine:
        experts = engine.budget.experts
        (folder / "memory.max").write_text(str(engine.budget.fixed + experts // 2))
        with pytest.raises(MemoryBudgetError, match="allows this process"):
            engine.set_memory(10**12)
        assert engine.budget.experts == experts
        engine.set_memory(engine.budget.fixed + experts // 3)
    (folder / "memory.max").write_text("max")
    Engine.load(MODEL, EngineConfig(context=256, memory_bytes=10**12)).close()


def test_a_timeline_on_a_full_disk(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("NOT TESTED: there is no /dev/full here")
    tokens = np.random.default_rng().integers(0, 4096, 30).astype(np.int32)
    with Engine.load(MODEL, EngineConfig(context=256)) as engine:
        expected = engine.step([Chunk(engine.new_sequence(), tokens, 4)])
    with Engine.load(MODEL, EngineConfig(context=256, timeline="/dev/full")) as engine:
        with pytest.warns(UserWarning, match=r"/dev/full.*No space left on device.*goes on without"):
            found = engine.step([Chunk(engine.new_sequence(), tokens, 4)])
        assert np.array_equal(found, expected)
        engine.step([Chunk(engine.new_sequence(), tokens, 4)])
