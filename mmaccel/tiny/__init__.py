"""The embedded models: real library classes with small configs, trained on worlds that the project renders itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

__all__ = [
    "CLASS_TO_IMAGE_FOLDER",
    "CLASS_TO_IMAGE_SCHEDULE",
    "IMAGE_CALL",
    "TEXT_TO_VIDEO_FOLDER",
    "VIDEO_CALL",
    "VIDEO_QA_FOLDER",
    "class_to_image",
    "text_to_video",
    "video_qa",
]

VIDEO_QA_FOLDER = Path(__file__).parent / "video_qa"
TEXT_TO_VIDEO_FOLDER = Path(__file__).parent / "text_to_video"
CLASS_TO_IMAGE_FOLDER = Path(__file__).parent / "class_to_image"
CLASS_TO_IMAGE_SCHEDULE = Path(__file__).parent / "schedules" / "class_to_image.safetensors"

VIDEO_CALL: dict[str, Any] = {
    "height": 64,
    "width": 64,
    "num_frames": 21,
    "num_inference_steps": 40,
    "guidance_scale": 3.0,
    "max_sequence_length": 24,
}
IMAGE_CALL: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 3.0}


def video_qa(
    dtype: torch.dtype | None = None,
) -> tuple[LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor]:
    """Load the embedded video-QA model, in eval mode with SDPA attention, and its processor.

    `dtype` defaults to `torch.float32`. Scores and limits: README.md in `VIDEO_QA_FOLDER`.
    """
    import torch
    from transformers import LlavaOnevisionForConditionalGeneration, LlavaOnevisionProcessor

    model = LlavaOnevisionForConditionalGeneration.from_pretrained(
        VIDEO_QA_FOLDER, dtype=torch.float32 if dtype is None else dtype, attn_implementation="sdpa"
    )
    return model.eval(), LlavaOnevisionProcessor.from_pretrained(VIDEO_QA_FOLDER)


def _pipeline(name: str, folder: Path, dtype: torch.dtype | None) -> Any:
    from mmaccel.errors import NotApplicableError

    if not (folder / "model_index.json").exists():
        raise NotApplicableError(
            f"no weights in {folder}; train them with `python -m mmaccel.tiny.train_{folder.name} --out {folder}"
            " --work SCRATCH`, or take mmaccel.tiny.pipelines.tiny_wan_pipeline() for random ones."
        )
    import diffusers
    import torch

    # diffusers exports its classes lazily, out of sight of a type checker.
    library: Any = diffusers
    pipe = getattr(library, name).from_pretrained(folder, torch_dtype=torch.float32 if dtype is None else dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_to_video(dtype: torch.dtype | None = None) -> Any:
    """Load the embedded text-to-video model, a `diffusers.WanPipeline`.

    `pipe("a red ring moves left , then a blue cross stays still", **VIDEO_CALL).frames` is [1, 21, 64, 64, 3]. `dtype`
    defaults to `torch.float32`. Prompts: `mmaccel.tiny.stories`; scores and limits: README.md in the folder.
    Raises `NotApplicableError` where the weights are not there.
    """
    return _pipeline("WanPipeline", TEXT_TO_VIDEO_FOLDER, dtype)


def class_to_image(dtype: torch.dtype | None = None) -> Any:
    """Load the embedded class-conditional image model, a `diffusers.DiTPipeline` of 24 classes (`pipe.labels`).

    `pipe(class_labels=pipe.get_label_ids(["red ring"]), **IMAGE_CALL).images` are 64 x 64 pixels. `dtype` defaults to
    `torch.float32`. Scores and limits: README.md in the folder. Raises `NotApplicableError` where the weights are not
    there.
    """
    return _pipeline("DiTPipeline", CLASS_TO_IMAGE_FOLDER, dtype)
