"""d2moe.json: what a container holds, checked key by key. `docs/format.md` is the normative text."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from d2moe.container.files import parse_json, shown
from d2moe.container.layout import PROJECTIONS, SEGMENTS, RecordLayout, expert_file
from d2moe.errors import ContainerError
from d2moe.types import ALIGN_BYTES, BASE_BITS, MAX_BITS

VERSION = 2
MANIFEST = "d2moe.json"
DENSE = "dense.safetensors"
CHECKSUMS = "checksums.safetensors"
CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
MAX_SMALL_BYTES = 1 << 24
"""Largest manifest or model config that is read."""

MAX_SIDE = 1 << 24
MAX_COUNT = 1 << 16
GROUPS = tuple(range(32, 257, 32))
_SIZES = {"group", "hidden", "inner", "layers", "experts"}
_KEYS = {"format", "version", "segments", "files", "source", "quantizer"} | _SIZES
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}(/[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?")
_SEGMENT_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_SEAL = re.compile(rb'"seal": "([0-9a-f]{64})"')


@dataclass(frozen=True)
class FileFacts:
    """One file of the container; weights have no sha256, their CRCs are in checksums.safetensors."""

    n_bytes: int
    sha256: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class Manifest:
    """The facts of d2moe.json. `layers` lists the layers that have experts, ascending."""

    record: RecordLayout
    layers: tuple[int, ...]
    experts: int
    files: Mapping[str, FileFacts]
    source: Mapping[str, Any]
    quantizer: Mapping[str, Any]
    optional_segments: Mapping[str, int] = field(default_factory=dict)
    """Segments that this version does not know and skips: bytes per expert, after the last record of each file."""
    kept: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    """By layer, the bits that each expert's record has; those of a layer that is not named have all eight."""

    def kept_of(self, layer: int) -> tuple[int, ...]:
        """Bits that each record of the layer has."""
        return self.kept.get(layer, (MAX_BITS,) * self.experts)

    @property
    def expert_files(self) -> tuple[str, ...]:
        return tuple(expert_file(layer) for layer in self.layers)

    @property
    def weight_files(self) -> frozenset[str]:
        """Files whose CRCs are in checksums.safetensors."""
        return frozenset((DENSE, *self.expert_files))


def dump_manifest(manifest: Manifest) -> bytes:
    """The text of d2moe.json, sealed; the same facts give the same bytes."""
    record = manifest.record
    segments: list[dict[str, Any]] = [
        {
            "name": name,
            "bytes": record.segment_bytes(name),
            "parts": [
                {"kind": p.kind, "projection": p.projection, "offset": p.offset, "bytes": p.n_bytes}
                for p in record.parts(name)
            ],
        }
        for name in SEGMENTS
    ]
    segments += [{"name": n, "bytes": b, "optional": True} for n, b in manifest.optional_segments.items()]
    files = {}
    for name, facts in manifest.files.items():
        files[name] = {"bytes": facts.n_bytes} | ({"sha256": facts.sha256} if facts.sha256 else {})
        files[name] |= {"optional": True} if facts.optional else {}
    table = {
        "format": "d2moe",
        "version": VERSION,
        "seal": "0" * 64,
        "group": record.group,
        **({"rotation": record.rotation} if record.rotation else {}),
        "hidden": record.hidden,
        "inner": record.inner,
        "layers": list(manifest.layers),
        "experts": manifest.experts,
        "segments": segments,
        **({"kept": {str(layer): list(manifest.kept_of(layer)) for layer in manifest.layers}} if manifest.kept else {}),
        "files": files,
        "source": manifest.source,
        "quantizer": manifest.quantizer,
    }
    return reseal((json.dumps(table, indent=1, allow_nan=False) + "\n").encode())


def reseal(text: bytes) -> bytes:
    """The text with the seal that it should bear, where it has one."""
    return _SEAL.sub(b'"seal": "%s"' % seal_of(text)[1].encode(), text, count=1)


def seal_of(text: bytes) -> tuple[str, str]:
    """(the seal that the text bears, the seal that it should bear): SHA-256 of the text with zeros for the seal."""
    found = _SEAL.search(text)
    if not found:
        return "", hashlib.sha256(text).hexdigest()
    start, end = found.span(1)
    return found[1].decode(), hashlib.sha256(text[:start] + b"0" * 64 + text[end:]).hexdigest()


def parse_manifest(text: bytes, where: str) -> Manifest:
    """Check the text of d2moe.json; raises ContainerError that names the key."""
    return _Parser(where).manifest(text)


class _Parser:
    def __init__(self, where: str):
        self.where = where

    def fail(self, what: str, advice: str = "the manifest is damaged; copy or convert the model again") -> NoReturn:
        raise ContainerError(f"{self.where}: {what}; {advice}")

    def manifest(self, text: bytes) -> Manifest:
        table = parse_json(text, self.where, ContainerError, "copy or convert the model again")
        if table.get("format") != "d2moe":
            self.fail(f"format is {shown(table.get('format'))}, expected 'd2moe'", "this is not a d2moe container")
        version = table.get("version")
        if type(version) is not int:
            self.fail(f"version is {shown(version)}, expected {VERSION}")
        if version > VERSION:
            self.fail(f"version is {version}, this d2moe reads {VERSION}", "it was made by a newer d2moe, upgrade")
        if version < VERSION:
            self.fail(f"version is {version}, this d2moe reads {VERSION}", "convert the model again")
        newer = "if a newer d2moe made it, upgrade; otherwise the manifest is damaged"
        if unknown := set(table) - _KEYS - {"seal", "optional", "rotation", "kept"}:
            self.fail(f"has the unknown key {shown(min(unknown))}", newer)
        if missing := _KEYS - set(table):
            self.fail(f"lacks the key {shown(min(missing))}")
        group = self.number(table["group"], "group", 1, max(GROUPS))
        if group not in GROUPS:
            self.fail(f"group is {group}, expected a multiple of 32 up to {max(GROUPS)}")
        hidden, inner = (self.number(table[name], name, 1, MAX_SIDE) for name in ("hidden", "inner"))
        rotation = self.number(table.get("rotation", 0), "rotation", 0, MAX_SIDE)
        if rotation and (rotation < min(GROUPS) or rotation & (rotation - 1)):
            self.fail(f"rotation is {rotation}, expected a power of two from {min(GROUPS)} on")
        experts = self.number(table["experts"], "experts", 1, MAX_COUNT)
        layers = [self.number(v, "a layer", 0, MAX_COUNT) for v in self.list(table["layers"], "layers")]
        if not layers or layers != sorted(set(layers)):
            self.fail(f"layers is {shown(layers)}, expected ascending numbers, at least one")
        record, optional_segments = self.segments(table["segments"], RecordLayout(hidden, inner, group, rotation=rotation))
        kept = self.kept(table["kept"], layers, experts) if "kept" in table else {}
        expert_files = {expert_file(layer) for layer in layers}
        rows = self.object(table["files"], "files")
        files = {name: self.file(name, facts, expert_files) for name, facts in rows.items()}
        for name in (CONFIG, DENSE, CHECKSUMS, *sorted(expert_files)):
            if name not in files or files[name].optional:
                self.fail(f"files lacks {name}" if name not in files else f"{name} cannot be optional")
        self.object(table.get("optional", {}), "optional")
        source, quantizer = self.object(table["source"], "source"), self.object(table["quantizer"], "quantizer")
        return Manifest(record, tuple(layers), experts, files, source, quantizer, optional_segments, kept)

    def kept(self, value: Any, layers: list[int], experts: int) -> dict[int, tuple[int, ...]]:
        rows = self.object(value, "kept")
        if list(rows) != [str(layer) for layer in layers]:
            self.fail(f"kept is of the layers {shown(list(rows))}, expected {shown([str(layer) for layer in layers])}")
        found = {}
        for layer in layers:
            widths = self.list(rows[str(layer)], f"kept of layer {layer}")
            if len(widths) != experts:
                self.fail(f"kept of layer {layer} has {len(widths)} numbers, expected one for each of {experts} experts")
            found[layer] = tuple(self.number(w, f"kept of layer {layer} expert {e}", BASE_BITS, MAX_BITS) for e, w in enumerate(widths))
        return found

    def segments(self, value: Any, plain: RecordLayout) -> tuple[RecordLayout, dict[str, int]]:
        """The record with the room that optional parts take, and the optional segments after it."""
        rows = [self.object(row, "a segment") for row in self.list(value, "segments")]
        names = [row.get("name") for row in rows]
        if tuple(names[: len(SEGMENTS)]) != SEGMENTS:
            self.fail(f"segments are {shown(names)}, expected {', '.join(SEGMENTS)} first")
        sizes = [self.segment(row, plain) for row in rows[: len(SEGMENTS)]]
        if len(set(sizes[1:])) != 1:
            self.fail(f"plane segments have {shown(sizes[1:])} bytes, expected one size")
        spare = sizes[0] - plain.base_bytes, sizes[1] - plain.plane_bytes
        optional: dict[str, int] = {}
        for row in rows[len(SEGMENTS) :]:
            name = row.get("name")
            if not isinstance(name, str) or not _SEGMENT_NAME.fullmatch(name) or name in optional or name in SEGMENTS:
                self.fail(f"a segment is named {shown(name)}, expected a new name in small letters")
            self.skippable(row, f"segment {shown(name)}")
            optional[name] = self.number(row.get("bytes"), f"bytes of segment {name}", 0, 1 << 48)
        return replace(plain, base_spare_bytes=spare[0], plane_spare_bytes=spare[1]), optional

    def segment(self, row: dict[str, Any], plain: RecordLayout) -> int:
        """Bytes of a segment whose known parts are where the layout has them."""
        name = str(row["name"])
        self.only(row, {"name", "bytes", "parts"}, f"segment {name}")
        n_bytes = self.number(row["bytes"], f"bytes of segment {name}", plain.segment_bytes(name), 1 << 48)
        if n_bytes % ALIGN_BYTES:
            self.fail(f"segment {name} has {n_bytes:,} bytes, expected a multiple of {ALIGN_BYTES:,}")
        parts = [self.object(part, f"a part of {name}") for part in self.list(row["parts"], f"parts of {name}")]
        expected, end = plain.parts(name), 0
        for i, part in enumerate(parts):
            item = f"part {i} of segment {name}"
            if i < len(expected):
                self.only(part, {"kind", "projection", "offset", "bytes"}, item)
                e = expected[i]
                right = {"kind": e.kind, "projection": e.projection, "offset": e.offset, "bytes": e.n_bytes}
                # Comparing the types, too: JSON's true would pass for 1.
                if part != right or type(part["offset"]) is not int or type(part["bytes"]) is not int:
                    self.fail(f"{item} is {shown(part)}, expected {right}")
                end = e.offset + e.n_bytes
                continue
            self.skippable(part, f"{item}, kind {shown(part.get('kind'))},")
            offset = self.number(part.get("offset"), f"offset of {item}", end, n_bytes)
            end = offset + self.number(part.get("bytes"), f"bytes of {item}", 0, n_bytes - offset)
        if len(parts) < len(expected):
            self.fail(f"segment {name} has {len(parts)} parts, expected {len(expected)} for {', '.join(PROJECTIONS)}")
        return n_bytes

    def file(self, name: str, value: Any, expert_files: set[str]) -> FileFacts:
        facts = self.object(value, f"file {shown(name)}")
        if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
            self.fail(f"files names {shown(name)}, expected a plain name inside the container")
        n_bytes = self.number(facts.get("bytes"), f"bytes of {name}", 0, 1 << 52)
        if facts.get("optional") is True:
            return FileFacts(n_bytes, self.digest(facts, name) if "sha256" in facts else None, True)
        weights = name == DENSE or name in expert_files
        if not weights and name != CHECKSUMS and ("/" in name or name.endswith(".safetensors")):
            self.skippable(facts, f"file {name}")
        self.only(facts, {"bytes"} if weights else {"bytes", "sha256"}, f"file {name}")
        return FileFacts(n_bytes, None if weights else self.digest(facts, name))

    def digest(self, facts: dict[str, Any], name: str) -> str:
        value = facts["sha256"]
        if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
            self.fail(f"sha256 of {name} is {shown(value)}, expected 64 hexadecimal digits")
        return value

    def skippable(self, row: dict[str, Any], item: str) -> None:
        """What this version does not know may be skipped only if it says so."""
        if row.get("optional") is not True:
            self.fail(f"{item} is not known to this d2moe and not optional", "a newer d2moe made it, upgrade")

    def only(self, row: dict[str, Any], keys: set[str], item: str) -> None:
        if set(row) - {"optional"} != keys or row.get("optional", False) is not False:
            self.fail(f"{item} has the keys {shown(sorted(row))}, expected {', '.join(sorted(keys))}")

    def number(self, value: Any, item: str, least: int, most: int) -> int:
        if type(value) is not int or not least <= value <= most:
            self.fail(f"{item} is {shown(value)}, expected a whole number from {least:,} to {most:,}")
        return value

    def list(self, value: Any, item: str) -> list[Any]:
        if not isinstance(value, list):
            self.fail(f"{item} is {shown(value)}, expected a list")
        return value

    def object(self, value: Any, item: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.fail(f"{item} is {shown(value)}, expected an object")
        return value
