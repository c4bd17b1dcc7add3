"""Published configs of diffusers transformers with random weights, each in its pipeline, for measuring speed.

The values are those of the public config files of Wan-AI/Wan2.1-T2V-1.3B-Diffusers, Lightricks/LTX-Video (0.9),
black-forest-labs/FLUX.1-dev and PixArt-alpha/PixArt-XL-2-512x512; what is not given below is the default of diffusers'
classes. Prompts are random embeddings of the length and width that the text encoder would give, and latents are the
result: neither a text encoder nor an autoencoder is built. Timings are real, pictures are noise; any figure from them
has to say so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mmaccel.errors import NotApplicableError
from mmaccel.tiny.families.weights import allocate, randomise

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["REAL_GENERATORS", "RealGenerator", "build_generator", "generator_call"]


@dataclass(frozen=True)
class RealGenerator:
    """One published model.

    transformer, config: class and arguments. depths: the fields that say how many blocks there are, and how many.
    pipeline: makes the pipeline of a transformer. prompt: arguments of its prompt, of the given dtype. small, full:
    height and width in pixels and frames (1 for images), for a CPU and as published. steps, guidance: as published.
    """

    name: str
    transformer: str
    config: dict[str, Any]
    depths: dict[str, int]
    pipeline: Callable[[Any, Any], Any]
    prompt: Callable[[torch.dtype, bool], dict[str, Any]]
    small: tuple[int, int, int]
    full: tuple[int, int, int]
    steps: int


def _normal(dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _wan(library: Any, transformer: Any) -> Any:
    from mmaccel.tiny.pipelines import tiny_wan_pipeline

    # Wan's pipeline reads sizes from its autoencoder; the tiny one has those of the published one
    tiny = tiny_wan_pipeline()
    scheduler = library.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    return library.WanPipeline(
        tokenizer=tiny.tokenizer, text_encoder=tiny.text_encoder, vae=tiny.vae, scheduler=scheduler,
        transformer=transformer,
    )  # fmt: skip


def _wan_prompt(dtype: torch.dtype, guided: bool) -> dict[str, Any]:
    given = {"prompt_embeds": _normal(dtype, 1, 512, 4096), "guidance_scale": 5.0 if guided else 1.0}
    return given | ({"negative_prompt_embeds": _normal(dtype, 1, 512, 4096, seed=1)} if guided else {})


def _ltx(library: Any, transformer: Any) -> Any:
    scheduler = library.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
    )
    return library.LTXPipeline(scheduler, None, None, None, transformer=transformer)


def _ltx_prompt(dtype: torch.dtype, guided: bool) -> dict[str, Any]:
    return {
        "prompt_embeds": _normal(dtype, 1, 128, 4096), "prompt_attention_mask": torch.ones(1, 128),
        "negative_prompt_embeds": _normal(dtype, 1, 128, 4096, seed=1),
        "negative_prompt_attention_mask": torch.ones(1, 128), "guidance_scale": 3.0 if guided else 1.0,
    }  # fmt: skip


def _flux(library: Any, transformer: Any) -> Any:
    scheduler = library.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    return library.FluxPipeline(
        scheduler, None, None, None, text_encoder_2=None, tokenizer_2=None, transformer=transformer
    )


def _flux_prompt(dtype: torch.dtype, _guided: bool) -> dict[str, Any]:
    # the guidance is distilled: one call a step
    return {"prompt_embeds": _normal(dtype, 1, 512, 4096), "pooled_prompt_embeds": _normal(dtype, 1, 768)}


def _pixart(library: Any, transformer: Any) -> Any:
    scheduler = library.DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02, beta_schedule="linear")
    return library.PixArtAlphaPipeline(None, None, None, transformer, scheduler)


def _pixart_prompt(dtype: torch.dtype, guided: bool) -> dict[str, Any]:
    return {
        "prompt_embeds": _normal(dtype, 1, 120, 4096), "prompt_attention_mask": torch.ones(1, 120),
        "negative_prompt_embeds": _normal(dtype, 1, 120, 4096, seed=1), "negative_prompt": None,
        "negative_prompt_attention_mask": torch.ones(1, 120), "guidance_scale": 4.5 if guided else 1.0,
        "use_resolution_binning": False,
    }  # fmt: skip


REAL_GENERATORS: dict[str, RealGenerator] = {
    model.name: model
    for model in (
        RealGenerator(
            "wan-2.1-1.3b", "WanTransformer3DModel",
            {
                "num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16, "out_channels": 16,
                "text_dim": 4096, "freq_dim": 256, "ffn_dim": 8960,
            },
            {"num_layers": 30}, _wan, _wan_prompt, (160, 160, 17), (480, 832, 33), 40,
        ),
        RealGenerator(
            "ltx-video", "LTXVideoTransformer3DModel", {}, {"num_layers": 28},
            _ltx, _ltx_prompt, (256, 256, 41), (512, 704, 97), 40,
        ),
        RealGenerator(
            "flux.1-dev", "FluxTransformer2DModel", {"guidance_embeds": True},
            {"num_layers": 19, "num_single_layers": 38}, _flux, _flux_prompt, (256, 256, 1), (1024, 1024, 1), 28,
        ),
        RealGenerator(
            "pixart-xl-2-512", "PixArtTransformer2DModel",
            {"sample_size": 64, "caption_channels": 4096, "use_additional_conditions": False},
            {"num_layers": 28}, _pixart, _pixart_prompt, (384, 384, 1), (512, 512, 1), 20,
        ),
    )
}  # fmt: skip


def build_generator(
    name: str, layers: int | None = None, *, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0
) -> Any:
    """Build a pipeline with random weights, its transformer cut to `layers` blocks of each kind if given.

    Raises:
        NotApplicableError: an unknown model, or more layers than it has.
    """
    from accelerate import init_empty_weights

    if name not in REAL_GENERATORS:
        raise NotApplicableError(f"no generator is called {name!r}; known are {', '.join(REAL_GENERATORS)}.")
    model = REAL_GENERATORS[name]
    least = min(model.depths.values())
    if layers is not None and not 1 <= layers <= least:
        raise NotApplicableError(f"{name} has {least} layers; ask for 1 to {least}, not {layers}.")
    import diffusers

    library: Any = diffusers  # exported lazily, out of sight of a type checker
    depths = {field: layers or depth for field, depth in model.depths.items()}
    with init_empty_weights(include_buffers=False):
        transformer = getattr(library, model.transformer)(**model.config, **depths)
    _cast(transformer, dtype)
    allocate(transformer, device)
    randomise(transformer, seed=seed)
    pipe = model.pipeline(library, transformer.eval()).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _cast(transformer: torch.nn.Module, dtype: torch.dtype) -> None:
    """As `from_pretrained` does it: what a class keeps in float32 stays so."""
    kept = getattr(transformer, "_keep_in_fp32_modules", None) or ()
    for name, parameter in transformer.named_parameters():
        if not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)


def generator_call(name: str, *, dtype: torch.dtype, full: bool = False, guided: bool = False) -> dict[str, Any]:
    """Arguments of a call of that pipeline, but for its generator: small or of the published size, guided or not."""
    model = REAL_GENERATORS[name]
    height, width, frames = model.full if full else model.small
    sizes = {"height": height, "width": width} | ({"num_frames": frames} if frames > 1 else {})
    return {
        **sizes, **model.prompt(dtype, guided), "num_inference_steps": model.steps, "output_type": "latent",
        "return_dict": False,
    }  # fmt: skip
