"""What a streaming session is given, frames and questions, as the model's own processor would prepare them."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from mmaccel.errors import StreamError

__all__ = ["Feeder", "Item", "Picture", "picture_of", "seconds_of"]

_QUESTION = "{question}"


class Picture(NamedTuple):
    """A frame: uint8 [3, H, W]; its time in seconds if it has one of its own; whether the stream was cut before it."""

    pixels: torch.Tensor
    time: float | None
    cut: bool


@dataclass(frozen=True, eq=False)
class Item:
    """A group of frames prepared: token ids, which of them are placeholders, and the encoder's arguments."""

    ids: torch.Tensor
    placeholders: torch.Tensor
    arguments: dict[str, torch.Tensor]


def picture_of(frame: Any) -> Picture:
    """A frame as it was given: uint8 [3, H, W] tensor, uint8 [H, W, 3] array, PIL image, or `LiveFrame`.

    Raises:
        StreamError: it is none of these.
    """
    if hasattr(frame, "pts") and hasattr(frame, "frame"):
        return Picture(_checked(frame.frame), float(frame.pts), bool(frame.discontinuity))
    if hasattr(frame, "convert") and hasattr(frame, "getbands"):
        import numpy as np

        frame = np.array(frame.convert("RGB"))
    if type(frame).__module__ == "numpy" and hasattr(frame, "ndim"):
        if frame.ndim != 3 or frame.shape[-1] != 3:
            raise StreamError(f"an array of shape {frame.shape} is no frame; give uint8 [H, W, 3], RGB.")
        frame = torch.from_numpy(frame.copy()).permute(2, 0, 1)
    return Picture(_checked(frame), None, False)


def _checked(pixels: Any) -> torch.Tensor:
    if not isinstance(pixels, torch.Tensor):
        raise StreamError(
            f"a {type(pixels).__name__} is no frame; give a uint8 tensor [3, H, W], an array [H, W, 3], a PIL image or "
            "a frame of open_stream."
        )
    if pixels.dtype != torch.uint8:
        raise StreamError(f"frames are uint8 RGB from 0 to 255, not {str(pixels.dtype).removeprefix('torch.')}.")
    if pixels.dim() != 3 or pixels.shape[0] != 3 or 0 in pixels.shape:
        raise StreamError(f"a tensor of shape {list(pixels.shape)} is no frame; give uint8 [3, H, W], RGB.")
    return pixels


def seconds_of(time: Any) -> float:
    """A time as a float.

    Raises:
        StreamError: it is no finite number.
    """
    try:
        value = float(time)
    except (TypeError, ValueError, OverflowError) as error:
        raise StreamError(f"time must be a number of seconds, not {time!r}.") from error
    if not math.isfinite(value):
        raise StreamError(f"time must be a finite number of seconds, not {time!r}.")
    return value


class Feeder:
    """A processor, used for a video that comes frame by frame.

    prompt: the whole prompt with the processor's video token and "{question}" in it; by default the chat template
    makes it of one user turn with a video and a question.

    Raises:
        StreamError: the processor takes no video or is that of another model, or no prompt can be made.
    """

    def __init__(self, site: Any, processor: Any, prompt: str | None) -> None:
        if getattr(processor, "video_processor", None) is None or not getattr(processor, "video_token", None):
            raise StreamError(
                f"{type(processor).__name__} prepares no videos; pass the model's own processor, with its video part."
            )
        self._processor, self._prompt = processor, prompt
        self._root, self._method = site.root, site.encoders["video"]
        self._names = set(inspect.signature(getattr(type(site.root), self._method)).parameters)
        self._token = processor.tokenizer.convert_tokens_to_ids(processor.video_token)
        if self._token != site.config.video_token_id:
            raise StreamError(f"this {type(processor).__name__} does not belong to this {site.family}.")
        self.before, _ = self._pieces("?")

    def question(self, question: str) -> list[int]:
        """Token ids of what comes behind the video.

        Raises:
            StreamError: the question is empty, or changes what comes before the video.
        """
        if not isinstance(question, str) or not question.strip():
            raise StreamError("the question is empty.")
        before, after = self._pieces(question)
        if before != self.before:
            raise StreamError("this prompt puts the question before the video, which has been read already.")
        return after

    def item(self, frames: list[Picture], times: list[float]) -> Item:
        """One group of frames as the processor prepares a video of just these.

        Raises:
            StreamError: the processor cannot.
        """
        from transformers.video_utils import VideoMetadata

        # at one frame a second, the index of a frame is its time
        metadata: Any = VideoMetadata(total_num_frames=len(times), fps=1.0, frames_indices=list[Any](times))
        try:
            out = self._processor(
                text=[self._processor.video_token],
                videos=[torch.stack([frame.pixels for frame in frames])],
                video_metadata=[metadata],
                do_sample_frames=False,
                add_special_tokens=False,
                return_tensors="pt",
            )
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
            raise StreamError(f"the processor cannot prepare this frame: {error}") from error
        weight = next(self._root.parameters())
        arguments = {name: self._placed(out[name], weight) for name in out if name in self._names}
        ids = out["input_ids"][0].to(weight.device)
        return Item(ids, ids == self._token, arguments)

    @staticmethod
    def _placed(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)

    def encode(self, arguments: dict[str, torch.Tensor]) -> Any:
        """What the model's own video encoder makes of it.

        Raises:
            StreamError: it cannot take pictures of this size.
        """
        try:
            return getattr(self._root, self._method)(**arguments, return_dict=True)
        except (ValueError, RuntimeError) as error:
            if self._fits(arguments):
                raise
            raise StreamError(
                f"this {type(self._processor).__name__} makes pictures that the encoder cannot take ({error}); "
                "pass the model's own processor."
            ) from error

    def _fits(self, arguments: dict[str, torch.Tensor]) -> bool:
        """Whether pictures are of the size that the encoder's config states, as far as it states one."""
        pixels, vision = arguments.get("pixel_values_videos"), self._root.config.vision_config
        if pixels is None:
            return True
        if pixels.dim() == 2:
            sizes = (getattr(vision, name, None) for name in ("in_channels", "temporal_patch_size", "patch_size"))
            channels, frames, side = (size if isinstance(size, int) else 0 for size in sizes)
            return not channels * frames * side or pixels.shape[-1] == channels * frames * side**2
        side = getattr(vision, "image_size", None)
        return not isinstance(side, int) or tuple(pixels.shape[-2:]) == (side, side)

    def _pieces(self, question: str) -> tuple[list[int], list[int]]:
        processor = self._processor
        if self._prompt is not None:
            text = self._prompt.replace(_QUESTION, question)
            if _QUESTION not in self._prompt:
                raise StreamError(f"prompt= needs {_QUESTION} where the question goes.")
        else:
            content = [{"type": "video"}, {"type": "text", "text": question}]
            try:
                text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
            except (ValueError, TypeError, KeyError) as error:
                raise StreamError(
                    f"the processor has no chat template that takes a video ({error}); pass prompt=, with "
                    f"{processor.video_token} and {_QUESTION} in it."
                ) from error
        ids = processor.tokenizer(text)["input_ids"]
        times = ids.count(self._token)
        if times != 1:
            raise StreamError(f"a prompt holds {processor.video_token} once, and this one holds it {times} times.")
        at = ids.index(self._token)
        return ids[:at], ids[at + 1 :]

    def text(self, ids: list[int]) -> str:
        """An answer as text."""
        return self._processor.tokenizer.decode(ids, skip_special_tokens=True).strip()
