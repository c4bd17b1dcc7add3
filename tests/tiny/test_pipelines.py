from __future__ import annotations

import pytest
import torch

from mmaccel.errors import NotApplicableError
from mmaccel.tiny.pipelines import tiny_text_lm, tiny_wan_pipeline

torch.set_num_threads(1)

CALL = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 4, "max_sequence_length": 32}


@pytest.fixture(scope="module")
def pipe():
    return tiny_wan_pipeline()


def run(pipe, prompt="a red ball", seed=0, output_type="latent", **more):
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, generator=generator, output_type=output_type, **CALL | more).frames


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_text_model_generates_bytes_and_a_padded_batch_equals_its_prompts(kind):
    model, tokenizer = tiny_text_lm(kind, layers=3)
    assert len(model.model.layers) == 3
    texts = ["one fish two fish", "red"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    assert batch["attention_mask"].sum(1).tolist() == [len(text) for text in texts]
    assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == texts
    written = model.generate(**batch, max_new_tokens=5)[:, -5:]
    assert written.max() < 256
    for row, text in enumerate(texts):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=5)[0, -5:]
        assert alone.tolist() == written[row].tolist()


def test_text_model_follows_its_seed():
    first, again, other = (tiny_text_lm(seed=seed)[0].lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_unknown_text_model_is_refused():
    with pytest.raises(NotApplicableError, match="no tiny text model of kind 'bert'; use one of: llama, qwen2"):
        tiny_text_lm("bert")


def test_video_pipeline_repeats_itself_and_listens_to_prompt_and_seed(pipe):
    first = run(pipe)
    assert first.shape == (1, 16, 3, 4, 6)
    assert torch.isfinite(first).all()
    assert torch.equal(first, run(pipe))
    assert torch.equal(first, run(tiny_wan_pipeline()))
    assert (first - run(pipe, prompt="a blue cube")).abs().max() > 1e-2
    assert (first - run(pipe, seed=1)).abs().max() > 1e-2
    assert not torch.equal(first, run(pipe, negative_prompt="grey"))


def test_video_pipeline_calls_the_transformer_twice_a_step(pipe):
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    run(pipe, num_inference_steps=3)
    run(pipe, num_inference_steps=3, guidance_scale=1.0)
    hook.remove()
    assert len(calls) == 2 * 3 + 3


def test_video_pipeline_decodes_to_frames(pipe):
    frames = run(pipe, output_type="np")
    assert frames.shape == (1, 9, 32, 48, 3)
    assert frames.std() > 0.01


def test_first_block_cache_of_diffusers_fits(pipe):
    from diffusers import FirstBlockCacheConfig

    dense = run(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    last = []
    hook = pipe.transformer.blocks[-1].attn1.register_forward_pre_hook(lambda *_: last.append(1))
    cached = run(pipe)
    hook.remove()
    pipe.transformer.disable_cache()
    assert len(last) == 2
    assert not torch.equal(cached, dense)
    assert torch.equal(run(pipe), dense)
