"""The file format: one directory with dense weights, expert records, checksums and a manifest (docs/format.md)."""

from d2moe.container.bit_router import BitRouter, read_router, write_router
from d2moe.container.layout import PROJECTIONS, SEGMENTS, MatrixLayout, RecordLayout
from d2moe.container.manifest import Manifest
from d2moe.container.reader import Container
from d2moe.container.record import NestedMatrix, pack_record, split_record
from d2moe.container.writer import ContainerWriter

__all__ = [
    "PROJECTIONS",
    "SEGMENTS",
    "BitRouter",
    "Container",
    "ContainerWriter",
    "Manifest",
    "MatrixLayout",
    "NestedMatrix",
    "RecordLayout",
    "pack_record",
    "read_router",
    "split_record",
    "write_router",
]
