"""HSA: identity, exact rows, telescoping, budgets, memory, and what must not be left behind."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from typing import Any

import diffusers
import pytest
import torch

import mmaccel
from mmaccel.core import held_velocity
from mmaccel.core.row_attention import KeysValues
from mmaccel.errors import ConflictError, MethodError, NonFiniteError, NotApplicableError
from mmaccel.tiny import IMAGE_CALL, class_to_image
from mmaccel.tiny.pipelines import tiny_wan_pipeline
from mmaccel.tokens.steps import spread_plan, step_plan

# diffusers exports its classes lazily, out of sight of a type checker
library: Any = diffusers
torch.set_num_threads(1)


def generate(pipe, seed=0, steps=12, prompt: Any = "a word", **more):
    size = {"height": 32, "width": 48, "num_frames": 9}
    count = len(prompt) if isinstance(prompt, list) else 1
    generators = [torch.Generator().manual_seed(seed + index) for index in range(count)]
    return pipe(
        prompt, num_inference_steps=steps, output_type="latent", generator=generators, **{**size, **more}
    ).frames  # fmt: skip


def euler(pipe):
    pipe.scheduler = library.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return pipe


def traces(pipe):
    return {
        name: (sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in pipe.transformer.named_modules()
    }


def test_runtime_one_is_the_identity():
    pipe, twin = tiny_wan_pipeline(), tiny_wan_pipeline()
    with mmaccel.accelerate(pipe, "hsa:runtime=1.0"):
        assert torch.equal(generate(pipe), generate(twin))


def test_whole_steps_are_bit_identical_and_only_the_window_differs():
    """Until the first partial step the latents are those of the unmodified pipeline."""
    pipe, twin = tiny_wan_pipeline(), tiny_wan_pipeline()
    seen = {}

    def keep(name):
        def callback(_pipe, step, _time, values):
            seen[name, step] = values["latents"].clone()
            return values

        return callback

    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.6, first=4)):
        generate(pipe, callback_on_step_end=keep("ours"))
    generate(twin, callback_on_step_end=keep("dense"))
    equal = [torch.equal(seen["ours", step], seen["dense", step]) for step in range(12)]
    assert equal[:4] == [True] * 4
    assert not any(equal[5:])


def test_held_tokens_telescope_with_euler():
    """One group at divisor 3 is Euler over a schedule of which every third point is kept."""
    pipe, twin = euler(tiny_wan_pipeline()), euler(tiny_wan_pipeline())
    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, divisors=3, first=2, last=0, order=0)):
        ours = generate(pipe, steps=11)
    twin.scheduler.set_timesteps(11)
    sigmas = twin.scheduler.sigmas
    computed = [0, 1, 4, 7, 10]  # counted from the last whole step, step 1
    custom = library.FlowMatchEulerDiscreteScheduler(shift=1.0)
    original = custom.set_timesteps

    def table(*_, **more):
        original(sigmas=[float(sigmas[step]) for step in computed], device=more.get("device"))

    custom.set_timesteps = table
    twin.scheduler = custom
    assert torch.allclose(ours, generate(twin, steps=5), atol=2e-5)


class AllRows:
    """Self-attention of every row, over the keys and values of the step before at rows that `computed` leaves out."""

    before: Any = None
    computed: Any = None

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb: Any = None):
        def turned(x):
            cos, sin = rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2]
            pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pairs * torch.complex(cos.double(), sin.double())).flatten(-2).float()

        query, key = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        query, key = (turned(x.unflatten(2, (attn.heads, -1))) for x in (query, key))
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        if self.computed is not None:
            mask = self.computed[:, :, None, None]
            key, value = torch.where(mask, key, self.before[0]), torch.where(mask, value, self.before[1])
        self.before = key, value
        weights = torch.einsum("bqhd,bkhd->bhqk", query, key).mul(query.shape[-1] ** -0.5).softmax(-1)
        return attn.to_out[0](torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2))


@pytest.mark.parametrize("order", [0, 1])
def test_a_partial_step_is_that_of_all_rows_with_old_keys_and_values(order):
    """Rows that were not computed carry on along the line through their last two velocities (or stay)."""
    pipe, twin = euler(tiny_wan_pipeline()), tiny_wan_pipeline()
    record = []

    def spy(_module, _args, kwargs, output):
        record.append((dict(kwargs), output[0].clone()))

    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.9, divisors="1-2", first=2, order=order)) as handle:
        hook = pipe.transformer.register_forward_hook(spy, with_kwargs=True)
        generate(pipe, steps=4, guidance_scale=1.0)
        hook.remove()
        counted = handle.report().as_dict()["tokens"][0]
    skipped = counted["tokens_in"] - counted["tokens_out"]
    assert skipped > 0
    (_, before), (given, last), (partial, found), _ = record
    held = last
    if order:
        held = last + (last - before) / (given["timestep"] - record[0][0]["timestep"]) * (
            partial["timestep"] - given["timestep"]
        )
    same = torch.isclose(found, held, atol=1e-6).all(1)[0]
    tokens = same.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).movedim(2, 3).flatten(3).all(3).flatten()
    assert tokens.sum() == skipped
    processors = [AllRows() for _ in twin.transformer.blocks]
    for block, processor in zip(twin.transformer.blocks, processors, strict=True):
        block.attn1.set_processor(processor)
    with torch.no_grad():
        assert torch.allclose(twin.transformer(**given)[0], last, atol=1e-5)
        for processor in processors:
            processor.computed = ~tokens[None]
        expected = twin.transformer(**partial)[0]
    assert torch.allclose(torch.where(same, held, expected), found, atol=1e-5)


def test_a_full_step_after_skipping_depends_on_its_latents_only():
    pipe, twin = euler(tiny_wan_pipeline()), tiny_wan_pipeline()
    calls = []
    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, first=2, last=2)):
        pipe.transformer.register_forward_hook(
            lambda _m, _a, kwargs, output: calls.append(({**kwargs}, output[0].clone())), with_kwargs=True
        )
        generate(pipe, guidance_scale=1.0)
    with torch.no_grad():
        for kwargs, output in calls[-2:]:
            assert torch.equal(twin.transformer(**kwargs)[0], output)


def test_second_call_padded_batch_and_changes_between_calls():
    pipe = tiny_wan_pipeline()
    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, first=2)):
        first = generate(pipe)
        generate(pipe, steps=16, height=48, guidance_scale=1.0)
        both = generate(pipe, prompt=["a word", "another longer text"])
        assert torch.equal(generate(pipe), first)
        assert torch.allclose(both[:1], first, atol=1e-4)
        second = generate(pipe, prompt="another longer text", seed=1)
        assert torch.allclose(both[1:], second, atol=1e-4)


def test_undo_is_exact_in_any_order_with_diffusers_own_cache():
    pipe, twin = tiny_wan_pipeline(), tiny_wan_pipeline()
    generate(pipe)
    generate(twin)
    before = traces(twin)
    one = mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, first=2))
    generate(pipe)
    pipe.transformer.enable_cache(library.FirstBlockCacheConfig(threshold=0.5))
    one.remove()
    twin.transformer.enable_cache(library.FirstBlockCacheConfig(threshold=0.5))
    assert torch.equal(generate(pipe), generate(twin))
    assert traces(pipe) == traces(twin)
    assert before != traces(twin)


@pytest.mark.parametrize("spec", ["hsa:runtime=0.5", "hsa:runtime=0.5;first=2", "hsa:runtime=0.5;between=0.3"])
def test_a_velocity_that_is_not_finite_is_not_held(spec):
    pipe, calls = tiny_wan_pipeline(), []
    with mmaccel.accelerate(pipe, spec):
        expected = generate(pipe)
        hook = pipe.transformer.blocks[0].attn1.to_v.register_forward_hook(
            lambda _m, _a, output: output * float("nan") if len(calls) > 4 or calls.append(1) else output
        )
        with pytest.raises(NonFiniteError, match="velocity"):
            generate(pipe)
        hook.remove()
        assert torch.equal(generate(pipe), expected)


@pytest.mark.parametrize(
    "cache",
    [
        library.FirstBlockCacheConfig(threshold=10.0),
        library.TaylorSeerCacheConfig(cache_interval=2, cache_identifiers=[r"blocks\.\d+\.attn1"]),
    ],
)
def test_a_cache_of_diffusers_is_refused_and_gone_without_a_trace(cache):
    pipe = tiny_wan_pipeline()
    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, first=2)):
        expected = generate(pipe)
        pipe.transformer.enable_cache(cache)
        with pytest.raises(ConflictError, match="disable_cache"):
            generate(pipe)
        pipe.transformer.disable_cache()
        assert torch.equal(generate(pipe), expected)
    pipe.transformer.enable_cache(cache)
    with pytest.raises(ConflictError, match="disable_cache"):
        mmaccel.accelerate(pipe, "hsa")


def test_a_prompt_that_a_callback_changes_in_place_is_noticed():
    pipe = tiny_wan_pipeline()

    def weaken(_pipe, _step, _time, tensors):
        tensors["prompt_embeds"].mul_(0.5)
        return tensors

    call = {"callback_on_step_end": weaken, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    dense = generate(pipe, **call)
    with mmaccel.accelerate(pipe, "hsa:runtime=1.0"):
        assert torch.equal(generate(pipe, **call), dense)
    assert not torch.equal(generate(pipe), dense)


def test_a_call_that_raised_does_not_poison_the_next_and_two_pipelines_are_apart():
    pipe, other = tiny_wan_pipeline(), tiny_wan_pipeline(seed=1)
    dense = generate(other)

    def stop(_pipe, step, *_):
        if step == 5:
            raise RuntimeError("enough")
        return {}

    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, first=2)) as handle:
        expected = generate(pipe)
        with pytest.raises(RuntimeError, match="enough"):
            generate(pipe, seed=3, callback_on_step_end=stop)
        assert torch.equal(generate(pipe), expected)
        assert torch.equal(generate(other), dense)
        with handle.paused():
            assert torch.equal(generate(pipe), generate(tiny_wan_pipeline()))


def test_it_works_with_offloaded_models():
    pipe = tiny_wan_pipeline()
    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, first=2)):
        expected = generate(pipe)
    dense = generate(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, first=2)):
        for _ in range(3):  # each call takes the hooks of offloading away and puts them on again
            assert torch.equal(generate(pipe), expected)
    assert torch.equal(generate(pipe), dense)


@pytest.mark.parametrize(("memory", "near"), [("half", 0.05), ("fp8", 0.2)])
def test_stored_precision_stays_near(memory, near):
    pipe = tiny_wan_pipeline()
    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, first=2)):
        full = generate(pipe)
    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, first=2, memory=memory)):
        lossy = generate(pipe)
    assert 0 < (lossy - full).norm() / full.norm() < near


def test_memory_is_computed_exactly_and_refused_before_it_is_made(monkeypatch):
    pipe = tiny_wan_pipeline()
    # 2 (K, V) x 3 layers x 18 tokens x width x 4 bytes x 2 branches
    width = pipe.transformer.config.num_attention_heads * pipe.transformer.config.attention_head_dim
    wanted = 2 * 3 * 18 * width * 4 * 2
    monkeypatch.setattr(held_velocity, "free_memory", lambda *_: wanted - 1)
    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, first=2)):
        with pytest.raises(MethodError, match=r"memory=half;layers=1 .*"):
            generate(pipe)
        monkeypatch.setattr(held_velocity, "free_memory", lambda *_: wanted)
        generate(pipe)


def two_experts():
    pipe, second = euler(tiny_wan_pipeline()), tiny_wan_pipeline(seed=1)
    parts = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")}
    pipe = library.WanPipeline(**parts, transformer_2=second.transformer, boundary_ratio=0.6)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_second_expert_begins_with_a_whole_step():
    pipe, twin = two_experts(), two_experts()
    calls = []
    with mmaccel.accelerate(pipe, "hsa:runtime=1.0"):
        assert torch.equal(generate(pipe), generate(twin))
    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, first=2)) as handle:
        for name in ("transformer", "transformer_2"):
            getattr(pipe, name).register_forward_hook(
                lambda _m, _a, kwargs, output, name=name: calls.append((name, kwargs, output[0])), with_kwargs=True
            )
        first = generate(pipe, steps=20, guidance_scale=3.0)
        counted = handle.report().as_dict()["tokens"][0]
        assert torch.equal(generate(pipe, steps=20, guidance_scale=3.0), first)
    assert counted["kept"] == pytest.approx(0.5, abs=0.06)
    _, kwargs, output = next(call for call in calls if call[0] == "transformer_2")
    with torch.no_grad():
        assert torch.equal(twin.transformer_2(**kwargs)[0], output)


def test_8_bit_storage_survives_large_values():
    pipe = tiny_wan_pipeline()
    with torch.no_grad():
        for block in pipe.transformer.blocks:
            block.attn1.to_v.weight *= 1e4
    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, first=2, memory="fp8")):
        assert torch.isfinite(generate(pipe)).all()


def test_nothing_is_held_between_calls():
    pipe = tiny_wan_pipeline()
    alive: list[weakref.ref] = []
    store = KeysValues.store

    def watched(self, *parts):
        alive.extend(map(weakref.ref, parts))
        store(self, *parts)

    with pytest.MonkeyPatch.context() as patch, mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, first=2)):
        patch.setattr(KeysValues, "store", watched)
        generate(pipe)
        gc.collect()
        assert alive
        assert not any(reference() is not None for reference in alive)


def test_branches_of_guidance_in_one_batch_share_their_rows():
    pipe = class_to_image()
    seen = []
    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, first=2)):
        pipe.transformer.transformer_blocks[0].register_forward_hook(
            lambda _m, _args, kwargs, output: seen.append(output), with_kwargs=True
        )
        both = pipe(
            [0, 5], generator=[torch.Generator().manual_seed(n) for n in (0, 1)], output_type="np", **IMAGE_CALL
        )
        alone = pipe([5], generator=[torch.Generator().manual_seed(1)], output_type="np", **IMAGE_CALL)
    assert abs(both.images[1] - alone.images[0]).max() < 1e-4
    assert {len(output) for output in seen} == {4, 2}


def evaluations(plan):
    """Evaluations of a token in a run, on average, counted step by step."""
    return sum(int(step.sum()) for step in plan.active(1000)) / 1000


@pytest.mark.parametrize("multistep", [False, True])
@pytest.mark.parametrize("between", [0.0, 0.1, 0.3])
def test_spread_plans_meet_their_budget_exactly_and_compute_the_needy_first(between, multistep):
    for steps, runtime in itertools.product((8, 12, 20, 28, 40, 50), (0.1, 0.25, 0.3, 0.4, 0.5, 0.65, 0.8, 0.95, 1.0)):
        if runtime * steps < max(3, steps / 16):
            with pytest.raises(MethodError, match="smallest runtime is"):
                spread_plan(steps, runtime, between=between, multistep=multistep)
            continue
        plan = spread_plan(steps, runtime, between=between, multistep=multistep)
        active = plan.active(1000)
        assert active.shape == (steps, 1000)
        assert evaluations(plan) / steps == pytest.approx(runtime, abs=1e-3)
        assert active[0].all()
        assert (active.int().diff(dim=1) <= 0).all()  # whoever is computed, all in greater need are
        whole = [0, *(step for step in range(1, steps) if active[step].all()), steps]
        assert max(b - a for a, b in itertools.pairwise(whole)) <= max(
            1, math.ceil(1 / runtime / (1 - between)) + 1, steps // 2
        )


def test_whoever_needs_too_little_is_told_so():
    with pytest.raises(MethodError, match=r"smallest runtime is 0\.075\.$"):
        spread_plan(40, 0.05)
    assert evaluations(spread_plan(40, 0.075)) == pytest.approx(3)
    with pytest.raises(MethodError, match="does not pay"):
        spread_plan(4, 0.5)


def test_plans_meet_their_budget():
    for steps, runtime in itertools.product((12, 20, 28, 40, 50), (0.3, 0.4, 0.5, 0.65, 0.8, 0.95)):
        plan = step_plan(steps, runtime)
        assert evaluations(plan) / steps == pytest.approx(runtime, abs=0.02)
        assert sum(plan.shares) == pytest.approx(1.0)


def test_the_smallest_runtime_is_named_and_can_be_reached():
    with pytest.raises(MethodError, match=r"smallest runtime is 0\.1") as caught:
        step_plan(40, 0.05)
    smallest = float(str(caught.value).split("smallest runtime is ")[1].rstrip("."))
    assert evaluations(step_plan(40, smallest + 1e-3)) / 40 == pytest.approx(smallest, abs=0.01)
    with pytest.raises(MethodError, match="does not pay"):
        step_plan(4, 0.25)


def test_misuse_is_refused():
    pipe = tiny_wan_pipeline()
    with pytest.raises(NotApplicableError, match="give it the pipeline"):
        mmaccel.accelerate(pipe.transformer, "hsa")
    with pytest.raises(MethodError, match="divisors"):
        mmaccel.HSA(divisors="2-x")
    with pytest.raises(MethodError, match="between"):
        mmaccel.HSA(between=0.2, first=2)
    with mmaccel.accelerate(pipe, "hsa:runtime=0.5"):
        with pytest.raises(ConflictError):
            mmaccel.accelerate(pipe, "first-block-cache")
        with pytest.raises(ConflictError):
            mmaccel.accelerate(pipe, "hsa:runtime=0.4")
        with pytest.raises(NonFiniteError, match="latents"):
            generate(pipe, latents=torch.full((1, 16, 3, 4, 6), float("nan")))
        generate(pipe)
    pipe.scheduler = library.DDIMScheduler()
    with pytest.raises(NotApplicableError, match="sigmas"):
        mmaccel.accelerate(pipe, "hsa")
