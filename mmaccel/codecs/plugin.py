"""Lets the processors of transformers decode video files through mmaccel's reader."""

from __future__ import annotations

import functools
import re
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mmaccel.codecs.reader import load_chosen
from mmaccel.errors import ConflictError, NotApplicableError, VideoError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    import torch
    from transformers.video_utils import VideoMetadata

    from mmaccel.codecs.sampling import Facts
    from mmaccel.codecs.source import VideoSource

__all__ = ["read_video", "register", "registered", "unregister"]

_NAME = "mmaccel"
_YOUTUBE = re.compile(r"\w+://(www\.)?youtube\.com(/|$)")
_MISSING: Any = object()


def register() -> None:
    """Make every video processor of transformers decode files and URLs through `load_video`, until `unregister()`.

    After it, `processor.apply_chat_template([{"role": "user", "content": [{"type": "video", "path": "a.mp4"}, ...]}],
    tokenize=True, return_dict=True, num_frames=8)` and `processor(text=..., videos=["a.mp4"])` need no torchcodec; the
    processor chooses the frames by its own rule from the exact frame count and rate, frames and VideoMetadata come from
    `read_video`. Frames that are decoded already, lists of image files and YouTube links are handled as before.
    `transformers.video_utils.load_video(path, backend="mmaccel")` works too.

    This replaces two things in transformers for the whole process: the entry "mmaccel" of
    `video_utils.VIDEO_DECODERS`, and the method `fetch_videos` of the class that all video processors inherit it from.
    It is the one place where mmaccel patches a class of a library, because processors ask nothing else which decoder
    to use; it happens only in this call, and `unregister()` puts the very objects back that were there. A processor
    class with a `fetch_videos` of its own keeps it. Calling it again changes nothing. Safe with threads; a process that
    is started afresh (spawn) must call it for itself.

    Raises NotApplicableError for a version of transformers in which these two are not found.
    """
    with _lock:
        _state.put_on()
        _state.asked = True


def unregister() -> None:
    """Undo `register()`: exactly the objects that were there before come back. Without a `register()`, does nothing.

    Inside `with registered():` it takes effect when the last block ends.

    Raises ConflictError, and changes nothing, if somebody else has replaced what `register()` put in since: that must
    be taken off first.
    """
    with _lock:
        _state.finish(asked=False, blocks=_state.blocks)


@contextmanager
def registered() -> Iterator[None]:
    """As `register()`, for the length of a with-block; blocks may be nested and may overlap in several threads."""
    with _lock:
        _state.put_on()
        _state.blocks += 1
    try:
        yield
    finally:
        with _lock:
            _state.finish(asked=_state.asked, blocks=_state.blocks - 1)


def read_video(
    video: VideoSource, sample_indices_fn: Callable[..., Any] | None = None, **kwargs: Any
) -> tuple[torch.Tensor, VideoMetadata]:
    """Decode one video as a decoder of transformers does: the entry "mmaccel" of VIDEO_DECODERS.

    video: what `load_video` takes. sample_indices_fn(metadata=VideoMetadata, **kwargs) gives the frame numbers to
    decode; None takes every frame. Returns the frames, uint8 [N, 3, H, W] in RGB, and their VideoMetadata: the exact
    count of frames, the mean rate, height and width in pixels of the upright video, duration in seconds, and
    frames_indices, an int64 array [N]. Its `timestamps` are frame number by mean rate, as everywhere in transformers;
    where the frame rate varies, `load_video(...).pts` has the true times.

    Raises VideoError as `load_video` does; errors of sample_indices_fn pass through.
    """
    from transformers.video_utils import VideoMetadata

    metadata = VideoMetadata(total_num_frames=0, video_backend=_NAME)

    def choose(facts: Facts) -> Iterable[int]:
        metadata.total_num_frames, metadata.fps, metadata.duration, metadata.height, metadata.width = facts
        return range(facts.total) if sample_indices_fn is None else sample_indices_fn(metadata=metadata, **kwargs)

    found = load_chosen(video, choose)
    # An array and no list: the processor of Qwen3-VL lengthens a list in place to fill up its last patch.
    metadata.frames_indices = found.indices.numpy()  # type: ignore[assignment]
    return found.frames, metadata


def _fetch(processor: Any, videos: Any, sample_indices_fn: Callable[..., Any] | None = None) -> Any:
    """What takes the place of `fetch_videos`: (frames, metadata) of one video, [all frames, all metadata] of a list."""
    from transformers import video_utils

    if isinstance(videos, list) and not video_utils.is_valid_video(videos):
        parts = [processor.fetch_videos(video, sample_indices_fn=sample_indices_fn) for video in videos]
        return list(zip(*parts, strict=True))
    if isinstance(videos, str) and _YOUTUBE.match(videos):
        return video_utils.load_video(videos, backend=_NAME, sample_indices_fn=sample_indices_fn)  # type: ignore[arg-type]
    if video_utils.is_valid_video(videos):
        return _as_given(videos)
    return read_video(cast("VideoSource", videos), sample_indices_fn)


def _as_given(frames: Any) -> tuple[Any, VideoMetadata]:
    """Hand on an array that came in one list with files; the processor takes all of them for [T, C, H, W]."""
    from transformers.video_utils import VideoMetadata

    if isinstance(frames, (list, tuple)) or frames.shape[1] not in (1, 3):
        raise VideoError(
            "frames in one list with video files must be an array [T, 3, H, W]; stack them so, or pass the file"
            " through mmaccel.load_video and give arrays only"
        )
    count, _, height, width = frames.shape
    numbers: Any = np.arange(count)
    return frames, VideoMetadata(total_num_frames=count, height=height, width=width, frames_indices=numbers)


class _State:
    """Who wants the plug-in on, and what it has replaced: (container, name, what was there, what is there now)."""

    def __init__(self) -> None:
        self.asked = False
        self.blocks = 0
        self.replaced: list[tuple[dict[str, Any] | type, str, Any, Any]] = []

    def put_on(self) -> None:
        """Put the plug-in on if it is off."""
        if self.replaced:
            return
        for container, name, new in self._slots():
            old = _get(container, name)
            _set(container, name, new)
            self.replaced.append((container, name, old, new))

    def finish(self, *, asked: bool, blocks: int) -> None:
        """Note who still wants it, and take it off if that is nobody; ConflictError leaves all as it was."""
        if not asked and not blocks:
            for container, name, old, new in self.replaced:
                if _get(container, name) not in (old, new):
                    self.asked, self.blocks = True, blocks
                    raise ConflictError(
                        f"{name!r} of transformers was replaced after mmaccel.codecs.register(); take that off, then"
                        " call mmaccel.codecs.unregister() again"
                    )
            while self.replaced:
                container, name, old, _ = self.replaced.pop()
                _set(container, name, old)
        self.asked, self.blocks = asked, blocks

    @staticmethod
    def _slots() -> list[tuple[dict[str, Any] | type, str, Any]]:
        import transformers
        from transformers import video_processing_utils, video_utils

        base = getattr(video_processing_utils, "BaseVideoProcessor", object)
        home = next((cls for cls in base.__mro__ if "fetch_videos" in vars(cls)), None)
        decoders = getattr(video_utils, "VIDEO_DECODERS", None)
        if home is None or not isinstance(decoders, dict):
            raise NotApplicableError(
                f"transformers {transformers.__version__} has no VIDEO_DECODERS or no fetch_videos to plug into;"
                " decode with mmaccel.load_video and pass the frames, or install transformers 5.10 to 5.24"
            )

        @functools.wraps(vars(home)["fetch_videos"])
        def fetch_videos(self: Any, video_url_or_urls: Any, sample_indices_fn: Callable[..., Any] | None = None) -> Any:
            return _fetch(self, video_url_or_urls, sample_indices_fn)

        return [(decoders, _NAME, read_video), (home, "fetch_videos", fetch_videos)]


def _get(container: dict[str, Any] | type, name: str) -> Any:
    return (container if isinstance(container, dict) else vars(container)).get(name, _MISSING)


def _set(container: dict[str, Any] | type, name: str, value: Any) -> None:
    if not isinstance(container, dict):
        setattr(container, name, value)
    elif value is _MISSING:
        container.pop(name, None)
    else:
        container[name] = value


_lock = threading.RLock()
_state = _State()
