"""A model file is untrusted: whatever its bytes, opening it succeeds or raises ContainerError, within little memory."""

from __future__ import annotations

import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from containers import FILES, make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from d2moe.container import Container
from d2moe.container.safetensors_header import parse_header
from d2moe.container.verify import verify
from d2moe.errors import CheckpointError, ContainerError

NAMES = ("dense.safetensors", "experts/layer-000.safetensors", "checksums.safetensors", "d2moe.json", "config.json")
MOST_BYTES = 16 << 20
FUZZ = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([2**63, -1, 10**30, "U8"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("fuzz") / "tiny.d2moe")


def attempt(path: Path) -> bool:
    """Open, and read all if that works; True if it did. Anything but ContainerError, or much memory, fails the test."""
    tracemalloc.start()
    try:
        container = Container.open(path)
        for name in container.dense:
            container.read_dense(name)
        for name in container.nested:
            container.read_nested(name, 8)
        container.read_expert(container.moe_layers[-1], container.experts - 1, 8)
        verify(container)
        return True
    except ContainerError as e:
        assert str(e).isprintable() and len(str(e)) < 1000
        return False
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < MOST_BYTES, f"{peak:,} bytes for a container of 200 kB"


def with_changed(path: Path, name: str, data: bytes, check: Callable[[], object]) -> None:
    original = (path / name).read_bytes()
    (path / name).write_bytes(data)
    try:
        check()
    finally:
        (path / name).write_bytes(original)


@FUZZ
@given(name=st.sampled_from(NAMES), data=st.data())
def test_flipped_bytes(sample: Path, name: str, data: st.DataObject) -> None:
    content = bytearray((sample / name).read_bytes())
    header = min(len(content), 2600)  # where the structure is
    for at in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=4)):
        content[at] = data.draw(st.integers(0, 255))
    with_changed(sample, name, bytes(content), lambda: attempt(sample))


@FUZZ
@given(name=st.sampled_from(NAMES), data=st.data())
def test_cut_and_extended_files(sample: Path, name: str, data: st.DataObject) -> None:
    content = (sample / name).read_bytes()
    changed = content[: data.draw(st.integers(0, len(content) - 1))] + data.draw(st.binary(max_size=50))
    ok: list[bool] = []
    with_changed(sample, name, changed, lambda: ok.append(attempt(sample)))
    if changed != content and len(changed) != len(content) and name != "d2moe.json":
        assert ok == [False]


@FUZZ
@given(name=st.sampled_from(NAMES), content=st.binary(max_size=200))
def test_random_bytes(sample: Path, name: str, content: bytes) -> None:
    with_changed(sample, name, content, lambda: attempt(sample))
    head = struct.pack("<Q", len(content)) + content
    with_changed(sample, name, head, lambda: attempt(sample))


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*at, key))


def changed_somewhere(table: Any, data: st.DataObject) -> Any:
    """The JSON value with one place replaced, removed or added."""
    at = data.draw(st.sampled_from(list(places(table))))
    new = data.draw(JSON)
    if not at:
        return new
    inner = table
    for key in at[:-1]:
        inner = inner[key]
    action = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if action == "replace":
        inner[at[-1]] = new
    elif action == "remove":
        del inner[at[-1]]
    elif isinstance(inner, dict):
        inner[data.draw(st.text(max_size=10))] = new
    else:
        inner.append(new)
    return table


@settings(FUZZ, max_examples=400)
@given(data=st.data())
def test_manifest_mutations(sample: Path, data: st.DataObject) -> None:
    table = changed_somewhere(json.loads((sample / "d2moe.json").read_text()), data)
    with_changed(sample, "d2moe.json", json.dumps(table).encode(), lambda: attempt(sample))


@settings(FUZZ, max_examples=300)
@given(name=st.sampled_from(NAMES[:3]), data=st.data())
def test_header_mutations(sample: Path, name: str, data: st.DataObject) -> None:
    """Headers that are valid JSON and wrong in one place; the file keeps its size, as an attacker would see to it."""
    content = (sample / name).read_bytes()
    (n,) = struct.unpack("<Q", content[:8])
    text = json.dumps(changed_somewhere(json.loads(content[8 : 8 + n]), data)).encode()
    room = max(n, len(text))
    new = struct.pack("<Q", room) + text.ljust(room) + content[8 + n :]
    with_changed(sample, name, new[: len(content)], lambda: attempt(sample))


@settings(deadline=None, max_examples=400)
@given(data=st.data(), size=st.integers(0, 64))
def test_accepted_headers_are_accepted_by_the_safetensors_library(data: st.DataObject, size: int) -> None:
    offsets = st.lists(st.integers(0, 64), min_size=2, max_size=2)
    facts = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["U8", "F32", "BF16", "F16", "I64"]),
            "shape": st.lists(st.integers(0, 8), max_size=3),
            "data_offsets": offsets,
        }
    )
    table = data.draw(st.dictionaries(st.text(min_size=1, max_size=4), facts | JSON, max_size=3))
    # Make many of them right: lay the well-formed ones end to end.
    if data.draw(st.booleans()):
        at = 0
        for value in table.values():
            if isinstance(value, dict) and set(value) == {"dtype", "shape", "data_offsets"}:
                n = {"U8": 1, "F32": 4, "BF16": 2, "F16": 2, "I64": 8}.get(str(value["dtype"]), 1)
                for side in value["shape"]:
                    n *= side
                value["data_offsets"] = [at, at + n]
                at += n
        size = at
    text = json.dumps(table).encode()
    try:
        header = parse_header(text, 8 + len(text) + size, "x.safetensors", CheckpointError)
    except CheckpointError:
        return
    found = deserialize(struct.pack("<Q", len(text)) + text + bytes(size))
    assert {name: list(e.shape) for name, e in header.entries.items()} == {
        name: facts["shape"] for name, facts in found
    }


@pytest.mark.parametrize("value", [b"\xff" * 8, struct.pack("<Q", 1 << 40), struct.pack("<Q", 99_999_999)])
def test_a_header_length_beyond_the_file(sample: Path, value: bytes) -> None:
    content = (sample / "dense.safetensors").read_bytes()

    def check() -> None:
        with pytest.raises(
            ContainerError, match=r"dense.safetensors: the header claims [\d,]+ bytes, expected at most"
        ):
            Container.open(sample)

    with_changed(sample, "dense.safetensors", value + content[8:], check)


def test_huge_counts_cost_nothing(sample: Path) -> None:
    """A manifest that claims 65,536 experts of 2**24 columns is refused by comparison, not by making room for them."""
    table = json.loads((sample / "d2moe.json").read_text())
    for change in ({"experts": 65536}, {"layers": list(range(65536))}, {"hidden": 1 << 24}, {"layers": [0, 65536]}):
        text = json.dumps(table | change).encode()
        with_changed(sample, "d2moe.json", text, lambda: attempt(sample))
    deep = b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    for name in ("d2moe.json", "config.json"):
        with_changed(sample, name, deep, lambda: attempt(sample))


def test_surrogates_and_control_characters_in_names(sample: Path) -> None:
    table = json.loads((sample / "d2moe.json").read_text())
    for name in ('"\\ud800"', '"\\u001b[2J"', '"' + "x" * 5000 + '"'):
        text = json.dumps(table)[:-1] + f", {name}: 1}}"
        with_changed(sample, "d2moe.json", text.encode(), lambda: attempt(sample))


def test_the_library_refuses_what_we_refuse() -> None:
    """Overlap and holes, the two attacks that the format's own documentation names."""
    for offsets in ([[0, 4], [2, 6]], [[0, 4], [6, 10]], [[4, 8], [8, 12]]):
        table = {str(i): {"dtype": "U8", "shape": [4], "data_offsets": o} for i, o in enumerate(offsets)}
        text, size = json.dumps(table).encode(), offsets[-1][1]
        with pytest.raises(CheckpointError, match=r"overlaps|hole"):
            parse_header(text, 8 + len(text) + size, "x.safetensors", CheckpointError)
        with pytest.raises(SafetensorError):
            deserialize(struct.pack("<Q", len(text)) + text + bytes(size))


def test_the_sample_is_as_it_was(sample: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sample, tmp_path / "tiny.d2moe"))
    assert attempt(copy) and verify(copy).problems == () and (copy / "config.json").read_bytes() == FILES["config.json"]
