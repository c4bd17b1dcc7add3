"""FasterCache and the text K/V cache of diffusers under our handle."""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks.faster_cache import FasterCacheConfig, apply_faster_cache

import mmaccel
from mmaccel.diffusion.diffusers_caches import Clock
from mmaccel.errors import ConflictError, NotApplicableError
from tests.diffusion.families import FAMILIES, LARGE, NUCLEUS, normal
from tests.diffusion.test_caches_on_families import traces

FITS = {"cogvideox": "BFCHW", "sd3": "BCHW", "pixart": "BCHW"}
# every step is inside both ranges, as diffusers itself could not have it
ALWAYS = {"stop": 2000, "branch_stop": 2000, "branch_every": 3}
STEPS = 8


@pytest.mark.parametrize("name", FITS)
def test_it_is_what_diffusers_does(name):
    """Guided, and with ranges that do not reach the first call, at which diffusers fails."""
    family = FAMILIES[name]
    pipe, twin, time = family.build(), family.build(), []
    names = ["hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask", "pooled_projections"]
    twin.transformer.register_forward_pre_hook(
        lambda _, _args, kwargs: time.append(float(kwargs["timestep"].max())), with_kwargs=True
    )
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 700),
        unconditional_batch_skip_range=3, unconditional_batch_timestep_skip_range=(-1, 900), tensor_format=FITS[name],
        attention_weight_callback=lambda _: 0.3, current_timestep_callback=lambda: time[-1],
        _unconditional_conditional_input_kwargs_identifiers=names,
    )  # fmt: skip
    dense = family.call(twin, steps=STEPS)
    time.clear()
    apply_faster_cache(twin.transformer, config)
    method = mmaccel.FasterCache(stop=700, branch_stop=900, branch_every=3, weight=0.3)
    with mmaccel.accelerate(pipe, method) as handle:
        ours = family.call(pipe, steps=STEPS)
    assert torch.equal(ours, family.call(twin, steps=STEPS))
    assert not torch.equal(ours, dense)
    events = handle.report().events
    assert events["branches computed"] + events["branches reused"] == STEPS
    assert events["branches reused"] == sum(
        step % 3 != 0 and time[step] < 900 for step in range(STEPS)
    ) > 0  # fmt: skip


@pytest.mark.parametrize("name", FITS)
def test_calls_may_change_and_the_first_step_is_always_computed(name):
    family = FAMILIES[name]
    pipe, heard = family.build(), []
    pipe.transformer.register_forward_hook(lambda _, _args, output: heard.append(output[0].clone()))
    family.call(pipe, steps=STEPS)
    dense = heard[0]
    with mmaccel.accelerate(pipe, mmaccel.FasterCache(**ALWAYS)) as handle:
        heard.clear()
        family.call(pipe, steps=STEPS)
        assert torch.equal(heard[0], dense)
        first = family.call(pipe, steps=STEPS)
        unguided = family.call(pipe, steps=STEPS, guided=False)
        family.call(pipe, steps=5, size=LARGE)
        both = family.call(pipe, steps=STEPS, items=(0, 1))
        assert torch.equal(family.call(pipe, steps=STEPS), first)
        assert torch.equal(family.call(pipe, steps=STEPS, guided=False), unguided)
        two = family.call(pipe, steps=STEPS, items=(0, 1), guided=False)
    assert torch.allclose(both[:1], first, atol=1e-4)
    assert torch.allclose(two[:1], unguided, atol=1e-4)
    assert handle.report().events["steps reused"] > 0


@pytest.mark.parametrize("name", ["cogvideox", "sd3"])
def test_items_with_the_same_noise_are_no_branches_of_guidance(name):
    family = FAMILIES[name]
    pipe, noise = family.build(), normal(*family.latents)
    with mmaccel.accelerate(pipe, mmaccel.FasterCache(**ALWAYS)):
        two = family.call(pipe, items=(0, 1), guided=False, latents=noise.repeat(2, *[1] * (noise.ndim - 1)))
        one = family.call(pipe, items=(1,), guided=False, latents=noise)
    assert torch.allclose(two[1:], one, atol=1e-4)


def test_timesteps_of_one_at_most_are_fractions_only_from_the_start():
    clock = Clock(None)
    for steps, expected in (([999, 500, 1], [999, 500, 1]), ([1.0, 0.5, 0.1], [1000, 500, 100])):
        for step, time in zip(steps, expected, strict=True):
            clock.tick((), {"hidden_states": torch.zeros(1, 1), "timestep": torch.tensor([step])})
            assert clock() == pytest.approx(time)
        clock.last = None


@pytest.mark.parametrize("name", FITS)
def test_identity_undo_and_a_call_that_raised(name):
    family = FAMILIES[name]
    pipe, twin = family.build(), family.build()
    dense = family.call(twin)
    with mmaccel.accelerate(pipe, "fastercache:every=1;branch_every=1"):
        assert torch.equal(family.call(pipe), dense)
        assert torch.equal(family.call(pipe, guided=False), family.call(twin, guided=False))

    def stop(*_):
        raise RuntimeError("enough")

    with mmaccel.accelerate(pipe, mmaccel.FasterCache(**ALWAYS)):
        expected = family.call(pipe)
        hook = pipe.transformer.proj_out.register_forward_hook(stop)
        with pytest.raises(RuntimeError, match="enough"):
            family.call(pipe, seed=3)
        hook.remove()
        assert torch.equal(family.call(pipe), expected)
    assert traces(pipe) == traces(twin)
    assert torch.equal(family.call(pipe), dense)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in FITS])
def test_families_that_it_does_not_fit(name):
    pipe = FAMILIES[name].build()
    with pytest.raises(NotApplicableError, match=f"fastercache does not fit {type(pipe.transformer).__name__}"):
        mmaccel.accelerate(pipe, "fastercache")


def test_guidance_with_calls_of_its_own():
    family = FAMILIES["sd3"]
    pipe = family.build()
    more = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    for method in (mmaccel.FasterCache(), mmaccel.PAB()):
        with mmaccel.accelerate(pipe, method):
            with pytest.raises(NotApplicableError, match="batches of 2 and 1"):
                family.call(pipe, **more)
            family.call(pipe)
    for method in (mmaccel.TaylorSeer(interval=3, warmup=2), mmaccel.MagCache(threshold=1.0, ratios=(1.0, 1.01) * 5)):
        with mmaccel.accelerate(pipe, method) as handle:
            first = family.call(pipe, **more)
            assert torch.equal(family.call(pipe, **more), first)
        assert handle.report().events["steps reused"] > 0


def test_the_prompt_is_projected_once_a_branch_and_the_result_is_the_same():
    pipe, twin = NUCLEUS.build(), NUCLEUS.build()
    dense = {guided: NUCLEUS.call(twin, guided=guided) for guided in (True, False)}
    other = NUCLEUS.call(twin, items=(1, 2), size=LARGE)
    projected = []
    hooks = [
        block.encoder_proj.register_forward_hook(lambda *_: projected.append(1))
        for block in pipe.transformer.transformer_blocks
    ]
    mine = {"attention_mask": None}
    with mmaccel.accelerate(pipe, "text-kv-cache") as handle:
        for guided in (True, False, True):
            projected.clear()
            assert torch.equal(NUCLEUS.call(pipe, guided=guided), dense[guided])
            assert len(projected) == (4 if guided else 2)
        assert torch.equal(NUCLEUS.call(pipe, items=(1, 2), size=LARGE), other)
        NUCLEUS.call(pipe, attention_kwargs=mine)
        assert set(mine) == {"attention_mask"}
    assert handle.report().events["steps computed"] == 2 + 1 + 2 + 2 + 2
    for hook in hooks:
        hook.remove()
    assert traces(pipe) == traces(twin)
    assert torch.equal(NUCLEUS.call(pipe), dense[True])


def test_prompts_that_come_anew_at_each_step_are_told_apart():
    """A callback that replaces the embeddings frees the memory of the old ones, by which diffusers knows a prompt."""
    pipe, twin = NUCLEUS.build(), NUCLEUS.build()

    def replace(_pipe, step, _time, values):
        fresh = values["prompt_embeds"] + 0.1 * step
        values["prompt_embeds"].zero_()
        return {"prompt_embeds": fresh}

    more = {"callback_on_step_end": replace, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    with mmaccel.accelerate(pipe, "text-kv-cache"):
        assert torch.equal(NUCLEUS.call(pipe, **more), NUCLEUS.call(twin, **more))


def test_text_keys_elsewhere_are_refused():
    for name in ("ltx", "pixart", "wan_image"):
        pipe = FAMILIES[name].build()
        with pytest.raises(NotApplicableError, match="NucleusMoE"):
            mmaccel.accelerate(pipe, "text-kv-cache")
    with mmaccel.accelerate(NUCLEUS.build(), "text-kv-cache") as handle, pytest.raises(ConflictError):
        mmaccel.accelerate(handle.target, "taylorseer")
    with pytest.raises(NotApplicableError, match="no token layout"):
        mmaccel.accelerate(NUCLEUS.build(), "fastercache")


def test_pipelines_that_name_no_calls_still_hold_each_branch_apart():
    """The one of NucleusMoE opens no cache context, without which diffusers' own caches raise."""
    pipe, twin = NUCLEUS.build(), NUCLEUS.build()
    dense = NUCLEUS.call(twin)
    with mmaccel.accelerate(pipe, mmaccel.TaylorSeer(interval=2, warmup=2, order=0)) as handle:
        NUCLEUS.call(pipe, steps=3)
        first = NUCLEUS.call(pipe)
    assert handle.report().events["steps reused"] > 0
    assert not torch.equal(first, dense)
    from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig

    names = [rf"transformer_blocks\.\d+\.{part}" for part in ("attn", "img_mlp")]
    twin.transformer.enable_cache(
        TaylorSeerCacheConfig(
            cache_interval=2, disable_cache_before_step=2, max_order=0, taylor_factors_dtype=torch.float32,
            cache_identifiers=names,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="context"):
        NUCLEUS.call(twin)
    forward, calls = twin.transformer.forward, iter(range(1000))

    def named(*args, **kwargs):
        with twin.transformer.cache_context(("cond", "uncond")[next(calls) % 2]):
            return forward(*args, **kwargs)

    twin.transformer.forward = named
    twin.transformer._reset_stateful_cache()
    assert torch.equal(NUCLEUS.call(twin), first)
