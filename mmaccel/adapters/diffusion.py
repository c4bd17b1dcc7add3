"""Diffusion transformers of diffusers, alone or in a pipeline: where their blocks are and how tokens lie."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mmaccel.errors import AdapterError

__all__ = ["Diffusion", "Layout", "fits"]


def _classes(*names: str) -> tuple[type, ...]:
    # an object of diffusers cannot exist before diffusers is imported, so nothing is imported here to ask
    diffusers = sys.modules.get("diffusers")
    return tuple(getattr(diffusers, name) for name in names) if diffusers is not None else ()


def fits(model: Any) -> bool:
    """Whether `model` is a pipeline or a model of diffusers."""
    return isinstance(model, _classes("DiffusionPipeline", "ModelMixin"))


@dataclass(frozen=True)
class Layout:
    """How a family of transformers treats the tokens of a latent.

    blocks: its block lists, in order. attention: names of a block's self-attentions, which see every token. text:
    where the prompt's tokens stand among the keys of these, if they are there. rotary: names that a block's argument
    with a pair of rotary tables may have; rotary_dim: their token axis; rotary_text: whether they begin with rows for
    the prompt. times: the block's argument that may hold one time embedding a token. output: which of a block's
    outputs are the latent's tokens, None if there is one output only. projections: layers that see the prompt alone.
    frames_first: a latent is [B, T, C, H, W]. guidance: whether pipelines compute its branches by a call each or by
    one batch.
    """

    blocks: tuple[str, ...] = ("transformer_blocks",)
    attention: tuple[str, ...] = ("attn1",)
    text: Literal["none", "first", "last"] = "none"
    rotary: tuple[str, ...] = ()
    rotary_dim: int = 1
    rotary_text: bool = False
    times: str = ""
    output: int | None = None
    projections: tuple[str, ...] = ()
    frames_first: bool = False
    guidance: Literal["calls", "batch"] = "batch"

    @property
    def one_choice(self) -> bool:
        """Whether all clips of a batch must compute the same tokens, as their rotary tables have no batch axis."""
        return bool(self.rotary) and self.rotary_dim == 0


_NAMES = ("transformer", "transformer_2")
_CROSS = ("attn2.to_k", "attn2.to_v")
_LAYOUTS = {
    "WanTransformer3DModel": Layout(
        blocks=("blocks",), rotary=("rotary_emb",), times="temb",
        projections=(*_CROSS, "attn2.add_k_proj", "attn2.add_v_proj"), guidance="calls",
    ),
    "LTXVideoTransformer3DModel": Layout(rotary=("image_rotary_emb",), times="temb", projections=_CROSS),
    "HunyuanVideoTransformer3DModel": Layout(
        blocks=("transformer_blocks", "single_transformer_blocks"), attention=("attn",), text="last",
        rotary=("image_rotary_emb", "freqs_cis"), rotary_dim=0, output=0, guidance="calls",
    ),
    "CogVideoXTransformer3DModel": Layout(
        text="first", rotary=("image_rotary_emb",), rotary_dim=0, output=0, frames_first=True,
    ),
    "FluxTransformer2DModel": Layout(
        blocks=("transformer_blocks", "single_transformer_blocks"), attention=("attn",), text="first",
        rotary=("image_rotary_emb",), rotary_dim=0, rotary_text=True, output=1, guidance="calls",
    ),
    "SD3Transformer2DModel": Layout(attention=("attn", "attn2"), text="last", output=1),
    "PixArtTransformer2DModel": Layout(projections=_CROSS),
    "DiTTransformer2DModel": Layout(),
}  # fmt: skip


class Diffusion:
    """A pipeline's transformers, or a transformer by itself.

    `transformers` has them by name: one, or two in pipelines whose early and late steps have one each (Wan 2.2).

    Raises:
        AdapterError: the pipeline has no transformer (U-Net pipelines are not supported).
    """

    def __init__(self, model: Any) -> None:
        self.pipeline = model if isinstance(model, _classes("DiffusionPipeline")) else None
        found = (
            {"transformer": model} if self.pipeline is None else {name: getattr(model, name, None) for name in _NAMES}
        )
        self.transformers = {name: transformer for name, transformer in found.items() if transformer is not None}
        if not self.transformers:
            raise AdapterError(f"{type(model).__name__} has no transformer; only transformer pipelines are supported.")
        self.transformer = self.target = next(iter(self.transformers.values()))
        self.family = type(self.transformer).__name__

    @property
    def scheduler(self) -> Any:
        """The pipeline's scheduler as it is now; None for a transformer by itself."""
        return getattr(self.pipeline, "scheduler", None)

    @property
    def layout(self) -> Layout:
        """How the family lays its tokens out.

        Raises:
            AdapterError: nothing is known of the family.
        """
        if self.family not in _LAYOUTS:
            raise AdapterError(f"no token layout is known for {self.family}; known are {', '.join(_LAYOUTS)}.")
        return _LAYOUTS[self.family]

    def blocks(self, transformer: Any) -> dict[str, Any]:
        """The blocks of one of the transformers, by name, in the order in which they run."""
        return {
            f"{name}.{index}": block
            for name in self.layout.blocks
            for index, block in enumerate(getattr(transformer, name))
        }

    def arguments(self, transformer: Any, args: Any, kwargs: Any) -> dict[str, Any]:
        """The arguments of a call of a transformer, by name."""
        return inspect.signature(type(transformer).forward).bind_partial(transformer, *args, **kwargs).arguments

    def patch(self, transformer: Any, latents: Tensor) -> tuple[int, ...]:
        """Latents to a token along (time,) height and width; () for [B, N, C], which are tokens already."""
        axes = latents.ndim - 2
        if axes == 1:
            return ()
        size = transformer.config.patch_size
        sizes = tuple(size) if isinstance(size, (list, tuple)) else (size,) * min(axes, 2)
        if len(sizes) < axes:
            depth = getattr(transformer.config, "patch_size_t", None) or 1
            sizes = (*(depth,) * (axes - len(sizes)), *sizes)
        return sizes

    def parts(self, latents: Tensor) -> int:
        """How many guidance branches a batch of the transformer holds: 2 where they are computed in one call."""
        if self.pipeline is None or self.layout.guidance == "calls" or latents.shape[0] % 2:
            return 1
        # not every pipeline keeps a note of its guidance, but all give both branches the same latents
        first, second = latents.chunk(2)
        return 2 if torch.equal(first, second) else 1

    def output(self, velocity: Tensor) -> Any:
        """What a transformer returns when it is not asked for a tuple."""
        from diffusers.models.modeling_outputs import Transformer2DModelOutput

        return Transformer2DModelOutput(sample=velocity)

    def guidance(self, transformer: Any) -> float | None:
        """The guidance scale of the running call, None if the pipeline does not say."""
        pipeline = self.pipeline
        if transformer is self.transformers.get("transformer_2"):
            second = getattr(pipeline, "_guidance_scale_2", None)
            if second is not None:
                return second
        return getattr(pipeline, "_guidance_scale", None)

    def branches(self) -> int:
        """How often the running call gives each step to the transformer, as far as the pipeline says."""
        separate = self.layout.guidance == "calls" and getattr(self.pipeline, "do_classifier_free_guidance", False)
        return 2 if separate else 1
