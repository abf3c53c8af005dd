"""The command line as a user meets it: exit codes, what goes to which stream, help, and one sentence per error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
from containers import make
from test_generate import ToyEngine, bytes_backend

import d2moe.cli as cli
from d2moe.cli import progress, shared
from d2moe.cli.progress import Bar
from d2moe.container import Container
from d2moe.errors import ContainerError
from d2moe.evaluate.bench import bench, prompt_of, storage_bandwidth, tier
from d2moe.runtime.config import show_bytes
from d2moe.runtime.generate import Model
from d2moe.runtime.tokenizer import Tokenizer
from d2moe.types import WIDTHS, DenseWidths

Run = Callable[..., tuple[int, str, str]]
SRC = Path(__file__).parents[2] / "src"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the command line in this process: exit code, stdout, stderr."""
    monkeypatch.delenv("D2MOE_DEBUG", raising=False)

    def call(*arguments: str, stdin: str | None = None, tty: bool = False) -> tuple[int, str, str]:
        import io

        source = io.StringIO(stdin or "")
        source.isatty = lambda: tty  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdin", source)
        code = cli.main(arguments)
        out = capsys.readouterr()
        return code, out.out, out.err

    return call


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Every model that is opened is the toy; `engine` is the latest, `options` what it was opened with."""
    made = SimpleNamespace(script=b"a story", template=None, config={}, engine=None, options=None)

    def opened(path: Path, options: dict[str, Any]) -> Model:
        made.options = {k: v for k, v in options.items() if v is not None}
        made.engine = ToyEngine(made.script, context=made.options.get("context", 512))
        return Model(made.engine, Tokenizer(bytes_backend(), template=made.template), made.config)

    for module in ("d2moe.cli.run", "d2moe.cli.measure"):
        monkeypatch.setattr(f"{module}.open_model", opened)
        monkeypatch.setattr(f"{module}.model_path", lambda name: Path(name or "builtin"))
    return made


def every_command(group: click.Group, names: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    context = click.Context(group)
    found: list[tuple[str, ...]] = []
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found.append((*names, name))
        if isinstance(command, click.Group):
            found += every_command(command, (*names, name))
    return found


@pytest.mark.parametrize("names", every_command(cli.commands), ids=" ".join)
def test_every_command_has_help_with_an_example(names: tuple[str, ...], run: Run) -> None:
    code, out, err = run(*names, "--help")
    assert (code, err) == (0, "")
    assert names[-1] in out
    if names not in [("eval",), ("version",)]:
        assert "Example" in out and f"d2moe {' '.join(names)}" in out


def test_help_and_version(run: Run) -> None:
    assert run("--help")[0] == run("-h")[0] == 0
    code, out, _ = run("--version")
    assert code == 0 and out.startswith("d2moe ")
    assert run("version")[1].startswith("d2moe ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runn"], "did you mean 'run'"),
        (["eval", "perplexty"], "did you mean 'perplexity'"),
        (["xyzzy"], "there are run, serve, control, convert"),
        (["run", "--bit", "3"], "--bits"),
        (["run", "--memroy", "1GB"], "--memory"),
        (["run", "--bits", "9"], "9.0 is not in the range 2<=x<=8"),
        (["run", "a", "b", "c"], "unexpected extra argument"),
        (["convert", "/does/not/exist", "x"], "does not exist"),
        (["convert", ".", "x", "--group", "32"], "'32' is not one of"),
        (["eval", "perplexity", "m"], "--text"),
        (["eval", "perplexity", "m", "--text", __file__, "--context", "4", "--stride", "5"], "would skip text"),
    ],
)
def test_wrong_usage_exits_2_and_names_the_near_thing(arguments: list[str], message: str, run: Run) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "/no/model.d2moe", "hello"], "/no/model.d2moe"),
        (["inspect", "/no/model.d2moe"], "/no/model.d2moe"),
        (["verify", "/no/model.d2moe"], "/no/model.d2moe"),
        (["bench", "/no/model.d2moe"], "/no/model.d2moe"),
        (["run", "m", "hi", "--memory", "12 parsecs"], "memory is '12 parsecs', expected"),
        (["run", "m", "hi", "--top-p", "1.5"], "top_p is 1.5, expected"),
        (["run", "m", "hi", "--seed", "x"], "seed is 'x', expected"),
        (["run", "m", "hi", "--stop", ""], "stop holds ''"),
        (["run", "m", ""], "prompt is empty"),
        (["run", "m"], "nothing came from stdin"),
        (["eval", "perplexity", "m", "--text", os.devnull], "is"),
    ],
)
def test_an_error_is_one_sentence_on_stderr_and_exits_1(arguments: list[str], message: str, run: Run) -> None:
    code, out, err = run(*arguments)
    if arguments[-1] == os.devnull and code == 2:
        return  # a click that wants a regular file
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_inspect_shows_the_bytes_of_each_width_for_experts_and_dense_weights(tmp_path: Path, run: Run) -> None:
    container = Container.open(make(tmp_path / "tiny.d2moe"))
    code, out, err = run("inspect", str(container.path))
    assert (code, err) == (0, "") and "dense weights" in out
    for bits in WIDTHS:
        (row,) = (line.split() for line in out.splitlines() if line.split()[:1] == [str(bits)])
        assert " ".join(row[2:4]) == show_bytes(container.record.prefix_bytes(bits))
        assert " ".join(row[-2:]) == show_bytes(container.dense_bytes(DenseWidths(bits)))
    widths = json.loads(run("inspect", str(container.path), "--json")[1])["widths"]
    assert [w["dense_bytes"] for w in widths] == [container.dense_bytes(DenseWidths(bits)) for bits in WIDTHS]
    assert "embed.plane8" in run("inspect", str(container.path), "--tensors")[1]


def test_text_that_is_not_utf8_is_named(tmp_path: Path, run: Run) -> None:
    (tmp_path / "t.txt").write_bytes(b"abc\xff")
    code, _, err = run("eval", "perplexity", "m", "--text", str(tmp_path / "t.txt"))
    assert code == 1 and "t.txt is not UTF-8 text (byte 3)" in err


def test_run_streams_to_stdout_and_reports_on_stderr(toy: SimpleNamespace, run: Run) -> None:
    code, out, err = run("run", "m", "once", "--bits", "3", "--memory", "96MB")
    assert (code, out) == (0, "a story\n")
    assert "tokens/s" in err and "greedy" in err and "bits on average" in err
    assert toy.options == {"bits": 3, "memory": "96MB"}
    options = {"bits": 3.5, "uniform": True, "dense_bits": 6, "kv": "q8", "threads": 1}
    assert run("run", "m", "once", "--bits", "3.5", "--uniform", "--dense-bits", "6", "--kv", "q8", "--threads", "1")[0] == 0
    assert toy.options == options
    assert run("run", "m", "once", "--quality", "fast")[0] == 0 and toy.options == {"quality": "fast"}
    assert toy.engine.closed and toy.engine.live == 0
    assert run("run", "m", "once", "--no-report")[1:] == ("a story\n", "")


def test_run_takes_the_prompt_from_stdin_and_one_with_spaces_for_the_builtin(toy: SimpleNamespace, run: Run) -> None:
    assert run("run", "m", "--no-report", stdin="tell\n")[1] == "a story\n"
    assert run("run", "once upon a time", "--no-report")[1] == "a story\n"
    assert run("run", "builtin", "x", "--no-report")[1] == "a story\n"


def test_run_passes_sampling_on_and_zero_is_a_value(toy: SimpleNamespace, run: Run) -> None:
    toy.config = {"do_sample": True, "temperature": 0.7, "top_p": 0.9}
    assert "temperature 0.7, top-p 0.9, seed 0" in run("run", "m", "x")[2]
    assert "greedy" in run("run", "m", "x", "--temperature", "0")[2]
    assert "seed 5" in run("run", "m", "x", "--seed", "5")[2]
    assert "seed random" in run("run", "m", "x", "--seed", "random")[2]
    assert run("run", "m", "x", "--stop", "st", "--stop", "zz", "--no-report")[1] == "a \n"
    assert run("run", "m", "x", "--max-tokens", "3", "--no-report")[1] == "a s\n"


def test_run_interactive_answers_each_line(toy: SimpleNamespace, run: Run) -> None:
    code, out, err = run("run", "m", "--no-report", stdin="one\n\ntwo\n", tty=True)
    assert code == 0 and out.count("a story\n") == 2 and "Ctrl-D" in err


def test_run_uses_a_chat_template_where_there_is_one(toy: SimpleNamespace, run: Run) -> None:
    toy.template = "{{ raise_exception('too late') if messages | length > 1 }}[{{ messages[0].content }}]"
    assert run("run", "m", "x", "--no-report")[1] == "a story\n"
    assert "too late" in run("run", "m", "--no-report", stdin="a\nb\n", tty=True)[2]  # a chat keeps its turns
    assert run("run", "m", "--raw", "--no-report", stdin="a\nb\n", tty=True)[0] == 0
    toy.template = None
    assert "no chat template" in run("run", "m", "x", "--chat")[2]


def test_an_interrupt_exits_130_without_a_traceback(
    toy: SimpleNamespace, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = ToyEngine.step, []

    def step(self: ToyEngine, chunks: list[Any]) -> np.ndarray:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, chunks)

    monkeypatch.setattr(ToyEngine, "step", step)
    code, out, err = run("run", "m", "x")
    assert (code, out) == (130, "a s\n") and err.strip() == "interrupted"
    assert toy.engine.live == 0 and toy.engine.closed


def test_a_bug_is_one_line_too_unless_debugging(
    toy: SimpleNamespace, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("oh\nno")

    monkeypatch.setattr(ToyEngine, "step", broken)
    code, _, err = run("run", "m", "x")
    assert code == 1 and "unexpected ZeroDivisionError: oh no; this is a bug, D2MOE_DEBUG=1 shows where" in err
    monkeypatch.setenv("D2MOE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run("run", "m", "x")


def test_perplexity_ends_with_a_json_line(toy: SimpleNamespace, run: Run, tmp_path: Path) -> None:
    toy.script = None
    (tmp_path / "t.txt").write_text("Some text to score. " * 10)
    code, out, err = run("eval", "perplexity", "m", "--text", str(tmp_path / "t.txt"), "--context", "32", "--bits", "2")
    line = json.loads(out.splitlines()[-1])
    assert code == 0 and err == "" and "windows of 32 tokens every 32" in out
    assert {"perplexity", "tokens", "bits", "bits_per_byte", "context", "stride", "text", "model"} <= set(line)
    assert (line["tokens"], line["context"], line["stride"]) == (199, 32, 32)
    assert toy.options["context"] == 32 and toy.engine.closed


def test_bench_ends_with_a_json_line(toy: SimpleNamespace, run: Run) -> None:
    toy.script = None
    code, out, _ = run("bench", "m", "--prompt-tokens", "20", "--generate", "8", "--repeats", "2", "--bits", "3")
    line = json.loads(out.splitlines()[-1])
    assert code == 0 and "tokens/s" in out
    assert {
        "generation_tokens_per_s", "prompt_tokens_per_s", "ttft_s", "peak_bytes", "read_bytes_per_token", "hit_rate",
        "roofline", "bits", "memory_bytes", "kernels", "tier", "python_share", "threads",
    } <= set(line)  # fmt: skip
    assert line["prompt_tokens"] == 20 and line["read_bytes_per_token"] == 100 and line["hit_rate"] == 0.5
    assert "do not fit the context" in run("bench", "m", "--prompt-tokens", "600")[2]


def test_bench_measures_what_it_says() -> None:
    with closing(Model(ToyEngine(context=300), Tokenizer(bytes_backend()))) as m:
        prompt = prompt_of(m, 200)
        assert len(prompt) == 200 and bytes(prompt).startswith(b"Once upon a time")
        seen: list[tuple[int, int]] = []
        found = bench(m, prompt, generate=5, repeats=2, progress=lambda *a: seen.append(a))
    assert seen == [(n, 10) for n in range(1, 11)]
    assert found["generated_tokens"] == 5 and found["bits"] == 4.0


def test_storage_is_measured_or_said_not_to_be(tmp_path: Path) -> None:
    (tmp_path / "e").write_bytes(bytes(1 << 20))
    container: Any = SimpleNamespace(
        record=SimpleNamespace(prefix_bytes=lambda bits: 8192),
        moe_layers=(0,),
        experts=16,
        expert_path=lambda layer: tmp_path / "e",
        offsets=np.arange(16)[None] * 65536,
    )
    rate = storage_bandwidth(container, 4)
    assert rate is None or rate > 1e5
    assert tier(tmp_path, True).startswith("direct I/O from ") and " on " in tier(tmp_path, False)
    container.expert_path = lambda layer: tmp_path / "absent"
    assert storage_bandwidth(container, 4) is None


def test_numbers_that_are_not_finite_are_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    shared.print_json({"a": float("nan"), "b": {"c": float("inf")}, "d": 1.5})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": {"c": None}, "d": 1.5}


def test_the_builtin_model_is_named_when_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import d2moe

    monkeypatch.setattr(d2moe, "builtin_model", lambda: Path("/no/builtin.d2moe"))
    with pytest.raises(ContainerError, match="no built-in model"):
        shared.model_path(None)
    assert shared.model_path("x/y") == Path("x/y")


def test_progress_is_silent_at_first_and_plain_without_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Bar("reading") as bar:
        for second in range(100):
            now[0] = float(second)
            bar(second + 10, 110, f"piece {second}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "reading: 10 %, 1 min 38 s left (piece 2)"
    assert len(lines) == 10 and all("\x1b" not in line for line in lines)


def in_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(SRC), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)


def test_importing_and_helping_stays_light() -> None:
    code = (
        "import sys, d2moe.cli, d2moe.cli.run, d2moe.cli.files, d2moe.cli.measure\n"
        "heavy = {'numpy', 'rich', 'torch', 'transformers', 'tokenizers', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "import d2moe.runtime.generate\n"
        "heavy = {'rich', 'torch', 'transformers', 'jinja2', 'numpy.random'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = in_process(code)
    assert done.returncode == 0, done.stderr


def test_python_dash_m_and_a_closed_pipe() -> None:
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run([sys.executable, "-m", "d2moe", "nope"], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 2 and "No such command" in done.stderr
    reader, writer = os.pipe()
    os.close(reader)
    piped = subprocess.run(
        [sys.executable, "-m", "d2moe", "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, env=env, timeout=60
    )
    os.close(writer)
    assert piped.returncode != 0 and "Traceback" not in piped.stderr and "Exception ignored" not in piped.stderr


def test_starting_takes_no_noticeable_time() -> None:
    start = time.perf_counter()
    assert in_process("import d2moe.cli").returncode == 0
    assert time.perf_counter() - start < 5  # usually 0.1 s; catches an import of torch
