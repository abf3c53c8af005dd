"""The journal of an unfinished container: what has been written, line by line, each line with its own CRC.

First line: the facts of the conversion. Then one line for each finished tensor or record with the CRCs of its bytes,
and one for each file that is complete and on the disk for good, or was lost and is begun again. A line cut by a kill
or a power loss ends the journal.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import zlib
from pathlib import Path
from typing import Any

from d2moe.errors import ContainerError, StorageError

NAME = "journal"


class Journal:
    """Opened (and locked) by one writer; `dense`, `experts` and `synced` say what earlier runs finished."""

    def __init__(self, path: Path, facts: dict[str, Any], is_fresh: bool):
        self.path = path
        self.dense: dict[str, int] = {}
        self.experts: dict[int, dict[int, list[int]]] = {}
        self.synced: set[str] = set()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND, 0o644)
        try:
            self._begin(facts, is_fresh)
        except BaseException:
            os.close(self._fd)
            raise

    def _begin(self, facts: dict[str, Any], is_fresh: bool) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"{self.path.parent}: another conversion is writing it; wait for that one") from None
        except OSError:
            pass  # a file system without locks: two writers at once are then the user's own doing
        lines, good_bytes = self._read()
        if not lines and not is_fresh:
            raise ContainerError(
                f"{self.path}: is damaged, so nothing can be resumed; delete {self.path.parent} and convert again"
            )
        os.ftruncate(self._fd, good_bytes)
        facts = json.loads(json.dumps(facts))
        if not lines:
            self.append({"facts": facts})
            self.sync()
        elif (where := difference(lines[0].get("facts"), facts)) is not None:
            raise ContainerError(
                f"{self.path.parent}: was begun with other facts: {where};"
                " give the source and options of then, or delete that folder to start again"
            )
        for line in lines[1:]:
            self._take(line)

    def _read(self) -> tuple[list[dict[str, Any]], int]:
        """The lines up to the first that is not whole, and how many bytes they take."""
        data = self.path.read_bytes()
        lines, at = [], 0
        while (end := data.find(b"\n", at)) >= 0:
            crc, _, text = data[at:end].partition(b" ")
            if crc != b"%08x" % zlib.crc32(text):
                break
            lines.append(json.loads(text))
            at = end + 1
        return lines, at

    def _take(self, line: dict[str, Any]) -> None:
        if "dense" in line:
            self.dense[line["dense"]] = line["crc"]
        elif "expert" in line:
            self.experts.setdefault(line["layer"], {})[line["expert"]] = line["crc"]
        elif "synced" in line:
            self.synced.add(line["synced"])
        else:
            self.synced.discard(line["forgotten"])
            if line["layer"] is None:
                self.dense.clear()
            else:
                self.experts.pop(line["layer"], None)

    def append(self, line: dict[str, Any]) -> None:
        """Add one line; it survives the death of this process at once, and a power loss after `sync`."""
        text = json.dumps(line, separators=(",", ":")).encode()
        data = b"%08x %s\n" % (zlib.crc32(text), text)
        written = os.write(self._fd, data)
        if written != len(data):  # part of a line: a full disk; the part must not hide what comes after a resume
            os.ftruncate(self._fd, os.fstat(self._fd).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if "facts" not in line:
            self._take(line)

    def forget(self, file: str, layer: int | None) -> None:
        """Take nothing of `file` as done: the experts of `layer`, or the dense tensors if that is None."""
        done: object = self.dense if layer is None else self.experts.get(layer)
        if done or file in self.synced:
            self.append({"forgotten": file, "layer": layer})

    def sync(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def difference(before: Any, now: Any, name: str = "") -> str | None:
    """The first place where two JSON values differ, in words; None if they are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in (*now, *(k for k in before if k not in now)):
            inner = f"{name}.{key}" if name else str(key)
            if (found := difference(before.get(key), now.get(key), inner)) is not None:
                return found
        return None
    return None if before == now else f"{name or 'facts'} was {short(before)}, now it is {short(now)}"


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
