"""Tiny InternVL: a square tower, pixel shuffle, every frame of a video behind its own line of text."""

from __future__ import annotations

from typing import Any

from mmaccel.tiny.families.family import Family, Item, Place, grid
from mmaccel.tiny.families.llava import text_config
from mmaccel.tiny.families.tokenizer import byte_tokenizer, special_ids

SPECIAL = ("<img>", "</img>", "<IMG_CONTEXT>", "<video>")
IDS = special_ids(SPECIAL)
TILE, GRID = 24, 3


def _config() -> Any:
    from transformers import InternVLConfig

    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": [TILE, TILE],
        "patch_size": [4, 4],
    }
    return InternVLConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", **text_config()},
        image_token_id=IDS["<IMG_CONTEXT>"],
        image_seq_length=GRID**2,
        tie_word_embeddings=False,
    )


def _processor() -> Any:
    from transformers import GotOcr2ImageProcessor, InternVLProcessor, InternVLVideoProcessor

    size = {"height": TILE, "width": TILE}
    tokenizer = byte_tokenizer(
        SPECIAL,
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, max_patches=2),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=GRID**2,
    )


def _expand(item: Item, _: list[Item]) -> list[Place | None]:
    if item.modality == "image":
        # 24 x 44 and 44 x 24 are cut into two tiles; the overview comes third.
        return [None, *(place for tile in range(3) for place in grid(item, tile, GRID, GRID)), None]
    places: list[Place | None] = []
    for t in range(item.frames):
        lead = f"Frame{t + 1}: " if t == 0 else f"\nFrame{t + 1}: "
        places += [None] * len(lead) + [None, *grid(item, t, GRID, GRID), None]
    return places


INTERNVL = Family(
    name="internvl",
    model_class="InternVLForConditionalGeneration",
    special=SPECIAL,
    config=_config,
    processor=_processor,
    expand=_expand,
    visual_tokens={"image": "<IMG_CONTEXT>", "video": "<IMG_CONTEXT>"},
    marker={"image": "<IMG_CONTEXT>", "video": "<video>"},
    opening=("user: ",),
    closing=(" assistant:",),
    sizes={"image": ((24, 44), (44, 24)), "video": ((24, 24), (24, 32))},
)
