"""Real diffusers pipelines of every family that has an adapter, tiny, with random weights, and how each is called.

Prompts are given as embeddings, so that no text encoder is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import PIL.Image
import torch
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from mmaccel.tiny.families.weights import randomise
from mmaccel.tiny.pipelines import tiny_wan_pipeline

# diffusers exports its classes lazily, out of sight of a type checker
library: Any = diffusers
torch.set_num_threads(1)
SMALL, LARGE = 0, 1


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompts(numbers: tuple[int, ...], *shape: int) -> torch.Tensor:
    """Embeddings of the prompts with these numbers; 99 is the empty one."""
    return torch.stack([normal(*shape, seed=1000 + number) for number in numbers])


def generators(seed: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + index) for index in range(count)]


@dataclass(frozen=True)
class Family:
    """A pipeline: how to build it, and its arguments for prompts of these numbers, guided or not, small or large.

    latents: shape of those of one small item. tokens: how many that are, inside. text: rows of the prompt that the
    feed-forward module of the first block sees too.
    """

    build: Callable[[], Any]
    arguments: Callable[[tuple[int, ...], bool, int], dict[str, Any]]
    latents: tuple[int, ...]
    tokens: int
    text: int = 0

    def call(
        self, pipe: Any, *, seed: int = 0, steps: int = 10, items: tuple[int, ...] = (0,), guided: bool = True,
        size: int = SMALL, **more: Any,
    ) -> torch.Tensor:  # fmt: skip
        """Latents (pictures in [0, 1] for DiT)."""
        given = self.arguments(items, guided, size)
        return pipe(
            num_inference_steps=steps, generator=generators(seed, len(items)), return_dict=False,
            **{"output_type": "latent", **given, **more},
        )[0]  # fmt: skip


def finished(pipe: Any, seed: int = 0) -> Any:
    for name in ("transformer", "transformer_2"):
        if getattr(pipe, name, None) is not None:
            randomise(getattr(pipe, name), seed=seed + len(name))
            getattr(pipe, name).eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def solver(**more: Any) -> Any:
    """DPM-Solver++ with flow prediction."""
    return library.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, **more
    )


def ltx() -> Any:
    transformer = library.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=3, caption_channels=8,
    )  # fmt: skip
    return finished(
        library.LTXPipeline(library.FlowMatchEulerDiscreteScheduler(), None, None, None, transformer=transformer)
    )


def ltx_image() -> Any:
    """Image to video: the first frame is the image's, with timestep 0 for its tokens."""
    pipe = ltx()
    scheduler, transformer = pipe.scheduler, pipe.transformer
    image = library.LTXImageToVideoPipeline(scheduler, None, None, None, transformer=transformer)
    image.set_progress_bar_config(disable=True)
    return image


def ltx_image_arguments(items: tuple[int, ...], guided: bool, size: int) -> dict[str, Any]:
    rows = 3 * (3 + size) * 3
    return {**ltx_arguments(items, guided, size), "latents": torch.stack([normal(rows, 4, seed=n) for n in items])}


def ltx_arguments(items: tuple[int, ...], guided: bool, size: int) -> dict[str, Any]:
    n = len(items)
    return {
        "height": 96 + 32 * size, "width": 96, "num_frames": 17, "guidance_scale": 3.0 if guided else 1.0,
        "prompt_embeds": prompts(items, 5, 8), "prompt_attention_mask": torch.ones(n, 5),
        "negative_prompt_embeds": prompts((99,) * n, 5, 8), "negative_prompt_attention_mask": torch.ones(n, 5),
    }  # fmt: skip


def flux() -> Any:
    transformer = library.FluxTransformer2DModel(
        in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    scheduler = library.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return finished(
        library.FluxPipeline(
            scheduler, None, None, None, text_encoder_2=None, tokenizer_2=None, transformer=transformer
        )
    )


def flux_arguments(items: tuple[int, ...], guided: bool, size: int) -> dict[str, Any]:
    n = len(items)
    negative = {
        "negative_prompt_embeds": prompts((99,) * n, 5, 8),
        "negative_pooled_prompt_embeds": prompts((99,) * n, 8), "true_cfg_scale": 2.0,
    }  # fmt: skip
    return {
        "height": 64 + 32 * size, "width": 64, "prompt_embeds": prompts(items, 5, 8),
        "pooled_prompt_embeds": prompts(items, 8), **(negative if guided else {}),
    }  # fmt: skip


def hunyuan(**more: Any) -> Any:
    transformer = library.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True, text_embed_dim=8,
        pooled_projection_dim=8, rope_axes_dim=(4, 4, 4), **more,
    )  # fmt: skip
    scheduler = library.FlowMatchEulerDiscreteScheduler(shift=7.0)
    return finished(library.HunyuanVideoPipeline(None, None, transformer, None, scheduler, None, None))


def hunyuan_arguments(items: tuple[int, ...], guided: bool, size: int) -> dict[str, Any]:
    n = len(items)
    mask = torch.ones(n, 5)
    mask[:, 4] = 0
    negative = {
        "negative_prompt_embeds": prompts((99,) * n, 5, 8), "negative_prompt_attention_mask": mask,
        "negative_pooled_prompt_embeds": prompts((99,) * n, 8), "true_cfg_scale": 2.0,
    }  # fmt: skip
    return {
        "height": 32 + 16 * size, "width": 48, "num_frames": 9, "prompt_embeds": prompts(items, 5, 8),
        "prompt_attention_mask": mask, "pooled_prompt_embeds": prompts(items, 8), **(negative if guided else {}),
    }  # fmt: skip


def cogvideox(scheduler: Any = None) -> Any:
    transformer = library.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=8,
        num_layers=3, sample_width=6, sample_height=4, sample_frames=9, patch_size=2, max_text_seq_length=5,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    return finished(library.CogVideoXPipeline(None, None, None, transformer, scheduler or solver()))


def cogvideox_arguments(items: tuple[int, ...], guided: bool, size: int) -> dict[str, Any]:
    return {
        "height": 32, "width": 48, "num_frames": 9 + 8 * size, "guidance_scale": 3.0 if guided else 1.0,
        "prompt_embeds": prompts(items, 5, 8), "negative_prompt_embeds": prompts((99,) * len(items), 5, 8),
    }  # fmt: skip


def sd3() -> Any:
    transformer = library.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8,
        dual_attention_layers=(0,),
    )  # fmt: skip
    scheduler = library.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return finished(library.StableDiffusion3Pipeline(transformer, scheduler, None, None, None, None, None, None, None))


def sd3_arguments(items: tuple[int, ...], guided: bool, size: int) -> dict[str, Any]:
    n = len(items)
    return {
        "height": 64 + 16 * size, "width": 64, "guidance_scale": 3.0 if guided else 1.0,
        "prompt_embeds": prompts(items, 5, 8), "pooled_prompt_embeds": prompts(items, 8),
        "negative_prompt_embeds": prompts((99,) * n, 5, 8), "negative_pooled_prompt_embeds": prompts((99,) * n, 8),
    }  # fmt: skip


def pixart(scheduler: Any = None) -> Any:
    transformer = library.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3,
        cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=8,
        norm_type="ada_norm_single", use_additional_conditions=False,
    )  # fmt: skip
    return finished(library.PixArtAlphaPipeline(None, None, None, transformer, scheduler or solver()))


def pixart_arguments(items: tuple[int, ...], guided: bool, size: int) -> dict[str, Any]:
    n = len(items)
    return {
        "height": 64 + 16 * size, "width": 64, "guidance_scale": 3.0 if guided else 1.0, "negative_prompt": None,
        "prompt_embeds": prompts(items, 5, 8), "prompt_attention_mask": torch.ones(n, 5),
        "negative_prompt_embeds": prompts((99,) * n, 5, 8), "negative_prompt_attention_mask": torch.ones(n, 5),
        "use_resolution_binning": False,
    }  # fmt: skip


def dit(scheduler: Any = None) -> Any:
    transformer = library.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=8,
        patch_size=2, norm_num_groups=2,
    )  # fmt: skip
    vae = library.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(4,),
        latent_channels=4, norm_num_groups=2, sample_size=8, mid_block_add_attention=False, scaling_factor=1.0,
    )  # fmt: skip
    randomise(vae, seed=3)
    return finished(library.DiTPipeline(transformer, vae.eval(), scheduler or solver()))


def dit_arguments(items: tuple[int, ...], guided: bool, size: int) -> dict[str, Any]:
    return {"class_labels": list(items), "guidance_scale": 3.0 if guided else 1.0, "output_type": "pt"}


def wan_image(*, expand: bool = False, embedded: bool = False) -> Any:
    """Image to video: the image beside the latents, or (`expand`) in their first frame, with a timestep a token.

    embedded: what an image encoder makes of it stands in front of the prompt too, as in Wan 2.1.
    """
    base, parts, seen = tiny_wan_pipeline(), {}, {}
    if embedded:
        config = CLIPVisionConfig(
            hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
        )
        processor = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
        parts = {"image_encoder": CLIPVisionModel(config).eval(), "image_processor": processor}
        randomise(parts["image_encoder"], seed=8)
        seen = {"image_dim": 8, "added_kv_proj_dim": 48}
    transformer = library.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=24, text_dim=32, freq_dim=32, ffn_dim=96, num_layers=3,
        rope_max_seq_len=64, in_channels=16 if expand else 36, out_channels=16, **seen,
    )  # fmt: skip
    pipe = library.WanImageToVideoPipeline(
        base.tokenizer, base.text_encoder, base.vae, base.scheduler, transformer=transformer, expand_timesteps=expand,
        **parts,
    )  # fmt: skip
    return finished(pipe)


def wan_arguments(items: tuple[int, ...], guided: bool, size: int) -> dict[str, Any]:
    n = len(items)
    return {
        "height": 32 + 16 * size, "width": 48, "num_frames": 9, "guidance_scale": 3.0 if guided else 1.0,
        "prompt_embeds": prompts(items, 7, 32), "negative_prompt_embeds": prompts((99,) * n, 7, 32),
    }  # fmt: skip


def wan_image_arguments(items: tuple[int, ...], guided: bool, size: int) -> dict[str, Any]:
    return {**wan_arguments(items, guided, size), "image": PIL.Image.new("RGB", (48, 32), (200, 30, 90))}


def wan_embedded_arguments(items: tuple[int, ...], guided: bool, size: int) -> dict[str, Any]:
    """The blocks count on 512 embeddings of the prompt."""
    given = wan_image_arguments(items, guided, size)
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        given[name] = torch.nn.functional.pad(given[name], (0, 0, 0, 505))
    return given


def wan_two_experts() -> Any:
    first, second = tiny_wan_pipeline(), tiny_wan_pipeline(seed=1)
    pipe = library.WanPipeline(
        first.tokenizer, first.text_encoder, first.vae, first.scheduler, transformer=first.transformer,
        transformer_2=second.transformer, boundary_ratio=0.6,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ltx2_transformer(*, split: bool = True, newer: bool = True) -> Any:
    """As in LTX-2 or (`newer`) LTX-2.3, whose layers modulate the prompt by the time and gate their attention."""
    return library.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=3, caption_channels=8, rope_type="split" if split else "interleaved",
        gated_attn=newer, cross_attn_mod=newer, audio_gated_attn=newer, audio_cross_attn_mod=newer,
        perturbed_attn=True,
    )  # fmt: skip


def ltx2() -> Any:
    vae = library.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,),
        decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False), downsample_type=("spatial",), upsample_residual=(False,),
        upsample_factor=(1,), patch_size=1, decoder_causal=False, spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )  # fmt: skip
    audio_vae = library.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, latent_channels=2, resolution=32, mel_bins=8
    )
    connectors = LTX2TextConnectors(
        caption_channels=8, text_proj_in_factor=2, video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=4, video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2, audio_connector_attention_head_dim=4, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None, rope_type="split",
    )  # fmt: skip
    randomise(connectors, seed=5)
    scheduler = library.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = library.LTX2Pipeline(scheduler, vae, audio_vae, None, None, connectors.eval(), ltx2_transformer(), None)
    return finished(pipe)


def ltx2_arguments(items: tuple[int, ...], guided: bool, size: int) -> dict[str, Any]:
    """With every kind of guidance the pipeline makes three calls a step, of two sizes of batch."""
    n = len(items)
    scales = {"guidance_scale": (3.0, 1.0), "stg_scale": (1.0, 0.0), "modality_scale": (3.0, 1.0)}
    return {
        "height": 96 + 32 * size, "width": 96, "num_frames": 17, "spatio_temporal_guidance_blocks": [1],
        "prompt_embeds": prompts(items, 5, 16), "prompt_attention_mask": torch.ones(n, 5),
        "negative_prompt_embeds": prompts((99,) * n, 5, 16), "negative_prompt_attention_mask": torch.ones(n, 5),
        **{f"{stream}{name}": pair[not guided] for name, pair in scales.items() for stream in ("", "audio_")},
    }  # fmt: skip


def nucleus() -> Any:
    """A family without an adapter, whose blocks diffusers' cache of text keys and values is written for."""
    transformer = library.NucleusMoEImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=8, axes_dims_rope=(8, 12, 12), moe_enabled=False,
    )  # fmt: skip
    scheduler = library.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return finished(
        library.NucleusMoEImagePipeline(
            transformer=transformer, scheduler=scheduler, vae=None, text_encoder=None, processor=None
        )
    )


def nucleus_arguments(items: tuple[int, ...], guided: bool, size: int) -> dict[str, Any]:
    n, mask = len(items), torch.ones(len(items), 5, dtype=torch.bool)
    return {
        "height": 64 + 16 * size, "width": 64, "guidance_scale": 3.0 if guided else 1.0,
        "prompt_embeds": prompts(items, 5, 8), "prompt_embeds_mask": mask,
        "negative_prompt_embeds": prompts((99,) * n, 5, 8), "negative_prompt_embeds_mask": mask,
    }  # fmt: skip


NUCLEUS = Family(nucleus, nucleus_arguments, (1, 16, 16), 16)
FAMILIES = {
    "ltx": Family(ltx, ltx_arguments, (1, 27, 4), 27),
    "ltx_image": Family(ltx_image, ltx_image_arguments, (1, 27, 4), 27),
    "flux": Family(flux, flux_arguments, (1, 16, 4), 16),
    "ltx2": Family(ltx2, ltx2_arguments, (1, 27, 4), 27),
    "hunyuan": Family(hunyuan, hunyuan_arguments, (1, 4, 3, 4, 6), 18),
    "cogvideox": Family(cogvideox, cogvideox_arguments, (1, 3, 4, 4, 6), 18, text=5),
    "sd3": Family(sd3, sd3_arguments, (1, 4, 8, 8), 16),
    "pixart": Family(pixart, pixart_arguments, (1, 4, 8, 8), 16),
    "dit": Family(dit, dit_arguments, (1, 4, 8, 8), 16),
    "wan_image": Family(wan_image, wan_image_arguments, (1, 16, 3, 4, 6), 18),
    "wan_token_times": Family(lambda: wan_image(expand=True), wan_image_arguments, (1, 16, 3, 4, 6), 18),
    "wan_embedded": Family(lambda: wan_image(embedded=True), wan_embedded_arguments, (1, 16, 3, 4, 6), 18),
    "wan_two_experts": Family(wan_two_experts, wan_arguments, (1, 16, 3, 4, 6), 18),
}
