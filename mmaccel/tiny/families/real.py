"""Published configs with random weights, for measuring speed where no weights can be had.

The values are those of the public config files of llava-hf/llava-onevision-qwen2-{0.5b,7b}-ov-hf and
Qwen/Qwen2.5-VL-{3B,7B}-Instruct. Seen in those files: all numbers of both Qwen2.5-VL models, and of the 7B OneVision
its language model, vocabulary and tower. Of the 0.5B OneVision the language model is the one of the public
Qwen2-0.5B config; its padded vocabulary of 152000 is from memory. The tower is SigLIP-so400m-patch14-384 with 26 of its
27 layers, which is how these checkpoints were converted: their last layer was never used.
Timings on such models are real, answers are noise; any figure from them has to say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mmaccel.errors import NotApplicableError
from mmaccel.tiny.families.weights import build_random

PROMPT_BEFORE, PROMPT_AFTER = 14, 22
SCENE = 8


@dataclass(frozen=True)
class Real:
    """One published model: its class, and the numbers that differ between the sizes of its family.

    `text` are the fields of the language model's config; `layers` and `vision_layers` the full depths.
    """

    name: str
    model_class: str
    text: dict[str, Any]
    vision_layers: int
    tied: bool

    @property
    def layers(self) -> int:
        """The depth of the full language model."""
        return self.text["num_hidden_layers"]

    def config(self, layers: int | None = None, vision_layers: int | None = None) -> Any:
        """Make the config, shortened to `layers` decoder and `vision_layers` encoder layers if given."""
        for word, wanted, full in (
            ("layers", layers, self.layers),
            ("vision_layers", vision_layers, self.vision_layers),
        ):
            if wanted is not None and not 1 <= wanted <= full:
                raise NotApplicableError(f"{self.name} has {full} {word}; ask for 1 to {full}, not {wanted}.")
        text = self.text | {"num_hidden_layers": layers or self.layers}
        make = _onevision if self.model_class.startswith("LlavaOnevision") else _qwen2_5
        return make(text, vision_layers or self.vision_layers, self.tied)


def _onevision(text: dict[str, Any], depth: int, tied: bool) -> Any:
    from transformers import LlavaOnevisionConfig

    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": depth,
        "image_size": 384,
        "patch_size": 14,
        "vision_use_head": False,
    }
    return LlavaOnevisionConfig(
        vision_config=vision, text_config={"model_type": "qwen2", **text}, tie_word_embeddings=tied
    )


def _qwen2_5(text: dict[str, Any], depth: int, tied: bool) -> Any:
    from transformers import Qwen2_5_VLConfig

    vision = {
        "depth": depth,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "window_size": 112,
        # A tower too short for block 7 keeps one full-attention block, its last: there the scores are read.
        "fullatt_block_indexes": [index for index in (7, 15, 23, 31) if index < depth] or [depth - 1],
        "out_hidden_size": text["hidden_size"],
        "tokens_per_second": 2,
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return Qwen2_5_VLConfig(
        vision_config=vision, text_config=text | {"rope_parameters": rope}, tie_word_embeddings=tied
    )


def _text(
    width: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, length: int
) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": length,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    }


ONEVISION, QWEN = "LlavaOnevisionForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"
REAL: dict[str, Real] = {
    real.name: real
    for real in (
        Real("llava-onevision-0.5b", ONEVISION, _text(896, 4864, 24, 14, 2, 152000, 32768), 26, True),
        Real("llava-onevision-7b", ONEVISION, _text(3584, 18944, 28, 28, 4, 152128, 32768), 26, False),
        Real("qwen2.5-vl-3b", QWEN, _text(2048, 11008, 36, 16, 2, 151936, 128000), 32, True),
        Real("qwen2.5-vl-7b", QWEN, _text(3584, 18944, 28, 28, 4, 152064, 128000), 32, False),
    )
}


def build_real(
    name: str,
    layers: int | None = None,
    vision_layers: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Any:
    """Build the model `name` of `REAL` at its published size, with random weights, directly in `dtype` on `device`.

    `layers` and `vision_layers` keep that many decoder and encoder layers, for small machines. Raises
    `NotApplicableError` for an unknown name or a depth that the model does not have.
    """
    import transformers

    real = _real(name)
    config = real.config(layers, vision_layers)
    model_class = getattr(transformers, real.model_class)
    return build_random(model_class, config, seed=seed, dtype=dtype, device=device)


def real_inputs(
    name: str,
    frames: int = 32,
    size: tuple[int, int] | None = None,
    *,
    batch: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, torch.Tensor]:
    """Make one video question for the model `name`: a prompt, `frames` frames, a question, without a tokenizer.

    LLaVA-OneVision takes 384 x 384 pixels and gives 196 tokens a frame and one at the end. Qwen2.5-VL takes any `size`
    (height, width) in multiples of 28, 252 x 448 by default, and an even number of frames; two frames give
    `height * width / 784` tokens. Every `batch` row has the same length. Frames stay alike within scenes of 8.
    """
    real = _real(name)
    generator = torch.Generator().manual_seed(seed)
    if frames < 1:
        raise NotApplicableError(f"a video needs at least one frame, not {frames}.")
    if real.model_class == ONEVISION:
        if size not in (None, (384, 384)):
            raise NotApplicableError(f"{name} takes 384 x 384 pixels only, not {size}.")
        video = _scenes(batch, frames, 3 * 384 * 384, generator, dtype).view(batch, frames, 3, 384, 384)
        given = {"pixel_values_videos": video}
        start, marker, count, end = [], 151647, frames * 196 + 1, []
    else:
        height, width = size or (252, 448)
        if height % 28 or width % 28 or frames % 2:
            raise NotApplicableError(
                f"{name} takes an even number of frames in multiples of 28 pixels, not {frames} of {height} x {width}."
            )
        grid = torch.tensor([[frames // 2, height // 14, width // 14]])
        patches = _scenes(batch, frames // 2, 3 * 2 * height * width, generator, dtype)
        given = {
            "pixel_values_videos": patches.view(-1, 3 * 2 * 14 * 14),
            "video_grid_thw": grid.repeat(batch, 1),
            "second_per_grid_ts": torch.ones(batch),
        }
        start, marker, count, end = [151652], 151656, int(grid.prod()) // 4, [151653]
    words = torch.randint(0, 150000, (batch, PROMPT_BEFORE + PROMPT_AFTER), generator=generator)
    visual = torch.tensor([start + [marker] * count + end]).expand(batch, -1)
    ids = torch.cat([words[:, :PROMPT_BEFORE], visual, words[:, PROMPT_BEFORE:]], dim=1)
    if real.model_class == QWEN:
        given["mm_token_type_ids"] = 2 * (ids == marker).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **given}


def _real(name: str) -> Real:
    if name not in REAL:
        raise NotApplicableError(f"no real config {name!r}; use one of: {', '.join(REAL)}.")
    return REAL[name]


def _scenes(batch: int, steps: int, numbers: int, generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    scenes = torch.randn(batch, -(-steps // SCENE), numbers, generator=generator)
    noise = torch.randn(numbers, generator=generator)
    rows = [scenes[:, step // SCENE] + 0.1 * noise.roll(step) for step in range(steps)]
    return torch.stack(rows, dim=1).to(dtype)
