"""diffusers' first-block cache under our handle: identity, exact undo, honest report."""

from __future__ import annotations

import pytest
import torch

import mmaccel
from mmaccel.errors import ConflictError, NotApplicableError
from mmaccel.tiny.pipelines import tiny_wan_pipeline


def generate(pipe, seed=0, steps=5, **more):
    size = {"height": 32, "width": 48, "num_frames": 9}
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        "a word", num_inference_steps=steps, output_type="latent", generator=generator, **{**size, **more}
    ).frames  # fmt: skip


def traces(pipe):
    """Everything that a cache could leave on the transformer: attributes, hooks, registries."""
    found = {}
    for name, module in pipe.transformer.named_modules():
        registry = vars(module).get("_diffusers_hook")
        found[name] = (
            type(module), sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks),
            None if registry is None else (sorted(registry.hooks), len(registry._get_child_registries())),
        )  # fmt: skip
    return found, sorted(vars(pipe.scheduler)), pipe.transformer._cache_config


def test_threshold_zero_is_the_identity_and_says_that_it_never_fired():
    pipe, twin = tiny_wan_pipeline(), tiny_wan_pipeline()
    with mmaccel.accelerate(pipe, "first-block-cache:threshold=0.0") as handle:
        assert torch.equal(generate(pipe), generate(twin))
    events = handle.report().events
    assert events["steps computed"] == 10  # 5 steps, with and without the prompt
    assert "never reached" in events["threshold"]


def test_it_is_what_diffusers_does_and_the_second_call_equals_the_first():
    pipe, twin = tiny_wan_pipeline(), tiny_wan_pipeline()
    from diffusers.hooks.first_block_cache import FirstBlockCacheConfig

    twin.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    with mmaccel.accelerate(pipe, mmaccel.FirstBlockCache(threshold=0.5)) as handle:
        first = generate(pipe)
        assert torch.equal(first, generate(twin))
        assert torch.equal(first, generate(pipe))
        generate(pipe, height=48, steps=3)
        assert torch.equal(first, generate(pipe))
    events = handle.report().events
    assert events["steps reused"] > 0
    assert "threshold" not in events


def test_paused_is_dense_and_resumes():
    pipe, twin = tiny_wan_pipeline(), tiny_wan_pipeline()
    with mmaccel.accelerate(pipe, mmaccel.FirstBlockCache(threshold=0.5)) as handle:
        cached = generate(pipe)
        with handle.paused():
            assert torch.equal(generate(pipe), generate(twin))
        assert torch.equal(generate(pipe), cached)


def test_a_call_that_raised_does_not_poison_the_next():
    pipe, twin = tiny_wan_pipeline(), tiny_wan_pipeline()

    def stop(*args):
        raise RuntimeError("enough")

    with mmaccel.accelerate(pipe, mmaccel.FirstBlockCache(threshold=10.0)):
        expected = generate(pipe)
        with pytest.raises(RuntimeError, match="enough"):
            generate(pipe, seed=3, callback_on_step_end=stop)
        assert torch.equal(generate(pipe), expected)
    assert torch.equal(generate(pipe), generate(twin))


def test_the_transformer_alone_and_two_pipelines():
    one, other = tiny_wan_pipeline(), tiny_wan_pipeline()
    dense = generate(other)
    with mmaccel.accelerate(one.transformer, mmaccel.FirstBlockCache(threshold=10.0)):
        assert not torch.equal(generate(one), dense)
        assert torch.equal(generate(other), dense)
    assert torch.equal(generate(one), dense)


def test_conflicts_and_misfits_are_refused_and_nothing_is_left():
    pipe = tiny_wan_pipeline()
    before = traces(pipe)
    with mmaccel.accelerate(pipe, "first-block-cache"), pytest.raises(ConflictError, match="disable_cache"):
        mmaccel.accelerate(pipe, "first-block-cache:threshold=0.1")
    with pytest.raises(NotApplicableError, match="first-block-cache"):
        mmaccel.accelerate(pipe, "holitom:keep=0.15")
    assert traces(pipe) == before
    from diffusers.hooks.first_block_cache import FirstBlockCacheConfig

    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ConflictError, match="disable_cache"):
        mmaccel.accelerate(pipe, "first-block-cache")
