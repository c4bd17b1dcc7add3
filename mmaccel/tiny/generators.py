"""The parts of the embedded generators, untrained: text to video in Wan classes, class to image in DiT classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mmaccel.tiny.stories import PROMPT_WORDS, WINDOW
from mmaccel.tiny.world import COLORS, SHAPES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

__all__ = [
    "IMAGE_LABELS",
    "LATENT",
    "TEXT_LENGTH",
    "image_pipeline",
    "image_scheduler",
    "image_transformer",
    "image_vae",
    "prompt_tokenizer",
    "text_encoder",
    "video_pipeline",
    "video_scheduler",
    "video_transformer",
    "video_vae",
]

TEXT_LENGTH = 24
LATENT = 16
IMAGE_LABELS = {
    number: f"{color} {shape}"
    for number, (color, shape) in enumerate((color, shape) for color in COLORS for shape in SHAPES)
}
_WIDTH, _HEADS, _LAYERS = 128, 4, 8
_IMAGE_WIDTH = 96
_TEXT_WIDTH = 64


def _library() -> Any:
    # diffusers exports its classes lazily, out of sight of a type checker.
    import diffusers

    return diffusers


def prompt_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing word-level tokenizer of the prompt language; ends texts with `</s>` and pads on the right."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", *PROMPT_WORDS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=512,
    )


def text_encoder() -> UMT5EncoderModel:
    """The untrained text encoder: UMT5, 2 layers of width 64."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(PROMPT_WORDS) + 3,
            d_model=_TEXT_WIDTH,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def video_vae() -> Any:
    """The untrained video autoencoder: `AutoencoderKLWan`, 8 x 8 pixels x 4 frames to a latent of 16 channels."""
    return _library().AutoencoderKLWan(
        base_dim=16,
        decoder_base_dim=24,
        z_dim=LATENT,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=8,
        latents_mean=[0.0] * LATENT,
        latents_std=[1.0] * LATENT,
    )


def video_transformer() -> Any:
    """The untrained video transformer: `WanTransformer3DModel`, 8 blocks of width 128, one token a latent."""
    model = _library().WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=_HEADS,
        attention_head_dim=_WIDTH // _HEADS,
        in_channels=LATENT,
        out_channels=LATENT,
        text_dim=_TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=3 * _WIDTH,
        num_layers=_LAYERS,
        rope_max_seq_len=64,
    )
    with torch.no_grad():
        model.proj_out.weight.zero_()
        model.proj_out.bias.zero_()
    return model


def video_scheduler(flow_shift: float = 3.0) -> Any:
    """UniPC with flow prediction, as Wan ships it."""
    return _library().UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift, num_train_timesteps=1000
    )


def image_vae() -> Any:
    """The untrained image autoencoder: `AutoencoderKL`, 4 x 4 pixels to a latent of 4 channels."""
    return _library().AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=WINDOW,
        mid_block_add_attention=False,
    )


def image_transformer() -> Any:
    """The untrained image transformer: `DiTTransformer2DModel`, 8 blocks of width 96, one token a latent.

    The embedding of the empty class has number 1000, as the pipeline of the library has it. Every block starts as the
    identity (adaLN-Zero: Scalable Diffusion Models with Transformers, 2023).
    """
    model = _library().DiTTransformer2DModel(
        num_attention_heads=_HEADS,
        attention_head_dim=_IMAGE_WIDTH // _HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=_LAYERS,
        sample_size=WINDOW // 4,
        patch_size=1,
        norm_num_groups=8,
    )
    with torch.no_grad():
        for layer in (model.proj_out_2, *(block.norm1.linear for block in model.transformer_blocks)):
            layer.weight.zero_()
            layer.bias.zero_()
    return model


def image_scheduler() -> Any:
    """DPM-Solver++ with flow prediction."""
    return _library().DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0, num_train_timesteps=1000
    )


def video_pipeline(vae: Any, tokenizer: Any, encoder: Any, transformer: Any) -> Any:
    """The parts as a `WanPipeline`."""
    return _library().WanPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=vae, scheduler=video_scheduler(), transformer=transformer
    )


def image_pipeline(vae: Any, transformer: Any) -> Any:
    """The parts as a `DiTPipeline` that knows `IMAGE_LABELS`."""
    pipe = _library().DiTPipeline(
        transformer=transformer, vae=vae, scheduler=image_scheduler(), id2label=dict(IMAGE_LABELS)
    )
    # The class takes the names, but does not save them by itself.
    pipe.register_to_config(id2label={str(number): name for number, name in IMAGE_LABELS.items()})
    return pipe
