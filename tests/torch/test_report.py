"""The page of what a conversion lost: its numbers are those of the model, the engine and transformers."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, tiny_checkpoint
from transformers import AutoModelForCausalLM

from d2moe import cli, planes
from d2moe.container import Container
from d2moe.container.inspect import measured_losses
from d2moe.convert.calibration import Calibration
from d2moe.convert.float_model import float_nll, unread_windows
from d2moe.convert.source import open_source
from d2moe.errors import ConfigError
from d2moe.evaluate.perplexity import perplexity
from d2moe.evaluate.report import WEIGHT_WIDTHS, WIDTHS, windows_of
from d2moe.runtime.config import EngineConfig
from d2moe.runtime.engine import Engine
from d2moe.runtime.tokenizer import Tokenizer


def random() -> np.random.Generator:
    seed = int(np.random.default_rng().integers(1 << 31))
    print("seed", seed)
    return np.random.default_rng(seed)


def text(path: Path, n_bytes: int) -> Path:
    path.write_bytes(random().integers(32, 127, n_bytes, dtype=np.uint8).tobytes())
    return path


class Tables(HTMLParser):
    """The cells of every table of a page, by row."""

    def __init__(self, page: Path):
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self._in_cell = False
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.tables[-1][-1][-1] += data


def model_nll(checkpoint: Path, windows: np.ndarray) -> float:
    """Transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    rows = torch.from_numpy(windows.astype(np.int64))
    with torch.no_grad():
        logits = model(rows[:, :-1]).logits.double().log_softmax(-1)
    return -float(logits.gather(-1, rows[:, 1:, None]).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_unquantised_model_is_transformers(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_checkpoint(family, tmp_path)
    windows = random().integers(0, 256, (3, 20)).astype(np.int32)
    heard: list[tuple[int, int]] = []
    for chunk in (64 << 20, 2048):  # all at once, and in pieces
        monkeypatch.setattr("d2moe.convert.float_model.CHUNK_BYTES", chunk)
        with open_source(tmp_path) as source:
            found = float_nll(source, windows, lambda done, total: heard.append((done, total)))
        assert found == pytest.approx(model_nll(tmp_path, windows), rel=2e-4)
    assert heard[-1][0] == heard[-1][1]
    assert heard[: len(heard) // 2] == sorted(heard[: len(heard) // 2])


def test_unread_windows_are_all_others(tmp_path: Path) -> None:
    tiny_checkpoint("olmoe", tmp_path / "hf")
    file = text(tmp_path / "a.txt", 12 * 512 + 99)
    with open_source(tmp_path / "hf") as source:
        calibration = Calibration((file,), 4 * 512)
        read = calibration.windows(source)
        rest = unread_windows(calibration, source, 256, 100)
        assert rest.shape == (12 - len(read), 257)
        everything = {w[:257].tobytes() for w in Calibration((file,), 1 << 40).windows(source)}
        assert {w.tobytes() for w in rest} | {w[:257].tobytes() for w in read} == everything
        few = unread_windows(calibration, source, 256, 3)
        assert len({w.tobytes() for w in few} & {w.tobytes() for w in rest}) == 3
        assert unread_windows(Calibration((file,), 1 << 40), source, 256, 3).shape == (0, 257)


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "llama"])
def test_page_of_a_calibrated_model(family: str, tmp_path: Path) -> None:
    checkpoint, model, page = tmp_path / "hf", tmp_path / "m.d2moe", tmp_path / "m.html"
    tiny_checkpoint(family, checkpoint)
    calibration, other = text(tmp_path / "a.txt", 6000), text(tmp_path / "b.txt", 900)
    given = ["--calibration", str(calibration), "--calibration-tokens", "2048", "--report-text", str(other), "--report-tokens", "600"]
    assert cli.main(["convert", str(checkpoint), str(model), *given, "--report", str(page), "--threads", "1"]) == 0
    container = Container.open(model)
    of_width, of_layer, worst = Tables(page).tables

    tokens = Tokenizer.load(model).encode(other.read_text())
    windows = np.array([tokens[:257], tokens[256:513]], np.int32)  # two of 256 fit into 600
    plain = math.exp(model_nll(checkpoint, windows) / 512)
    assert [row[0] for row in of_width[1:]] == [f"{bits} bits" for bits in WIDTHS]
    shown = float(re.search(r"float32: <b>([\d.]+)</b>", page.read_text())[1])  # type: ignore[index]
    assert shown == pytest.approx(plain, rel=1e-3)
    for row, bits in zip(of_width[1:], WIDTHS, strict=True):
        with Engine.load(model, EngineConfig(bits=bits, context=257, uniform=True)) as engine:
            found = math.exp(perplexity(engine, tokens[:513], context=256).nll / 512)
        assert row[1] == str(EngineConfig(bits=bits).dense_widths(container.has("head")))
        assert row[-2] == f"{found:.4f}"
        assert float(row[-1].removesuffix(" %")) == pytest.approx(100 * (float(row[-2]) / shown - 1), abs=0.02)

    widths, losses = measured_losses(container)  # type: ignore[misc]
    assert of_layer[0][1:] == [f"{bits} bits" for bits in widths]
    expected = [[f"layer {n} {part}", *(f"{100 * x:.3g} %" for x in row)] for n, table in losses.items()
                for part, row in zip(("gate", "up", "down"), table, strict=True)]  # fmt: skip
    assert of_layer[1:] == expected
    every = np.stack([container.read_dense(f"optional.losses.{layer}")[..., 0] for layer in container.moe_layers])
    assert [row[1] for row in worst[1:]] == [f"{100 * float(x):.3g} %" for x in sorted(every.ravel(), reverse=True)[:10]]
    first = re.fullmatch(r"layer (\d+) expert (\d+) (gate|up|down)", worst[1][0])
    assert first
    at = container.moe_layers.index(int(first[1])), int(first[2]), ("gate", "up", "down").index(first[3])
    assert every[at] == every.max()
    assert page.read_text().count("<svg") == (3 if container.experts > 1 else 2)


def test_text_that_calibration_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, page = tmp_path / "hf", tmp_path / "m.html"
    tiny_checkpoint("olmoe", checkpoint)
    file = text(tmp_path / "a.txt", 8 * 512)
    given = ["--calibration", str(file), "--report", str(page), "--report-tokens", "512", "--calibration-tokens"]
    assert cli.main(["convert", str(checkpoint), str(tmp_path / "m"), *given, "1024"]) == 0
    with open_source(checkpoint) as source:
        windows = unread_windows(Calibration((file,), 1024), source, 256, 2)
    shown = re.search(r"512 predictions .*?float32: <b>([\d.]+)</b>", page.read_text(), re.DOTALL)
    assert shown
    assert float(shown[1]) == pytest.approx(math.exp(model_nll(checkpoint, windows) / 512), rel=1e-3)
    assert cli.main(["convert", str(checkpoint), str(tmp_path / "n"), *given, "8192"]) == 0
    assert "give --report-text" in capsys.readouterr().err
    assert "Perplexity was not measured" in page.read_text()


def test_page_without_losses_shows_errors_of_weights(tmp_path: Path) -> None:
    checkpoint, model, page = tmp_path / "hf", tmp_path / "m.d2moe", tmp_path / "m.html"
    tiny_checkpoint("qwen3_moe", checkpoint)
    assert cli.main(["convert", str(checkpoint), str(model)]) == 0
    assert cli.main(["inspect", str(model), "--report", str(page)]) == 0
    assert "converted without calibration text" in page.read_text()
    assert "Perplexity was not measured" in page.read_text()
    of_width, of_layer, _ = Tables(page).tables
    assert len(of_width[0]) == 6  # no column of perplexity
    assert of_layer[0][1:] == [f"{bits} bits" for bits in WEIGHT_WIDTHS]
    container = Container.open(model)
    layer, experts = container.moe_layers[-1], (0, 2, 4, 6)

    def plain(expert: int, bits: int) -> np.ndarray:
        m = container.read_expert(layer, expert, bits)["down"]  # only the planes of that width are read
        codes = planes.untile(planes.unpack(m.base, m.planes))
        return planes.dequantize(codes, planes.untile_affine(m.affine), m.row_scale.reshape(-1), bits, *codes.shape)

    for bits, shown in zip(WEIGHT_WIDTHS, of_layer[-1][1:], strict=True):
        each = [np.square(plain(e, bits) - plain(e, 8)).sum() / np.square(plain(e, 8)).sum() for e in experts]
        assert float(shown.removesuffix(" %")) == pytest.approx(100 * float(np.mean(each)), rel=1e-2)


def test_markdown_has_its_pictures_beside_it(tmp_path: Path) -> None:
    checkpoint, page = tmp_path / "hf", tmp_path / "of it.md"
    tiny_checkpoint("olmoe", checkpoint)
    calibration = text(tmp_path / "a.txt", 3000)
    given = ["--calibration", str(calibration), "--report-text", str(calibration), "--report-tokens", "256", "--report", str(page)]
    assert cli.main(["convert", str(checkpoint), str(tmp_path / "m"), *given]) == 0
    shown = page.read_text(encoding="utf-8")
    names = re.findall(r"!\[.*?\]\(<(.*?)>\)", shown)
    assert len(names) == 3
    for name in names:
        root = ElementTree.parse(tmp_path / name).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in shown.splitlines() if line.startswith("|")]
    assert sorted(set(cells)) == [4, 8, 9]  # worst, layers, widths: every row as wide as its head
    assert "{" not in shown


def test_a_short_text_is_one_window() -> None:
    assert windows_of(range(5), 256, 4).tolist() == [[0, 1, 2, 3, 4]]
    assert windows_of(range(9), 4, 4).tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8]]
    assert windows_of(range(20), 4, 1).tolist() == [[0, 1, 2, 3, 4]]
    with pytest.raises(ConfigError, match="at least 2"):
        windows_of([7], 256, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--report", "x.pdf"], ".html or .md"),
        (["--report", "nowhere/x.html"], "does not exist"),
        (["--report-text", "FILE"], "name a page to write"),
    ],
)
def test_refused_before_anything_is_done(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_checkpoint("olmoe", tmp_path / "hf")
    file = text(tmp_path / "a.txt", 100)
    given = [str(file) if g == "FILE" else g for g in given]
    assert cli.main(["convert", "hf", "m", *given]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not Path("m").exists()
    assert not Path("m.partial").exists()
    assert cli.main(["inspect", "builtin", "--reference", "hf"]) == 2
