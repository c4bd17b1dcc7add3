"""The caches of diffusers under our handle: what diffusers does bit for bit, identity, exact undo, other hooks kept."""

from __future__ import annotations

import re

import pytest
import torch

import mmaccel
from mmaccel.errors import ConflictError, MethodError, NonFiniteError, NotApplicableError
from mmaccel.tiny.pipelines import tiny_wan_pipeline
from tests.diffusion.test_first_block_cache import generate, traces

RATIOS = (1.0, 1.01, 0.99, 1.02, 0.98, 1.01)
NEUTRAL = [
    "taylorseer:interval=1",
    "magcache:max_skip=0",
    "pab:every=1",
    "seacache:threshold=0.0",
    "fewer-steps:keep=1.0",
]


def active():
    return {
        "first-block-cache": mmaccel.FirstBlockCache(threshold=10.0),
        "taylorseer": mmaccel.TaylorSeer(interval=3, warmup=2),
        "magcache": mmaccel.MagCache(threshold=1.0, ratios=RATIOS),
        "seacache": mmaccel.SeaCache(threshold=10.0),
        "pab": mmaccel.PAB(every=2, start=0, stop=1000),
    }


def theirs(name, pipe):
    from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
    from diffusers.hooks.mag_cache import MagCacheConfig
    from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastConfig
    from diffusers.hooks.sea_cache import SeaCacheConfig
    from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig

    everywhere = (0, 1000)
    return {
        "first-block-cache": lambda: FirstBlockCacheConfig(threshold=10.0),
        "taylorseer": lambda: TaylorSeerCacheConfig(
            cache_interval=3, disable_cache_before_step=2, taylor_factors_dtype=torch.float32,
            cache_identifiers=[r"blocks\.\d+\.(attn1|attn2|ffn)"],
        ),
        "magcache": lambda: MagCacheConfig(threshold=1.0, mag_ratios=list(RATIOS), num_inference_steps=6),
        "seacache": lambda: SeaCacheConfig(threshold=10.0),
        "pab": lambda: PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, cross_attention_block_skip_range=1,
            spatial_attention_timestep_skip_range=everywhere, current_timestep_callback=lambda: pipe.current_timestep,
        ),
    }[name]()  # fmt: skip


every = pytest.mark.parametrize("name", ["first-block-cache", "taylorseer", "magcache", "seacache", "pab"])


@every
def test_it_is_what_diffusers_does_and_calls_are_independent(name):
    pipe, twin, dense = tiny_wan_pipeline(), tiny_wan_pipeline(), tiny_wan_pipeline()
    twin.transformer.enable_cache(theirs(name, twin))
    with mmaccel.accelerate(pipe, active()[name]) as handle:
        first = generate(pipe, steps=6)
        assert torch.equal(first, generate(twin, steps=6))
        assert not torch.equal(first, generate(dense, steps=6))
        generate(pipe, height=48, steps=3)
        generate(pipe, steps=4, guidance_scale=1.0)
        assert torch.equal(first, generate(pipe, steps=6))
        assert torch.equal(generate(dense), generate(tiny_wan_pipeline()))
    assert handle.report().events["steps reused"] > 0
    assert handle.report().events["steps computed"] > 0


@pytest.mark.parametrize("spec", NEUTRAL)
def test_neutral_is_the_identity(spec):
    pipe = tiny_wan_pipeline()
    with mmaccel.accelerate(pipe, spec):
        assert torch.equal(generate(pipe), generate(tiny_wan_pipeline()))


@every
@pytest.mark.parametrize("calls", [0, 1])
def test_undo_leaves_what_an_untouched_twin_has(name, calls):
    pipe, twin = tiny_wan_pipeline(), tiny_wan_pipeline()
    with mmaccel.accelerate(pipe, active()[name]):
        for _ in range(calls):
            generate(pipe)
    for _ in range(calls):
        generate(twin)
    assert traces(pipe) == traces(twin)
    assert torch.equal(generate(pipe, seed=1), generate(twin, seed=1))


@every
def test_hooks_of_the_user_around_ours_stay(name):
    from diffusers.hooks.hooks import HookRegistry, ModelHook

    class Add(ModelHook):
        def new_forward(self, module, *args, **kwargs):
            assert self.fn_ref.original_forward is not None
            return self.fn_ref.original_forward(*args, **kwargs) + 0.25

    pipe, twin = tiny_wan_pipeline(), tiny_wan_pipeline()

    def add(which, label):
        for module in (which.transformer.blocks[0], which.transformer.blocks[0].attn1):
            HookRegistry.check_if_exists_or_initialize(module).register_hook(Add(), label)

    add(pipe, "inner")
    with mmaccel.accelerate(pipe, active()[name]):
        add(pipe, "outer")
        generate(pipe)
    add(twin, "inner")
    add(twin, "outer")
    assert torch.equal(generate(pipe), generate(twin))


@every
def test_a_call_that_raised_and_offload(name):
    pipe = tiny_wan_pipeline()

    def stop(*_):
        raise RuntimeError("enough")

    with mmaccel.accelerate(pipe, active()[name]):
        expected = generate(pipe)
        with pytest.raises(RuntimeError, match="enough"):
            generate(pipe, seed=3, callback_on_step_end=stop)
        assert torch.equal(generate(pipe), expected)
        pipe.enable_model_cpu_offload(device="cpu")
        assert torch.equal(generate(pipe), expected)
    assert torch.equal(generate(pipe), generate(tiny_wan_pipeline()))


def test_magcache_measures_in_its_first_whole_call():
    pipe, twin = tiny_wan_pipeline(), tiny_wan_pipeline()
    from mmaccel.diffusion.magcache import measured_ratios

    with pytest.raises(NotApplicableError, match="measured no ratios"):
        measured_ratios(pipe.transformer)
    with mmaccel.accelerate(pipe, mmaccel.MagCache(threshold=1e9)) as handle:
        assert torch.equal(generate(pipe), generate(twin))
        assert len(measured_ratios(pipe.transformer)) == 5
        second = generate(pipe)
        assert not torch.equal(second, generate(twin))
        assert torch.equal(generate(pipe), second)
        generate(pipe, steps=8)
    assert re.search("dense call of 5 steps", handle.report().events["ratios"])


def test_magcache_does_not_keep_ratios_of_a_call_that_gave_nan():
    pipe, twin = tiny_wan_pipeline(), tiny_wan_pipeline()

    def spoil(_pipe, step, _time, given):
        return {"latents": given["latents"] * float("nan")} if step == 1 else {}

    with mmaccel.accelerate(pipe, mmaccel.MagCache(threshold=1e9)):
        assert generate(pipe, callback_on_step_end=spoil).isnan().all()
        assert torch.equal(generate(pipe), generate(twin))
        assert not torch.equal(generate(pipe), generate(twin))


@pytest.mark.parametrize("ratios", [(), ("1", 1.0), (1.0, float("nan")), (0.0, 1.0), (1.0, float("inf"))])
def test_ratios_that_are_none(ratios):
    with pytest.raises(MethodError, match="ratios"):
        mmaccel.MagCache(ratios=ratios)


def test_a_spec_with_ratios_makes_the_same_method():
    from mmaccel.method import parse

    method = mmaccel.MagCache(threshold=0.1, ratios=RATIOS)
    assert parse(method.spec) == [method]
    with mmaccel.accelerate(tiny_wan_pipeline(), method) as handle:
        assert "magcache:threshold=0.1;ratios=(...)" in str(handle.report())


@every
def test_latents_that_are_not_finite_are_refused_and_the_next_call_is_as_ever(name):
    pipe = tiny_wan_pipeline()
    with mmaccel.accelerate(pipe, active()[name]):
        expected = generate(pipe)
        for _ in range(2):
            with pytest.raises(NonFiniteError, match="latents"):
                generate(pipe, latents=torch.full((1, 16, 3, 4, 6), float("nan")))
        assert torch.equal(generate(pipe), expected)


@every
def test_a_scheduler_that_comes_later_is_followed(name):
    pipe = tiny_wan_pipeline()

    def stop(*_):
        raise RuntimeError("enough")

    with mmaccel.accelerate(pipe, active()[name]):
        expected = generate(pipe)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="enough"):
                generate(pipe, seed=3, callback_on_step_end=stop)
            assert torch.equal(generate(pipe), expected)
    assert torch.equal(generate(pipe), generate(tiny_wan_pipeline()))
    assert "set_timesteps" not in vars(pipe.scheduler)


def test_fewer_steps_says_that_the_scheduler_was_replaced():
    pipe = tiny_wan_pipeline()
    with mmaccel.accelerate(pipe, "fewer-steps:keep=0.5"):
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        with pytest.raises(ConflictError, match="was replaced"):
            generate(pipe)
    assert torch.equal(generate(pipe), generate(tiny_wan_pipeline()))


def test_pab_with_an_empty_range_of_timesteps():
    with pytest.raises(MethodError, match="must be below"):
        mmaccel.accelerate(tiny_wan_pipeline(), mmaccel.PAB(start=900))


def test_the_patterns_of_diffusers_hook_nothing_on_wan_and_ours_do():
    from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig

    pipe = tiny_wan_pipeline()
    pipe.transformer.enable_cache(TaylorSeerCacheConfig())
    assert not any("_diffusers_hook" in vars(block.attn1) for block in pipe.transformer.blocks)
    touched = mmaccel.TaylorSeer().sites(tiny_wan_pipeline().transformer)
    assert {name.rsplit(".", 1)[1] for name in touched} == {"attn1", "attn2", "ffn"}
    with pytest.raises(ConflictError, match="disable_cache"):
        mmaccel.accelerate(pipe, "taylorseer")


def test_one_cache_at_a_time_and_none_without_a_scheduler():
    pipe = tiny_wan_pipeline()
    with pytest.raises(ConflictError):
        mmaccel.accelerate(pipe, "pab+taylorseer")
    with pytest.raises(NotApplicableError, match="scheduler"):
        mmaccel.accelerate(pipe.transformer, "fewer-steps")


@pytest.mark.parametrize(("keep", "steps"), [(0.5, 3), (0.01, 1), (0.67, 4), (2, 2), (1, 1), (9, 6)])
def test_fewer_steps_is_a_call_with_fewer_steps(keep, steps):
    pipe = tiny_wan_pipeline()
    with mmaccel.accelerate(pipe, mmaccel.FewerSteps(keep=keep)):
        assert torch.equal(generate(pipe, steps=6), generate(tiny_wan_pipeline(), steps=steps))
    assert torch.equal(generate(pipe, steps=6), generate(tiny_wan_pipeline(), steps=6))


def flux():
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip


@torch.no_grad()
def sample(transformer):
    latents = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(18.0).reshape(6, 3)
    for step in range(6):
        with transformer.cache_context("cond"):
            latents = latents - 0.1 * transformer(
                hidden_states=latents, timestep=torch.tensor([1 - step / 6]), txt_ids=ids[:2], img_ids=ids,
                encoder_hidden_states=torch.ones(1, 2, 8), pooled_projections=torch.ones(1, 8),
            ).sample  # fmt: skip
    return latents


@pytest.mark.parametrize("name", ["first-block-cache", "taylorseer", "magcache", "pab"])
def test_a_flux_transformer_alone(name):
    transformer, dense = flux(), sample(flux())
    with mmaccel.accelerate(transformer, active()[name]) as handle:
        first = sample(transformer)
        assert not torch.equal(first, dense)
        assert torch.equal(sample(transformer), first)
    assert handle.report().events["steps reused"] > 0
    assert torch.equal(sample(transformer), dense)
    with pytest.raises(NotApplicableError, match="cannot read the latents"):
        mmaccel.accelerate(transformer, "seacache")


def test_both_transformers_of_a_pipeline_with_two():
    import copy

    pipe = tiny_wan_pipeline()
    second = copy.deepcopy(pipe.transformer)
    pipe.register_modules(transformer_2=second)
    pipe.register_to_config(boundary_ratio=0.7)
    dense = generate(pipe, steps=10)
    with mmaccel.accelerate(pipe, active()["taylorseer"]):
        assert not torch.equal(generate(pipe, steps=10), dense)
        assert "taylorseer_cache" in second.blocks[0].attn1._diffusers_hook.hooks
    assert torch.equal(generate(pipe, steps=10), dense)
    with pytest.raises(NotApplicableError, match="two transformers"):
        mmaccel.accelerate(pipe, "magcache")


@every
def test_a_cache_and_fewer_steps_are_undone_in_any_order(name):
    pipe, twin = tiny_wan_pipeline(), tiny_wan_pipeline()
    cache = mmaccel.accelerate(pipe, active()[name])
    fewer = mmaccel.accelerate(pipe, "fewer-steps:keep=0.5")
    twin.transformer.enable_cache(theirs(name, twin))
    if name != "magcache":  # diffusers' config has the number of steps fixed
        assert torch.equal(generate(pipe, steps=12), generate(twin, steps=6))
    cache.remove()
    assert torch.equal(generate(pipe, steps=8), generate(tiny_wan_pipeline(), steps=4))
    fewer.remove()
    assert torch.equal(generate(pipe), generate(tiny_wan_pipeline()))
    plain = tiny_wan_pipeline()
    generate(plain)
    assert traces(pipe) == traces(plain)
