"""The files of the codec benchmarks: rendered, encoded once, made longer by repeating groups of pictures, kept."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import av
import numpy as np
from av.error import FFmpegError
from av.video.frame import VideoFrame
from PIL import Image

from mmaccel.codecs.priority import kept_priority
from mmaccel.errors import MMAccelError
from mmaccel.measure.codec_marks import BITS, draw_number, numbers_in

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from av.packet import Packet
    from av.video.stream import VideoStream

__all__ = ["RATE", "Clip", "Recipe", "make_clip"]

RATE = 30
# Raised with every change of what is rendered, so that old files are not taken for new ones.
_VERSION = 1
# Bits a second at 1080 rows; other sizes go with the pixels to the power of 3/4, as streaming services do it.
_BIT_RATE = {"h264": 5_000_000, "hevc": 3_000_000, "av1": 2_500_000}
_ENCODER = {"h264": "libx264", "hevc": "libx265", "av1": "libsvtav1"}
# SVT's presets from 10 on lose flat blocks that change from frame to frame, such as those of the numbers.
_PRESET = {"h264": "veryfast", "hevc": "ultrafast", "av1": "8"}
_B_FRAMES = 3


@dataclass(frozen=True)
class Recipe:
    """What is encoded: `made` seconds in `codec` ("h264", "hevc", "av1"), `rows` pixels high, 16:9.

    gop: frames from one keyframe to the next, 0 for a single keyframe at the start. H.264 and HEVC have 3 B-frames in a
    row, one of them a reference; AV1 has the pyramid of its encoder. Groups are closed.
    """

    codec: str
    rows: int
    gop: int
    made: int

    def __post_init__(self) -> None:
        if self.codec not in _ENCODER:
            raise MMAccelError(f"no clips are made in {self.codec!r}; codecs are {', '.join(_ENCODER)}.")
        if self.rows < 64 or self.rows % 2:
            raise MMAccelError(f"a clip has at least 64 rows, and an even number of them, not {self.rows}.")
        if not 1 <= self.made * RATE <= 1 << BITS:
            raise MMAccelError(f"between 1 and {(1 << BITS) // RATE} seconds can be rendered, not {self.made}.")
        if self.gop < 0:
            raise MMAccelError(f"gop is a number of frames, or 0 for one keyframe, not {self.gop}.")

    @property
    def columns(self) -> int:
        """Pixels a row."""
        return 2 * round(self.rows * 8 / 9)

    @property
    def bit_rate(self) -> int:
        """Bits a second that the encoder is to reach on average."""
        return round(_BIT_RATE[self.codec] * (self.rows * self.columns / (1080 * 1920)) ** 0.75)

    @property
    def name(self) -> str:
        """A file name without suffix that tells recipes apart."""
        facts = json.dumps([_VERSION, RATE, _PRESET[self.codec], _options(self), asdict(self), self.bit_rate])
        digest = hashlib.sha256(facts.encode()).hexdigest()[:8]
        return f"{self.codec}-{self.rows}p-gop{self.gop or 'one'}-{digest}"


@dataclass(frozen=True)
class Clip:
    """A file, and for each of its frames the number that is drawn into it: `numbers`, int64 [total]."""

    path: Path
    recipe: Recipe
    numbers: np.ndarray

    @property
    def total(self) -> int:
        """How many frames the file has."""
        return len(self.numbers)


def make_clip(folder: Path, recipe: Recipe, seconds: int, shuffle: int | None = None) -> Clip:
    """The file of a recipe, repeated until it lasts `seconds`, from `folder` if it is there, else made and put there.

    A repetition is the same packets at later times, so drawn numbers start again. `shuffle` is a seed that puts the
    groups of pictures into another order: clips that differ for the price of one.

    Raises:
        MMAccelError: this FFmpeg lacks the encoder, the encoder loses the numbers, the folder cannot be written, or
            `seconds` is no multiple of what is rendered.
    """
    if seconds < recipe.made or seconds % recipe.made:
        raise MMAccelError(f"a clip of {recipe.made} s can be repeated up to a multiple of that, not to {seconds} s.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        base = folder / f"{recipe.name}-{recipe.made}s.mp4"
        if not base.exists():
            _whole(base, lambda part: _encode(part, recipe))
        lengths = _lengths(base)
        order = list(range(len(lengths)))
        if shuffle is not None:
            order = np.random.default_rng(shuffle).permutation(order).tolist()
        order *= seconds // recipe.made
        path = base
        if order != list(range(len(lengths))):
            kind = f"{seconds}s" if shuffle is None else f"{seconds}s-order{shuffle}"
            path = folder / f"{recipe.name}-{kind}.mp4"
            if not path.exists():
                _whole(path, lambda part: _repeat(base, part, order))
    except OSError as error:
        raise MMAccelError(
            f"the clips cannot be kept in {folder} ({error.strerror or error}); choose another folder with the option "
            "clips."
        ) from error
    starts = np.cumsum([0, *lengths[:-1]])
    numbers = np.concatenate([np.arange(starts[group], starts[group] + lengths[group]) for group in order])
    return Clip(path, recipe, numbers)


def _whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write under another name first: a file that is there is complete."""
    part = path.with_name(f"{path.stem}.{os.getpid()}.part.mp4")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _options(recipe: Recipe) -> dict[str, str]:
    gop = recipe.gop or 1 << BITS
    if recipe.codec == "av1":
        return {"preset": _PRESET["av1"], "g": str(gop), "svtav1-params": "scd=0"}
    settings = f"keyint={gop}:min-keyint={gop}:scenecut=0:open-gop=0:bframes={_B_FRAMES}"
    if recipe.codec == "h264":
        return {"preset": _PRESET["h264"], "x264-params": f"{settings}:b-pyramid=normal"}
    return {"preset": _PRESET["hevc"], "x265-params": f"{settings}:b-pyramid=1:log-level=none"}


def _encode(path: Path, recipe: Recipe) -> None:
    # The encoder writes a banner to the terminal otherwise.
    os.environ.setdefault("SVT_LOG", "0")
    scene = _Scene(recipe.rows, recipe.columns)
    try:
        with kept_priority(), av.open(str(path), "w") as container:
            stream = cast(
                "VideoStream", container.add_stream(_ENCODER[recipe.codec], rate=RATE, options=_options(recipe))
            )
            stream.width, stream.height, stream.pix_fmt = recipe.columns, recipe.rows, "yuv420p"
            stream.bit_rate = recipe.bit_rate
            for number in range(recipe.made * RATE):
                frame = VideoFrame.from_ndarray(scene.picture(number), format="yuv420p")
                frame.pts, frame.time_base = number, Fraction(1, RATE)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        found = _drawn(path)
    except FFmpegError as error:
        raise MMAccelError(
            f"this FFmpeg cannot encode {recipe.codec} with {_ENCODER[recipe.codec]} ({error}); leave such cells out "
            "with the option only."
        ) from error
    if found != list(range(recipe.made * RATE)):
        raise MMAccelError(
            f"{_ENCODER[recipe.codec]} has spoilt the numbers in the pictures of {recipe.name}; try another number of "
            "rows, or leave such cells out with the option only."
        )


def _drawn(path: Path) -> list[int]:
    """The numbers in all frames of a file, decoded from its start to its end."""
    with av.open(str(path)) as container:
        frames = container.decode(video=0)
        return [numbers_in(frame.reformat(320, 180, "rgb24").to_ndarray()[None])[0] for frame in frames]


class _Scene:
    """Textures at three scales under a moving camera, four objects that move on their own, and the grain of a film."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.random = np.random.default_rng(0)
        # Room for the camera to move in.
        height, width = rows + rows // 4, columns + columns // 4
        scales = ((rows // 4, 0.5), (rows // 16, 0.3), (max(2, rows // 120), 0.2))
        mixed = sum(weight * self._texture(height, width, scale) for scale, weight in scales)
        self.luma = np.clip(40 + 0.65 * cast("np.ndarray", mixed), 20, 220).astype(np.uint8)
        self.chroma = [
            (96 + 0.25 * self._texture(height // 2, width // 2, rows // 16)).astype(np.uint8) for _ in range(2)
        ]
        self.grain = self.random.integers(0, 6, (8, rows, columns), dtype=np.uint8)

    def _texture(self, height: int, width: int, scale: int) -> np.ndarray:
        coarse = self.random.integers(0, 256, (height // scale + 2, width // scale + 2), dtype=np.uint8)
        return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)

    def picture(self, number: int) -> np.ndarray:
        """The frame as planar 4:2:0, uint8 [1.5 H, W]."""
        rows, columns = self.rows, self.columns
        down = 2 * int(rows / 16 * (1 + np.sin(number / 50)))
        right = 2 * int(columns / 16 * (1 + np.cos(number / 70)))
        out = np.empty((rows * 3 // 2, columns), dtype=np.uint8)
        luma = out[:rows]
        np.add(self.luma[down : down + rows, right : right + columns], self.grain[number * 5 % 8], out=luma)
        side = rows // 5
        for place in range(4):
            x = int((columns - side) * (0.5 + 0.5 * np.sin(number / (25 + 9 * place) + place)))
            y = int((rows - side) * (0.6 + 0.35 * np.cos(number / (31 + 7 * place) + 2 * place)))
            luma[y : y + side, x : x + side] = self.luma[place * 7 : place * 7 + side, place * 11 : place * 11 + side]
        draw_number(luma, number)
        quarter = rows // 4
        for place, plane in enumerate(self.chroma):
            crop = plane[down // 2 : down // 2 + rows // 2, right // 2 : right // 2 + columns // 2].copy()
            # Grey under the number, whatever the colour matrix.
            crop[: rows // 16 + 1] = 128
            out[rows + place * quarter : rows + (place + 1) * quarter] = crop.reshape(quarter, columns)
        return out


@lru_cache(maxsize=64)
def _lengths(path: Path) -> tuple[int, ...]:
    """How many frames each group of pictures of a file has."""
    with av.open(str(path)) as container:
        return tuple(len(group) for group in _groups([packet for packet in container.demux(video=0) if packet.size]))


def _groups(packets: Sequence[Packet]) -> list[list[Packet]]:
    groups: list[list[Packet]] = []
    for packet in packets:
        if packet.is_keyframe:
            groups.append([])
        groups[-1].append(packet)
    ends = [max(packet.pts or 0 for packet in group) for group in groups]
    starts = [min(packet.pts or 0 for packet in group) for group in groups]
    if any(start <= end for end, start in zip(ends, starts[1:], strict=False)):
        raise MMAccelError("the encoder made open groups of pictures, which cannot be repeated.")
    return groups


def _repeat(source: Path, path: Path, order: Sequence[int]) -> None:
    with av.open(str(source)) as container, av.open(str(path), "w") as target:
        stream = container.streams.video[0]
        copy = target.add_stream_from_template(stream, opaque=True)
        groups = _groups([packet for packet in container.demux(stream) if packet.size])
        starts = [min(packet.pts or 0 for packet in group) for group in groups]
        tick = stream.time_base or Fraction(1, RATE)
        spans = [round(len(group) / (RATE * tick)) for group in groups]
        held = [[(bytes(packet), packet) for packet in group] for group in groups]
        now = 0
        for number in order:
            for data, packet in held[number]:
                moved = av.Packet(data)
                moved.pts = (packet.pts or 0) - starts[number] + now
                moved.dts = (packet.dts or 0) - starts[number] + now
                moved.time_base, moved.duration = tick, packet.duration
                moved.is_keyframe, moved.stream = packet.is_keyframe, copy
                target.mux(moved)
            now += spans[number]
