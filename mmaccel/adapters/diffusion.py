"""Diffusion transformers of diffusers, alone or in a pipeline: where their blocks are and how tokens lie."""

from __future__ import annotations

import inspect
import math
import sys
from dataclasses import dataclass, replace
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

    blocks: its block lists, in order. attention: names of a block's attentions among the latent's tokens; readers: of
    further ones whose keys these are; cross: of those that see the prompt alone. feed_forward: names of its modules
    that see every token by itself; feed_forward_joint: whether these see the prompt's too; parallel: the two layers,
    both joint, that lie around the feed-forward of a block where it runs beside attention. text: where the prompt's
    tokens stand among the tokens of attentions, if they are there; alone: attentions that do not see them. rotary:
    names that a block's argument with a pair of rotary tables may have; rotary_dim: their token axis, 0 where they have
    no batch axis (they then turn neighbouring pairs); rotary_text: whether they begin with rows for the prompt. times:
    arguments of a block that may hold one time embedding a token; apart: those that treat some tokens unlike others.
    skipped: an attention's argument that says that it does not attend. companion: whether another stream runs along,
    which needs every step. output: which of a block's outputs are the latent's tokens, None if there is one output
    only. projections: layers that see the prompt alone. frames_first: a latent is [B, T, C, H, W]; packed: it is [B, N,
    C]. guidance: whether pipelines compute its branches by a call each or by one batch; prompt_first: the one with the
    prompt, or class, then leads.
    """

    blocks: tuple[str, ...] = ("transformer_blocks",)
    attention: tuple[str, ...] = ("attn1",)
    cross: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    feed_forward: tuple[str, ...] = ("ff",)
    feed_forward_joint: bool = False
    parallel: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    text: Literal["none", "first", "last"] = "none"
    rotary: tuple[str, ...] = ()
    rotary_dim: int = 1
    rotary_text: bool = False
    times: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    skipped: str = ""
    companion: bool = False
    output: int | None = None
    projections: tuple[str, ...] = ()
    frames_first: bool = False
    packed: bool = False
    guidance: Literal["calls", "batch"] = "batch"
    prompt_first: bool = False

    @property
    def keeping(self) -> tuple[str, ...]:
        """Names of all attentions whose keys are the latent's tokens."""
        return self.attention + self.readers


_NAMES = ("transformer", "transformer_2")
_CROSS = ("attn2.to_k", "attn2.to_v")
_PARALLEL = ("proj_mlp", "proj_out")
_LAYOUTS = {
    "WanTransformer3DModel": Layout(
        blocks=("blocks",), cross=("attn2",), feed_forward=("ffn",), rotary=("rotary_emb",), times=("temb",),
        projections=(*_CROSS, "attn2.add_k_proj", "attn2.add_v_proj"), guidance="calls",
    ),
    "LTXVideoTransformer3DModel": Layout(
        cross=("attn2",), rotary=("image_rotary_emb",), times=("temb",), projections=_CROSS, packed=True,
    ),
    # what its layers make of the prompt may depend on the time
    "LTX2VideoTransformer3DModel": Layout(
        readers=("video_to_audio_attn",), rotary=("video_rotary_emb", "ca_video_rotary_emb"),
        times=("temb", "temb_ca_scale_shift", "temb_ca_gate"), apart=("self_attention_mask",),
        skipped="all_perturbed", companion=True, output=0, packed=True,
    ),
    "HunyuanVideoTransformer3DModel": Layout(
        blocks=("transformer_blocks", "single_transformer_blocks"), attention=("attn",), text="last",
        apart=("token_replace_emb",), rotary=("image_rotary_emb", "freqs_cis"), rotary_dim=0, output=0,
        guidance="calls", parallel=_PARALLEL,
    ),
    "CogVideoXTransformer3DModel": Layout(
        text="first", rotary=("image_rotary_emb",), rotary_dim=0, output=0, frames_first=True,
        feed_forward_joint=True,
    ),
    "FluxTransformer2DModel": Layout(
        blocks=("transformer_blocks", "single_transformer_blocks"), attention=("attn",), text="first",
        rotary=("image_rotary_emb",), rotary_dim=0, rotary_text=True, output=1, guidance="calls", packed=True,
        parallel=_PARALLEL,
    ),
    "SD3Transformer2DModel": Layout(attention=("attn", "attn2"), alone=("attn2",), text="last", output=1),
    "PixArtTransformer2DModel": Layout(cross=("attn2",), projections=_CROSS),
    "DiTTransformer2DModel": Layout(prompt_first=True),
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
        if hasattr(self.transformer, "_orig_mod"):
            raise AdapterError(
                "torch.compile has put a module of its own in place of the transformer; put the original back "
                "(pipe.transformer = pipe.transformer._orig_mod) and compile in place behind accelerate "
                "(pipe.transformer.compile())."
            )
        if self.family not in _LAYOUTS:
            raise AdapterError(f"no token layout is known for {self.family}; known are {', '.join(_LAYOUTS)}.")
        layout = _LAYOUTS[self.family]
        split = self.transformer.config.get("rope_type") == "split"  # tables are then [B, heads, N, d / 2]
        return replace(layout, rotary_dim=2) if split else layout

    def blocks(self, transformer: Any) -> dict[str, Any]:
        """The blocks of one of the transformers, by name, in the order in which they run."""
        return {
            f"{name}.{index}": block
            for name in self.layout.blocks
            for index, block in enumerate(getattr(transformer, name))
        }

    def width(self, transformer: Any, attention: Any) -> int:
        """Numbers that the keys of a token have in an attention of a transformer, over all heads."""
        config = transformer.config
        return getattr(attention, "inner_kv_dim", None) or config.num_attention_heads * config.attention_head_dim

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

    def grid(self, transformer: Any, given: dict[str, Any]) -> tuple[int, ...]:
        """Tokens along (time,) height and width of the latents of a call; (N,) where it does not say."""
        latents = given["hidden_states"]
        if latents.ndim > 3:
            sizes = [*latents.shape[2:]] if not self.layout.frames_first else [latents.shape[1], *latents.shape[3:]]
        elif given.get("img_ids") is not None:
            sizes = [int(axis) + 1 for axis in (given["img_ids"].amax(0) - given["img_ids"].amin(0))[1:]]
        else:
            sizes = [given.get(name) or 0 for name in ("num_frames", "height", "width")]
        patch = self.patch(transformer, latents) or (1,) * len(sizes)
        counts = tuple(size // part for size, part in zip(sizes, patch, strict=True))
        known = latents.ndim > 3 or math.prod(counts) == latents.shape[1]
        return counts if known else (latents.shape[1],)

    def parts(self, latents: Tensor) -> int:
        """How many guidance branches a batch of the transformer holds: 2 where they are computed in one call."""
        if self.pipeline is None or self.layout.guidance == "calls" or latents.shape[0] % 2:
            return 1
        scale = getattr(self.pipeline, "_guidance_scale", None)
        if scale is not None and scale <= 1 and not getattr(self.pipeline, "do_classifier_free_guidance", False):
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

    @property
    def cache(self) -> str | None:
        """The configuration class of the cache that diffusers itself has on a transformer, None without one."""
        for transformer in self.transformers.values():
            if getattr(transformer, "is_cache_enabled", False):
                return type(transformer._cache_config).__name__
        return None

    def branches(self) -> int:
        """How often the running call gives each step to the transformer, as far as the pipeline says."""
        separate = self.layout.guidance == "calls" and getattr(self.pipeline, "do_classifier_free_guidance", False)
        return 2 if separate else 1
