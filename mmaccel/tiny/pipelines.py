"""A tiny text language model and a tiny text-to-video pipeline, random weights, real library classes, no file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mmaccel.errors import NotApplicableError
from mmaccel.tiny.families.llava import text_config
from mmaccel.tiny.families.tokenizer import VOCABULARY, byte_tokenizer, special_ids
from mmaccel.tiny.families.weights import build_random, randomise

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def tiny_text_lm(
    kind: str = "llama", *, layers: int = 4, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Any, PreTrainedTokenizerFast]:
    """Build a random text language model and its tokenizer of one token a byte.

    `kind` is `llama` or `qwen2`; width 64, 4 query heads on 2 key heads, eval mode, SDPA, greedy, no early stop.
    Raises `NotApplicableError` for another kind.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    classes = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}
    if kind not in classes:
        raise NotApplicableError(f"no tiny text model of kind {kind!r}; use one of: {', '.join(classes)}.")
    model_class, config_class = classes[kind]
    model = build_random(model_class, config_class(**text_config(layers)), seed=seed, dtype=dtype)
    with torch.no_grad():
        model.lm_head.weight[256:] = 0
    return model, byte_tokenizer()


def tiny_wan_pipeline(*, layers: int = 3, seed: int = 0, flow_shift: float = 3.0) -> Any:
    """Build a float32 text-to-video pipeline of the Wan classes: 16 channels, 8 x 8 pixels x 4 frames to a latent.

    Call it as `pipe("a word", height=32, width=48, num_frames=9, num_inference_steps=4, output_type="latent")`; sizes
    are multiples of 16 pixels, frames one more than a multiple of 4. The scheduler is UniPC with flow prediction, as
    Wan ships it. The progress bar is off.
    """
    import diffusers
    from transformers import UMT5Config, UMT5EncoderModel

    # diffusers exports its classes lazily, out of sight of a type checker.
    library: Any = diffusers
    width = 32
    text = UMT5Config(
        vocab_size=VOCABULARY,
        d_model=width,
        d_kv=16,
        d_ff=48,
        num_layers=2,
        num_heads=2,
        pad_token_id=special_ids(())["<pad>"],
        eos_token_id=special_ids(())["<eos>"],
    )
    transformer = library.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        text_dim=width,
        freq_dim=32,
        ffn_dim=96,
        num_layers=layers,
        rope_max_seq_len=64,
    )
    vae = library.AutoencoderKLWan(base_dim=8, num_res_blocks=1)
    for number, module in enumerate((transformer, vae)):
        randomise(module, seed=seed + number)
        module.eval()
    pipe = library.WanPipeline(
        tokenizer=byte_tokenizer(padding_side="right", close=True),
        text_encoder=build_random(UMT5EncoderModel, text, seed=seed + 2, dtype=torch.float32),
        vae=vae,
        scheduler=library.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift, num_train_timesteps=1000
        ),
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
