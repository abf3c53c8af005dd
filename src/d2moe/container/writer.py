"""Writes a container so that a kill at any moment costs one tensor or one expert, and nothing half done looks whole.

Everything goes to DST.partial/. Weight files get their final size and header first, then records in place; the journal
notes the CRCs of each finished piece. `finish` writes checksums and, last of all, the manifest, and renames the folder.
"""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from d2moe.container import manifest as facts_of
from d2moe.container.files import crc_of_range, read_small, refuse_write, shown, sync_folder, write_at
from d2moe.container.journal import NAME as JOURNAL
from d2moe.container.journal import Journal
from d2moe.container.layout import ARRAYS, SEGMENTS, RecordLayout, expert_file
from d2moe.container.manifest import CHECKSUMS, CONFIG, DENSE, MANIFEST, VERSION, FileFacts, Manifest
from d2moe.container.record import NestedMatrix, pack_record
from d2moe.container.safetensors_header import DTYPES, build_header
from d2moe.errors import CheckpointError, ContainerError, StorageError
from d2moe.types import BASE_BITS, MAX_BITS

U8 = npt.NDArray[np.uint8]

MAX_CARRIED_BYTES = 1 << 30
"""Largest file that is carried along from the source, such as tokenizer.json."""


@dataclass
class _File:
    """A weight file of known header and size; `fd` is -1 until it is written to."""

    name: str
    path: Path
    header: bytes
    n_bytes: int
    fd: int = -1


class ContainerWriter:
    """Creates the container `dst`, or resumes the unfinished one of the same facts; use `with`, then `finish`.

    `dense` gives type and shape of every dense tensor in file order, `files` the small files (content, or path of the
    original), `source` and `quantizer` whatever identifies the conversion: resuming under other facts is refused.
    `kept` are the bits that each expert's record is to have, by layer; those of a layer that is not named have all eight.
    Dense matrices have the planes that `dense` names.
    Leaving without `finish` keeps `dst`.partial for the next run. Raises StorageError (disk full, how much is missing)
    and ContainerError (dst exists, other facts). Only one writer at a time.
    """

    def __init__(
        self,
        dst: str | Path,
        *,
        record: RecordLayout,
        layers: Sequence[int],
        experts: int,
        dense: Mapping[str, tuple[str, tuple[int, ...]]],
        files: Mapping[str, bytes | Path],
        source: Mapping[str, Any],
        quantizer: Mapping[str, Any],
        kept: Mapping[int, Sequence[int]] | None = None,
    ):
        self.dst = Path(dst)
        self.partial = self.dst.with_name(self.dst.name + ".partial")
        self.record, self.layers, self.experts = record, tuple(layers), experts
        self._kept = {layer: tuple(int(bits) for bits in widths) for layer, widths in (kept or {}).items()}
        if all(bits == MAX_BITS for widths in self._kept.values() for bits in widths):
            self._kept = {}
        if not dense or not self.layers or CONFIG not in files or self.dst.suffix == ".partial":
            raise ContainerError(
                f"{self.dst}: needs {CONFIG}, dense tensors, experts, and a name not ending in .partial"
            )
        self._contents = {name: f if isinstance(f, bytes) else _carried(f) for name, f in files.items()}
        self._source, self._quantizer = dict(source), dict(quantizer)
        header, self._entries = build_header(dense)
        dense_bytes = sum(entry.n_bytes for entry in self._entries.values())
        self._dense = _File(DENSE, self.partial / DENSE, header, len(header) + dense_bytes)
        self._widths = {layer: self._kept.get(layer, (MAX_BITS,) * experts) for layer in self.layers}
        self._layers = {layer: self._expert_file(layer) for layer in self.layers}
        self._begun: dict[str, tuple[int, int]] = {}  # dense tensors under way: bytes written, CRC of them
        self._journal: Journal | None = None
        self._is_whole = False  # all but the last rename was done by an earlier run
        # Refuse now what no reader would open later.
        facts_of.parse_manifest(facts_of.dump_manifest(self._manifest(b"")), str(self.dst))
        self._open()

    def _expert_file(self, layer: int) -> _File:
        widths = self._widths[layer]
        header, name = build_header(self.record.tensors(layer, widths))[0], expert_file(layer)
        return _File(name, self.partial / name, header, len(header) + self.record.records_bytes(widths))

    def _offset(self, layer: int, expert: int) -> int:
        """Where a record begins in its file."""
        return len(self._layers[layer].header) + self.record.records_bytes(self._widths[layer][:expert])

    # Beginning and resuming

    def _open(self) -> None:
        if self.dst.exists() or self.dst.is_symlink():
            raise ContainerError(f"{self.dst}: is there already; delete it or give another name")
        if not self.dst.parent.is_dir():
            raise StorageError(f"{self.dst.parent}: no such folder to make {self.dst.name} in; create it first")
        names = sorted(p.name for p in self.partial.iterdir()) if self.partial.is_dir() else []
        if names and JOURNAL not in names:
            if self._is_complete():
                self._is_whole = True
                return
            raise ContainerError(
                f"{self.partial}: holds {shown(names)} but no journal, or was made from other facts;"
                " delete it or give another name"
            )
        self._check_room()
        try:
            self.partial.mkdir(exist_ok=True)
            # The journal comes first: a folder with anything else in it has a journal with its facts.
            self._journal = Journal(self.partial / JOURNAL, self._facts(), set(names) <= {JOURNAL})
            (self.partial / "experts").mkdir(exist_ok=True)
            self._recheck(self._journal)
        except OSError as e:
            self.close()
            refuse_write(e, self.partial, self.missing_bytes())
        except BaseException:
            self.close()
            raise

    def _facts(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "kept": {str(layer): list(widths) for layer, widths in self._kept.items()},
            "hidden": self.record.hidden,
            "inner": self.record.inner,
            "group": self.record.group,
            "layers": list(self.layers),
            "experts": self.experts,
            "source": self._source,
            "quantizer": self._quantizer,
            "files": {name: hashlib.sha256(data).hexdigest() for name, data in self._contents.items()},
            "dense": hashlib.sha256(self._dense.header).hexdigest(),
        }

    def _is_complete(self) -> bool:
        """Whether the folder has a manifest, and the very one that we would write: only the rename is missing."""
        try:
            expected = self._manifest((self.partial / CHECKSUMS).read_bytes())
            if (self.partial / MANIFEST).read_bytes() != facts_of.dump_manifest(expected):
                return False
            return all((self.partial / n).stat().st_size == f.n_bytes for n, f in expected.files.items())
        except OSError:
            return False

    def _recheck(self, journal: Journal) -> None:
        """Forget what the journal promises and the files do not hold; files that were synced are taken as they are."""
        for file in self._all_files():
            if not file.path.is_file() or file.path.stat().st_size != file.n_bytes:
                journal.forget(file.name, None if file is self._dense else self._layer_of(file))
            elif file.name not in journal.synced:
                fd = os.open(file.path, os.O_RDONLY | os.O_CLOEXEC)
                try:
                    self._recheck_file(journal, fd, file)
                finally:
                    os.close(fd)

    def _recheck_file(self, journal: Journal, fd: int, file: _File) -> None:
        if file is self._dense:
            for name, crc in list(journal.dense.items()):
                entry = self._entries[name]
                if crc_of_range(fd, entry.offset, entry.n_bytes, file.path) != crc:
                    del journal.dense[name]
            return
        layer = self._layer_of(file)
        done = journal.experts.get(layer, {})
        for expert, crcs in list(done.items()):
            at = self._offset(layer, expert)
            for segment, crc in zip(self.record.segments(self._widths[layer][expert]), crcs, strict=False):
                n_bytes = self.record.segment_bytes(segment)
                if crc_of_range(fd, at, n_bytes, file.path) != crc:
                    del done[expert]
                    break
                at += n_bytes

    def _all_files(self) -> list[_File]:
        return [self._dense, *self._layers.values()]

    def _layer_of(self, file: _File) -> int:
        return next(layer for layer, f in self._layers.items() if f is file)

    # What is done, what is missing

    @property
    def total_bytes(self) -> int:
        """Size of the whole container, checksums and manifest counted generously."""
        tables = 65536 + 4 * len(self._entries) + len(self.layers) * (1024 + 4 * len(SEGMENTS) * self.experts)
        return tables + sum(map(len, self._contents.values())) + sum(file.n_bytes for file in self._all_files())

    def missing_bytes(self) -> int:
        """Bytes of the container that have no place on the disk yet and need one."""
        taken = 0
        for file in self._all_files():
            if file.path.is_file():
                taken += min(file.path.stat().st_blocks * 512, file.n_bytes)
        return self.total_bytes - taken

    def _check_room(self) -> None:
        place = os.statvfs(self.partial if self.partial.is_dir() else self.dst.parent)
        free, missing = place.f_bavail * place.f_frsize, self.missing_bytes()
        if missing > free:
            raise StorageError(
                f"{self.dst}: needs {missing:,} more bytes, {self.dst.parent.absolute()} has {free:,} free;"
                f" make room for {missing - free:,} bytes more or write elsewhere"
            )

    def is_dense_done(self, name: str) -> bool:
        """Whether the whole tensor was written, by this run or an earlier one."""
        return self._is_whole or name in self._running().dense

    def is_nested_done(self, name: str) -> bool:
        """The same for all arrays of a dense matrix."""
        return all(self.is_dense_done(f"{name}.{kind}") for kind in ARRAYS if f"{name}.{kind}" in self._entries)

    def done_experts(self, layer: int) -> frozenset[int]:
        """Experts of `layer` that were written, by this run or an earlier one."""
        return frozenset(range(self.experts) if self._is_whole else self._running().experts.get(layer, {}))

    # Writing

    def add_dense(self, name: str, array: npt.NDArray[Any], first: int = 0) -> None:
        """Write rows `first`… of a dense tensor; a large one may come in pieces, ascending from row 0.

        The array must have the announced type, and the announced shape but for the number of rows in this piece.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise ContainerError(f"{self.dst}: dense tensor {shown(name)} was not announced to the writer")
        dtype = DTYPES[entry.dtype]
        fits = array.dtype == dtype and array.ndim == len(entry.shape) and array.shape[1:] == entry.shape[1:]
        if not fits or (array.ndim and not 0 <= first <= entry.shape[0] - array.shape[0]):
            raise ContainerError(
                f"{self.dst}: dense tensor {shown(name)} from row {first} is {array.dtype} {list(array.shape)},"
                f" announced was {dtype} {list(entry.shape)}"
            )
        begin = first * (entry.n_bytes // max(entry.shape[0], 1)) if entry.shape else 0
        done, crc = self._begun.get(name, (0, 0)) if begin else (0, 0)
        if begin != done:
            raise ContainerError(f"{self.dst}: dense tensor {shown(name)}: row {first} comes out of order")
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._write(self._dense, data, entry.offset + begin)
        done, crc = done + data.nbytes, zlib.crc32(data.data, crc)
        self._begun[name] = done, crc
        if done == entry.n_bytes:
            del self._begun[name]
            self._note({"dense": name, "crc": crc})
            if len(self._running().dense) == len(self._entries):
                self._sync(self._dense)

    def add_nested(self, name: str, matrix: NestedMatrix, first: int = 0) -> None:
        """Write tiles `first`… of a dense matrix, all announced bits of it; a large one may come in pieces, ascending."""
        bits = self.dense_width(name)
        if matrix.bits != bits:
            raise ContainerError(f"{self.dst}: dense matrix {shown(name)} has {matrix.bits} bits, expected {bits}")
        for kind, array in matrix.arrays.items():
            self.add_dense(f"{name}.{kind}", array, first)

    def dense_width(self, name: str) -> int:
        """Bits that were announced of a dense matrix."""
        return len([kind for kind in SEGMENTS if f"{name}.{kind}" in self._entries]) + BASE_BITS - 1

    def add_expert(self, layer: int, index: int, matrices: Mapping[str, NestedMatrix]) -> None:
        """Write the record of one expert from its "gate", "up" and "down", all kept bits of each."""
        self.add_record(layer, index, pack_record(self.record, matrices, self.width(layer, index)))

    def width(self, layer: int, index: int) -> int:
        """Bits that an expert's record is to have."""
        if layer not in self._layers or not 0 <= index < self.experts:
            raise ContainerError(f"{self.dst}: has no place for layer {layer} expert {index}")
        return self._widths[layer][index]

    def add_record(self, layer: int, index: int, record: U8) -> None:
        """Write a record uint8 [prefix_bytes(bits)] as `pack_record` makes it."""
        record = np.ascontiguousarray(record)
        expected = self.record.prefix_bytes(self.width(layer, index))
        if record.shape != (expected,) or record.dtype != np.uint8:
            raise ContainerError(
                f"{self.dst}: layer {layer} expert {index} is {record.dtype} {list(record.shape)},"
                f" a record is uint8 [{expected}]"
            )
        file, crcs, at = self._layers[layer], [], 0
        self._write(file, record, self._offset(layer, index))
        for segment in SEGMENTS:  # nothing has a CRC of 0
            n_bytes = self.record.segment_bytes(segment)
            crcs.append(zlib.crc32(record[at : at + n_bytes].data))
            at += n_bytes
        self._note({"layer": layer, "expert": index, "crc": crcs})
        if len(self.done_experts(layer)) == self.experts:
            self._sync(file)

    def _running(self) -> Journal:
        if self._journal is None:
            state = (
                "is whole but for its name; call finish" if self._is_whole else "the writer was closed; make another"
            )
            raise ContainerError(f"{self.dst}: {state}")
        return self._journal

    def _note(self, line: dict[str, Any]) -> None:
        journal = self._running()
        self._guarded(journal.path, lambda: journal.append(line))

    def _write(self, file: _File, data: U8, offset: int) -> None:
        if file.name in self._running().synced:  # no later run would check it again
            raise ContainerError(f"{file.path}: is finished already; ask done_experts and is_dense_done first")
        self._create(file)
        write_at(file.fd, data, offset, file.path, self.missing_bytes)

    def _create(self, file: _File) -> None:
        """Open a weight file if it is not, reserve its whole size on the disk, and write its header."""
        if file.fd < 0:
            self._guarded(file.path, lambda: self._reserve(file))

    def _reserve(self, file: _File) -> None:
        fd = os.open(file.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                os.posix_fallocate(fd, 0, file.n_bytes)
            except OSError as e:
                if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
            os.ftruncate(fd, file.n_bytes)
            write_at(fd, file.header, 0, file.path, self.missing_bytes)
        except BaseException:
            os.close(fd)
            raise
        file.fd = fd

    def _guarded(self, path: Path, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as e:
            refuse_write(e, path, self.missing_bytes())

    def _sync(self, file: _File) -> None:
        """Make a complete file durable, so that a resume need not read it again."""
        self._create(file)
        self._guarded(file.path, lambda: os.fsync(file.fd))
        os.close(file.fd)
        file.fd = -1
        self._note({"synced": file.name})

    # Finishing

    def finish(self) -> Path:
        """Write checksums and manifest, make all durable, give the folder its name; returns `dst`."""
        if not self._is_whole:
            self._refuse_gaps(self._running())
            self._guarded(self.partial, lambda: self._seal(self._running()))
            self.close()
            self._is_whole = True
        if self.dst.exists():
            raise ContainerError(f"{self.dst}: appeared while it was being written; move it away and run again")
        self._guarded(self.dst, lambda: self.partial.rename(self.dst))
        self._guarded(self.dst.parent, lambda: sync_folder(self.dst.parent))
        return self.dst

    def _refuse_gaps(self, journal: Journal) -> None:
        missing = [shown(name) for name in self._entries if name not in journal.dense]
        for layer in self.layers:
            absent = set(range(self.experts)) - self.done_experts(layer)
            missing += [f"layer {layer} expert {expert}" for expert in sorted(absent)]
        if missing:
            more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
            raise ContainerError(f"{self.partial}: cannot be finished, {', '.join(missing[:3])}{more} not written yet")

    def _seal(self, journal: Journal) -> None:
        for name, data in self._contents.items():
            self._put(name, data)
        for file in self._all_files():
            if file.name not in journal.synced:
                self._sync(file)
        checksums = self._checksums(journal)
        self._put(CHECKSUMS, checksums)
        sync_folder(self.partial / "experts")
        sync_folder(self.partial)
        self._put(MANIFEST, facts_of.dump_manifest(self._manifest(checksums)))
        sync_folder(self.partial)
        journal.path.unlink()
        sync_folder(self.partial)

    def _put(self, name: str, data: bytes) -> None:
        path = self.partial / name
        with path.open("wb", buffering=0) as f:
            write_at(f.fileno(), data, 0, path, self.missing_bytes)
            os.fsync(f.fileno())

    def _checksums(self, journal: Journal) -> bytes:
        tables = {
            "dense.header": np.array([zlib.crc32(self._dense.header)], np.uint32),
            "dense": np.array([journal.dense[name] for name in self._entries], np.uint32),
            "experts.header": np.array([zlib.crc32(f.header) for f in self._layers.values()], np.uint32),
        }
        for layer in self.layers:
            done = journal.experts[layer]
            tables[f"experts.{layer}"] = np.array([done[e] for e in range(self.experts)], np.uint32)
        header, _ = build_header({name: ("U32", table.shape) for name, table in tables.items()})
        return header + b"".join(table.tobytes() for table in tables.values())

    def _manifest(self, checksums: bytes) -> Manifest:
        small = self._contents | {CHECKSUMS: checksums}
        files = {name: FileFacts(len(data), hashlib.sha256(data).hexdigest()) for name, data in small.items()}
        files |= {file.name: FileFacts(file.n_bytes) for file in self._all_files()}
        return Manifest(self.record, self.layers, self.experts, files, self._source, self._quantizer, kept=self._kept)

    def close(self) -> None:
        """Leave; what is not finished stays in the .partial folder and can be resumed."""
        for file in self._all_files():
            if file.fd >= 0:
                os.close(file.fd)
                file.fd = -1
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def __enter__(self) -> ContainerWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _carried(path: Path) -> bytes:
    return read_small(path, MAX_CARRIED_BYTES, CheckpointError, "is the checkpoint complete? download it again")
