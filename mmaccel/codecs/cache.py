"""A folder of sampled frames that were decoded before, keyed by what the video holds and what was asked of it."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
import platform
import threading
import time
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import torch
from safetensors import SafetensorError

import mmaccel
from mmaccel.codecs.content import ContentHashes, digest, file_state, readable_again
from mmaccel.codecs.entry import DamagedEntryError, read_entry, write_entry
from mmaccel.codecs.reader import load_video
from mmaccel.codecs.sampling import as_numbers
from mmaccel.codecs.source import Source
from mmaccel.codecs.video import Video, VideoWarning
from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmaccel.codecs.source import VideoSource

__all__ = ["CacheStats", "CacheWarning", "FrameCache"]

# How a request is carried out, not what it gives.
_NO_MATTER = ("src", "cache", "threads")
_ABANDONED = 3600.0  # seconds


class CacheWarning(UserWarning):
    """The frames are right, but the cache is not in order: a file in it was damaged, or could not be written."""


@dataclass(frozen=True)
class CacheStats:
    """What a frame cache holds and has done.

    entries: how many requests the folder holds. size: bytes in the folder. limit: most bytes. Of this object's calls:
    hits: answered from the folder. misses: decoded and, if there is room, kept. bypassed: not to be cached. damaged:
    entries that were found broken. evicted: files removed for room.
    """

    entries: int
    size: int
    limit: int
    hits: int
    misses: int
    bypassed: int
    damaged: int
    evicted: int


class FrameCache:
    """Frames of `load_video` kept on disk: the same request for the same content is decoded once.

    `cache.load(src, ...)` takes what `load_video(src, ...)` takes and gives what it gives, bit for bit. An entry is
    found by three things: the content of the video, blake2b over all of its bytes, and the suffix of its name, which
    FFmpeg heeds; the request as it was made (a list, a range and an array of the same numbers are one, frames=2 and
    indices=[0, 59] are two; threads do not count); and what decodes: the code of `mmaccel.codecs`, the versions of
    mmaccel, torch, PyAV and FFmpeg's libraries, and the kind of CPU. So a changed video, another container or an
    upgrade never gets old frames.

    The hash of a file is remembered under its path with device, inode, size, mtime and ctime, so that the next time
    costs one stat; only a file that has rested for two seconds is. The limit of this: where a file system keeps no
    ctime (some network file systems, FAT), a file that was rewritten in place, with its old size and its old mtime put
    back, is not noticed.

    Not cached, but decoded each time: URLs (`file:` too), what is no regular file, text files (playlists, whose content
    is elsewhere), a file that changes meanwhile, and a result larger than the limit. A failure is never kept. Records
    of work, as `decoded`, are on a hit those of the call that decoded. A damaged video warns on a hit too.

    folder: made if missing; threads, processes and other caches may share it. limit_bytes: most bytes in it; after each
    new entry the files that were longest unused go until it holds. Entries are written beside and moved into place
    whole. Each has a checksum over its content; one that does not agree is decoded again, with a CacheWarning. Frames
    of a hit are mapped from the file, not copied; writing to them changes that copy alone.

    Raises VideoError for a folder that cannot be written to, and a limit below 1.
    """

    def __init__(self, folder: str | os.PathLike[str], limit_bytes: int = 10 << 30) -> None:
        if isinstance(limit_bytes, bool) or not isinstance(limit_bytes, int) or limit_bytes < 1:
            raise VideoError(f"limit_bytes must be a whole number of at least 1, not {limit_bytes!r}")
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self._entries, self._parts = self.folder / "entries", self.folder / "parts"
        self._hashes = ContentHashes(self.folder / "hashes", lambda path, data: self._place(path, _writer(data)))
        self._lock = threading.Lock()
        self._counts: dict[str, int] = dict.fromkeys(("hits", "misses", "bypassed", "damaged", "evicted"), 0)
        try:
            for folder in (self._entries, self._hashes.folder, self._parts):
                folder.mkdir(parents=True, exist_ok=True)
                trial = folder / f"{uuid.uuid4().hex}.part"
                trial.touch()
                trial.unlink()
        except OSError as error:
            raise VideoError(
                f"the cache folder {self.folder} cannot be written to ({error.strerror}); choose another"
            ) from error

    def load(self, src: VideoSource, *args: Any, **request: Any) -> Video:
        """Give what `load_video(src, ...)` gives, from the folder if it was asked before; VideoError as there."""
        call = inspect.signature(load_video).bind(src, *args, **request)
        call.arguments.pop("cache", None)
        if call.arguments.get("indices") is not None:
            call.arguments["indices"] = as_numbers(call.arguments["indices"])
        call.arguments["src"] = src = readable_again(src)
        content, seen = self._hashes.of(src)
        if content is None:
            video = load_video(*call.args, **call.kwargs)
            self._count("bypassed")
            return video
        wanted = inspect.BoundArguments(call.signature, call.arguments.copy())
        wanted.apply_defaults()
        wish = {name: _plain(value) for name, value in wanted.arguments.items() if name not in _NO_MATTER}
        key = digest(json.dumps([content, wish, _decoder()], sort_keys=True).encode())
        path = self._entries / f"{key}.safetensors"
        kept = self._read(path, wanted.arguments.get("device"))
        if kept is not None:
            self._count("hits")
            _warn_of_damage(Source(src).name, kept)
            return kept
        video = load_video(*call.args, **call.kwargs)
        self._count("misses")
        if seen == (None if seen is None else file_state(src)):
            self._keep(path, video)
        return video

    def clear(self) -> None:
        """Remove every entry and every remembered hash; the folder stays."""
        for _, _, path in self._files():
            path.unlink(missing_ok=True)

    def stats(self) -> CacheStats:
        """Count what the folder holds, and what this object has done."""
        files = self._files()
        with self._lock:
            counts = dict(self._counts)
        entries = sum(path.parent == self._entries for _, _, path in files)
        return CacheStats(entries, sum(size for _, size, _ in files), self.limit_bytes, **counts)

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def _read(self, path: Path, device: Any) -> Video | None:
        try:
            video = read_entry(path, device)
            os.utime(path)
        except FileNotFoundError:
            return None  # never written, or removed for room this moment
        except DamagedEntryError as error:
            self._count("damaged")
            path.unlink(missing_ok=True)
            warnings.warn(f"{error}; the video is decoded again", CacheWarning, stacklevel=3)
            return None
        return video

    def _keep(self, path: Path, video: Video) -> None:
        if video.frames.nbytes > self.limit_bytes:
            return
        self._place(path, lambda part: write_entry(part, video))
        files = self._files()
        over = sum(size for _, size, _ in files) - self.limit_bytes
        for _, size, old in files:
            if over <= 0:
                break
            old.unlink(missing_ok=True)
            over -= size
            self._count("evicted")

    def _place(self, path: Path, write: Callable[[Path], object]) -> None:
        """Have a file written beside and move it into place whole; a full disk is a warning, the frames are there."""
        part = self._parts / f"{uuid.uuid4().hex}.part"
        try:
            write(part)
            part.replace(path)
        except (OSError, SafetensorError) as error:
            warnings.warn(f"{path} could not be written ({error})", CacheWarning, stacklevel=4)
        finally:
            part.unlink(missing_ok=True)

    def _files(self) -> list[tuple[int, int, Path]]:
        """(time of the last use, bytes, path) of all files, the longest unused first. What the dead left is removed."""
        for part in self._parts.glob("*.part"):
            facts = _stat(part)
            if facts is not None and time.time() - facts.st_mtime > _ABANDONED:
                part.unlink(missing_ok=True)
        paths = (*self._entries.glob("*.safetensors"), *self._hashes.folder.glob("*.json"))
        known = [(path, facts) for path in paths if (facts := _stat(path)) is not None]
        return sorted((facts.st_mtime_ns, facts.st_size, path) for path, facts in known)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None  # another process was faster


def _writer(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def _plain(value: Any) -> Any:
    """The value of a knob as JSON holds it, the same for all forms of the same value."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.device, torch.dtype)):
        return str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple, range)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    raise VideoError(f"a request with {value!r} cannot be cached; call load_video without a cache for it")


@functools.cache
def _decoder() -> list[str]:
    """What else the pixels depend on: our code, the libraries, and the CPU that libswscale picks its loops for."""
    code = hashlib.blake2b(digest_size=32)
    here = Path(__file__).parent
    for file in sorted((*here.rglob("*.py"), *here.parent.joinpath("kernels", "nv12_to_rgb").glob("*.py"))):
        code.update(file.read_bytes())
    versions = [mmaccel.__version__, torch.__version__, av.__version__, str(sorted(av.library_versions.items()))]
    return [code.hexdigest(), *versions, platform.machine(), torch.backends.cpu.get_cpu_capability()]


def _warn_of_damage(name: str, video: Video) -> None:
    if not video.lost:
        return
    instead = f"; {len(video.replaced)} of the wanted ones show a neighbour instead" if video.replaced else ""
    warnings.warn(f"{name}: {video.lost} frames are lost, damaged or cut off{instead}", VideoWarning, stacklevel=3)
