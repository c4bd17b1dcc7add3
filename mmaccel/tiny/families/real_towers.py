"""Vision encoders at their published sizes with random weights, and clips to run them on."""

from __future__ import annotations

from typing import Any

import torch

from mmaccel.errors import NotApplicableError
from mmaccel.tiny.families.weights import build_random

__all__ = ["CLIPS", "TOWERS", "build_tower", "tower_clip"]

# google/siglip-so400m-patch14-384 and openai/clip-vit-large-patch14-336; timm's own definition of the third
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "siglip-so400m-384": ("Siglip", {
        "hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27,
        "image_size": 384, "patch_size": 14, "vision_use_head": False,
    }),
    "clip-large-336": ("CLIP", {
        "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24,
        "image_size": 336, "patch_size": 14,
    }),
}  # fmt: skip
_TIMM = {"vit-base-384": ("vit_base_patch16_384", 12, 384)}
TOWERS = (*_CONFIGS, *_TIMM)
CLIPS = ("still", "pan", "cuts")


def build_tower(name: str, layers: int | None = None, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The vision encoder `name` of `TOWERS`, with its first `layers` layers.

    Raises:
        NotApplicableError: an unknown name, or a depth that it does not have.
    """
    depth = _CONFIGS[name][1]["num_hidden_layers"] if name in _CONFIGS else _TIMM.get(name, ("", 0, 0))[1]
    if not 1 <= (layers or depth) <= depth:
        raise NotApplicableError(f"towers are {', '.join(TOWERS)}; {name} has {depth} layers, {layers} were asked for.")
    if name in _TIMM:
        import timm

        torch.manual_seed(seed)
        return timm.create_model(_TIMM[name][0], depth=layers or depth, num_classes=0).to(dtype).eval()
    import transformers

    family, values = _CONFIGS[name]
    config = getattr(transformers, f"{family}VisionConfig")(**values | {"num_hidden_layers": layers or depth})
    return build_random(getattr(transformers, f"{family}VisionModel"), config, seed=seed, dtype=dtype)


def tower_clip(kind: str, name: str, frames: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Frames [frames, 3, S, S] of about unit variance at the size of the tower `name`.

    "still": a picture of smooth shapes from a camera that stands, with the noise of a sensor (1 %) and a square of a
    sixth of each side that crosses it. "pan": a view that moves by 6 pixels a frame over a larger picture. "cuts":
    every frame another picture.

    Raises:
        NotApplicableError: an unknown kind or tower.
    """
    if kind not in CLIPS or name not in TOWERS:
        raise NotApplicableError(f"clips are {', '.join(CLIPS)} and towers {', '.join(TOWERS)}, not {kind}, {name}.")
    size = _CONFIGS[name][1]["image_size"] if name in _CONFIGS else _TIMM[name][2]
    generator = torch.Generator().manual_seed(seed)

    def picture(side: int) -> torch.Tensor:
        rough = torch.randn(1, 3, side // 24 + 1, side // 24 + 1, generator=generator)
        return torch.nn.functional.interpolate(rough, size=(side, side), mode="bicubic", align_corners=False)[0]

    if kind == "cuts":
        clip = [picture(size) for _ in range(frames)]
    elif kind == "pan":
        wide = picture(size + 6 * frames)
        clip = [wide[:, :size, 6 * t : 6 * t + size] for t in range(frames)]
    else:
        base, side = picture(size), size // 6
        clip = []
        for t in range(frames):
            frame = base.clone()
            left = (t * side // 2) % (size - side)
            frame[:, size // 2 : size // 2 + side, left : left + side] = 1.5
            clip.append(frame)
    noise = 0.01 if kind == "still" else 0.0
    found = torch.stack(clip)
    return (found + noise * torch.randn(found.shape, generator=generator)).to(dtype)
