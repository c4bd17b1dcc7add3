"""What a video holds, as one hash: over all of its bytes, but read only once as long as the file rests."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import BinaryIO

__all__ = ["ContentHashes", "State", "digest", "file_state", "readable_again"]

State = tuple[int, int, int, int, int]

_CHUNK = 4 << 20
_SETTLED = 2.0  # seconds


def digest(data: bytes | bytearray | memoryview) -> str:
    """blake2b over all bytes, 64 hex digits."""
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def file_state(name: Any) -> State | None:
    """(device, inode, size, mtime, ctime in nanoseconds) of a regular file, None for all else."""
    try:
        facts = os.stat(name)  # noqa: PTH116
    except (OSError, TypeError, ValueError):
        return None
    if not stat.S_ISREG(facts.st_mode):
        return None
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def readable_again(src: Any) -> Any:
    """A source that can be read any number of times: the bytes of a pipe, everything else as it is.

    What cannot be read at all is left for `load_video` to say what is wrong with it.
    """
    if not hasattr(src, "read") or getattr(src, "closed", False) or (hasattr(src, "seekable") and src.seekable()):
        return src
    try:
        data = src.read()
    except OSError:
        return src
    return data if isinstance(data, bytes) else src


class ContentHashes:
    """Hashes of videos; those of files at rest are kept in `folder`, one small file for each path.

    `write(path, data)` puts a file into the folder whole.
    """

    def __init__(self, folder: Path, write: Callable[[Path, bytes], object]) -> None:
        self.folder, self._write = folder, write

    def of(self, src: Any) -> tuple[str | None, State | None]:
        """Give the hash of what a source holds, with the suffix of its name, and for a path the state of the file.

        The hash is None for what one hash cannot stand for: URLs, what is no regular file, text files (playlists, whose
        content is elsewhere), and what is no readable source at all, of which `load_video` says what is wrong.
        """
        if isinstance(src, (bytes, bytearray, memoryview)):
            return (None if _is_text(bytes(src[:4096])) else digest(src)), None
        if hasattr(src, "read"):
            try:
                if getattr(src, "closed", False) or not isinstance(src.read(0), bytes):
                    return None, None
                src.seek(0)
                return _hash(src, str(getattr(src, "name", ""))), None
            except OSError:
                return None, None
        if not isinstance(src, (str, os.PathLike)):
            return None, None
        name = os.fsdecode(src)
        seen = file_state(name)
        if seen is None or "://" in name or name.startswith("file:"):
            return None, seen
        note = self.folder / f"{digest(os.fsencode(os.path.realpath(name)))}.json"
        known = _remembered(note, seen)
        if known is not None:
            return known, seen
        try:
            with Path(name).open("rb") as file:
                content = _hash(file, name)
        except OSError:
            return None, seen
        # Two writes within one tick of the clock have the same times: what is that young may yet change unseen.
        if content is not None and seen == file_state(name) and time.time() - max(seen[-2:]) / 1e9 > _SETTLED:
            self._write(note, json.dumps({"seen": seen, "content": content}).encode())
        return content, seen


def _hash(file: BinaryIO, name: str) -> str | None:
    total = hashlib.blake2b(digest_size=32)
    first = True
    while chunk := file.read(_CHUNK):
        if first and _is_text(chunk[:4096]):
            return None
        first = False
        total.update(chunk)
    return total.hexdigest() + Path(name).suffix.lower()


def _is_text(head: bytes) -> bool:
    """Whether a file begins as text does: FFmpeg reads playlists from such files, the frames are in others."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return b"\0" not in head and len(head) > 0


def _remembered(note: Path, seen: State) -> str | None:
    try:
        known = json.loads(note.read_bytes())
        if known["seen"] == list(seen):
            os.utime(note)
            return str(known["content"])
    # Not there, removed meanwhile, or damaged: it is hashed again, and the note written anew.
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None
