"""Tiny LLaVA-1.5, LLaVA-NeXT-Video and LLaVA-OneVision: a fixed square tower, a two-layer projector, a plain LM."""

from __future__ import annotations

from typing import Any

from mmaccel.tiny.families.family import Family, Item, Place, grid
from mmaccel.tiny.families.tokenizer import VOCABULARY, byte_tokenizer, special_ids

SPECIAL = ("<image>", "<video>")
IDS = special_ids(SPECIAL)
OPENING, CLOSING = ("user: ",), (" assistant:",)

CLIP_SIZE, CLIP_GRID = 24, 6
SIGLIP_SIZE, SIGLIP_GRID = 20, 5


def text_config(layers: int = 4) -> dict[str, Any]:
    """Give the settings that every tiny language model shares: 64 wide, 4 query heads on 2 key heads."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": IDS["<eos>"],
        "pad_token_id": IDS["<pad>"],
    }


def _tower(model_type: str, image_size: int) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": image_size,
        "patch_size": 4,
    }


def _llava_config() -> Any:
    from transformers import LlavaConfig

    return LlavaConfig(
        vision_config=_tower("clip_vision_model", CLIP_SIZE),
        text_config={"model_type": "llama", **text_config()},
        image_token_index=IDS["<image>"],
        image_seq_length=CLIP_GRID**2,
    )


def _llava_processor() -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor

    return LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": CLIP_SIZE}, crop_size={"height": CLIP_SIZE, "width": CLIP_SIZE}
        ),
        tokenizer=byte_tokenizer(SPECIAL),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _next_video_config() -> Any:
    from transformers import LlavaNextVideoConfig

    return LlavaNextVideoConfig(
        vision_config=_tower("clip_vision_model", CLIP_SIZE),
        text_config={"model_type": "llama", **text_config()},
        image_token_index=IDS["<image>"],
        video_token_index=IDS["<video>"],
        image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
        image_seq_length=CLIP_GRID**2,
        video_seq_length=(CLIP_GRID // 2) ** 2,
    )


def _next_video_processor() -> Any:
    from transformers import LlavaNextImageProcessor, LlavaNextVideoProcessor, LlavaNextVideoVideoProcessor

    square = {"height": CLIP_SIZE, "width": CLIP_SIZE}
    return LlavaNextVideoProcessor(
        video_processor=LlavaNextVideoVideoProcessor(size={"shortest_edge": CLIP_SIZE}, crop_size=square),
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": CLIP_SIZE},
            crop_size=square,
            image_grid_pinpoints=[[24, 48], [48, 24], [48, 48]],
        ),
        tokenizer=byte_tokenizer(SPECIAL),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def _onevision_config() -> Any:
    from transformers import LlavaOnevisionConfig

    return LlavaOnevisionConfig(
        vision_config=_tower("siglip_vision_model", SIGLIP_SIZE) | {"vision_use_head": False},
        text_config={"model_type": "qwen2", **text_config()},
        image_token_index=IDS["<image>"],
        video_token_index=IDS["<video>"],
        image_grid_pinpoints=[[20, 20], [20, 40], [40, 20], [40, 40]],
    )


def _onevision_processor() -> Any:
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    square = {"height": SIGLIP_SIZE, "width": SIGLIP_SIZE}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size=square, image_grid_pinpoints=[[20, 20], [20, 40], [40, 20], [40, 40]]
        ),
        tokenizer=byte_tokenizer(SPECIAL),
        video_processor=LlavaOnevisionVideoProcessor(size=square),
        num_image_tokens=SIGLIP_GRID**2,
        vision_feature_select_strategy="full",
    )


def _expand_llava(item: Item, _: list[Item]) -> list[Place | None]:
    return grid(item, 0, CLIP_GRID, CLIP_GRID)


def _expand_next_video(item: Item, _: list[Item]) -> list[Place | None]:
    if item.modality == "video":
        return [place for t in range(item.frames) for place in grid(item, t, CLIP_GRID // 2, CLIP_GRID // 2)]
    # 24 x 40 lies in the middle 10 of the 12 columns of a 24 x 48 canvas, 40 x 24 in the middle 10 of 12 rows.
    rows, columns = {(24, 40): (6, 10), (40, 24): (10, 6)}[item.height, item.width]
    return grid(item, 0, CLIP_GRID, CLIP_GRID) + grid(item, 1, rows, columns, newline=True)


def _expand_onevision(item: Item, prompt: list[Item]) -> list[Place | None]:
    end: list[Place | None] = [Place(item.modality, item.number, -1, -1, -1)]
    if item.modality == "video":
        pooled = -(-SIGLIP_GRID // 2)
        return [place for t in range(item.frames) for place in grid(item, t, pooled, pooled)] + end
    overview = grid(item, 0, SIGLIP_GRID, SIGLIP_GRID)
    if sum(other.modality == "image" for other in prompt) > 1:
        return overview + end
    # 20 x 32 lies in the middle 8 of the 10 columns of a 20 x 40 canvas.
    return overview + grid(item, 1, 5, 8, newline=True)


LLAVA = Family(
    name="llava",
    model_class="LlavaForConditionalGeneration",
    special=SPECIAL,
    config=_llava_config,
    processor=_llava_processor,
    expand=_expand_llava,
    visual_tokens={"image": "<image>"},
    marker={"image": "<image>"},
    opening=OPENING,
    closing=CLOSING,
    sizes={"image": ((24, 24), (24, 40))},
)

LLAVA_NEXT_VIDEO = Family(
    name="llava-next-video",
    model_class="LlavaNextVideoForConditionalGeneration",
    special=SPECIAL,
    config=_next_video_config,
    processor=_next_video_processor,
    expand=_expand_next_video,
    visual_tokens={"image": "<image>", "video": "<video>"},
    marker={"image": "<image>", "video": "<video>"},
    opening=OPENING,
    closing=CLOSING,
    sizes={"image": ((24, 40), (40, 24)), "video": ((24, 24), (24, 32))},
)

LLAVA_ONEVISION = Family(
    name="llava-onevision",
    model_class="LlavaOnevisionForConditionalGeneration",
    special=SPECIAL,
    config=_onevision_config,
    processor=_onevision_processor,
    expand=_expand_onevision,
    visual_tokens={"image": "<image>", "video": "<video>"},
    marker={"image": "<image>", "video": "<video>"},
    opening=OPENING,
    closing=CLOSING,
    sizes={"image": ((20, 32), (20, 20)), "video": ((20, 20), (20, 32))},
    nested_images=True,
)
