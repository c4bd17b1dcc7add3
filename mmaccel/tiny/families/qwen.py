"""Tiny Qwen2-VL, Qwen2.5-VL and Qwen3-VL: any picture size, two frames to a group, M-RoPE.

Qwen2.5-VL has windows of 2 x 2 tokens on a grid of 3 x 5 (so some windows are cut off), with full attention in blocks 1
and 3 of 5. Qwen3-VL feeds features of vision blocks 0 and 2 into its first two decoder layers (deep stack).
"""

from __future__ import annotations

from typing import Any

from mmaccel.tiny.families.family import Family, Item, Place, grid
from mmaccel.tiny.families.llava import text_config
from mmaccel.tiny.families.tokenizer import byte_tokenizer, special_ids

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
IDS = special_ids(SPECIAL)
PATCH, MERGE, GROUP = 4, 2, 2
PIXELS = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
VIDEO_PIXELS = {"shortest_edge": 16 * 16, "longest_edge": 16 * 64 * 64}
FPS = 1.0


def _ids() -> dict[str, Any]:
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    return {name: IDS[f"<|{token}|>"] for name, token in names.items()}


def _text(section: list[int], **more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section} | more.pop("rope", {})
    return text_config() | {"rope_parameters": rope, **more}


def _vision(depth: int, **more: Any) -> dict[str, Any]:
    shared = {"num_heads": 2, "patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": GROUP}
    return {"depth": depth, **shared, **more}


def _qwen2_config() -> Any:
    from transformers import Qwen2VLConfig

    vision = _vision(4, embed_dim=32, hidden_size=64, mlp_ratio=2)
    return Qwen2VLConfig(vision_config=vision, text_config=_text([2, 3, 3]), **_ids())


def _qwen2_5_config() -> Any:
    from transformers import Qwen2_5_VLConfig

    vision = _vision(
        5,
        hidden_size=32,
        intermediate_size=48,
        out_hidden_size=64,
        window_size=16,
        fullatt_block_indexes=[1, 3],
        tokens_per_second=2,
    )
    return Qwen2_5_VLConfig(vision_config=vision, text_config=_text([2, 3, 3]), **_ids())


def _qwen3_config() -> Any:
    from transformers import Qwen3VLConfig

    vision = _vision(
        4,
        hidden_size=32,
        intermediate_size=48,
        out_hidden_size=64,
        num_position_embeddings=36,
        deepstack_visual_indexes=[0, 2],
    )
    text = _text([3, 3, 2], head_dim=16, rope={"mrope_interleaved": True})
    return Qwen3VLConfig(vision_config=vision, text_config=text, **_ids())


def _processor(processor: str, video_processor: str) -> Any:
    import transformers

    patches: dict[str, Any] = {"patch_size": PATCH, "temporal_patch_size": GROUP, "merge_size": MERGE}
    image = transformers.Qwen2VLImageProcessor(size=PIXELS, **patches)
    video = getattr(transformers, video_processor)(
        size=VIDEO_PIXELS, do_sample_frames=False, cap_pixels_per_frame=False, **patches
    )
    return getattr(transformers, processor)(
        image_processor=image, tokenizer=byte_tokenizer(SPECIAL), video_processor=video
    )


def _metadata(items: list[Item]) -> dict[str, Any]:
    from transformers.video_utils import VideoMetadata

    videos = [item for item in items if item.modality == "video"]
    return {
        "video_metadata": [
            VideoMetadata(total_num_frames=video.frames, fps=FPS, frames_indices=list(range(video.frames)))
            for video in videos
        ]
    }


def _groups(item: Item) -> list[list[Place | None]]:
    rows, columns = item.height // (PATCH * MERGE), item.width // (PATCH * MERGE)
    return [grid(item, t, rows, columns) for t in range(max(1, item.frames // GROUP))]


def _expand(item: Item, _: list[Item]) -> list[Place | None]:
    return [place for group in _groups(item) for place in group]


def _expand_qwen3(item: Item, prompt: list[Item]) -> list[Place | None]:
    if item.modality == "image":
        return _expand(item, prompt)
    places: list[Place | None] = []
    for t, group in enumerate(_groups(item)):
        # Frames 2t and 2t + 1, one second apart: the time written before the group is their mean.
        stamp = f"<{2 * t + 0.5:.1f} seconds>"
        places += [None] * len(stamp) + [None, *group, None]
    return places


def _family(name: str, model_class: str, config: Any, processor: Any, expand: Any, arguments: Any) -> Family:
    return Family(
        name=name,
        model_class=model_class,
        special=SPECIAL,
        config=config,
        processor=processor,
        expand=expand,
        visual_tokens={"image": "<|image_pad|>", "video": "<|video_pad|>"},
        marker={"image": "<|image_pad|>", "video": "<|video_pad|>"},
        opening=("<|im_start|>", "user\n"),
        closing=("<|im_end|>", "\n", "<|im_start|>", "assistant\n"),
        before=("<|vision_start|>",),
        after=("<|vision_end|>",),
        sizes={"image": ((24, 40), (40, 24)), "video": ((24, 40), (32, 24))},
        frames=(8, 4),
        arguments=arguments,
    )


QWEN2_VL = _family(
    "qwen2-vl",
    "Qwen2VLForConditionalGeneration",
    _qwen2_config,
    lambda: _processor("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
    _expand,
    _metadata,
)
QWEN2_5_VL = _family(
    "qwen2.5-vl",
    "Qwen2_5_VLForConditionalGeneration",
    _qwen2_5_config,
    lambda: _processor("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    _expand,
    _metadata,
)
QWEN3_VL = _family(
    "qwen3-vl",
    "Qwen3VLForConditionalGeneration",
    _qwen3_config,
    lambda: _processor("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
    _expand_qwen3,
    _metadata,
)
