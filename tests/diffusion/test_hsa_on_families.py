"""HSA on whole pipelines of every family: identity, honest counts, undo, changes between calls, failures."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.overrides import TorchFunctionMode

import mmaccel
from mmaccel.core.row_attention import KeysValues
from mmaccel.errors import MethodError, NonFiniteError, NotApplicableError
from tests.diffusion.families import FAMILIES, LARGE, Family, cogvideox, dit, hunyuan, library, pixart

every = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
# the first two steps are whole, and so is the first one of a second expert
STEPS = 12


def traces(pipe):
    return [
        (name, sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for which in ("transformer", "transformer_2")
        if getattr(pipe, which, None) is not None
        for name, module in getattr(pipe, which).named_modules()
    ]


def rows_of_the_first_block(pipe, text):
    """Rows that reach the feed-forward module of each transformer's first block, a list that fills by itself."""
    seen = []
    for which in ("transformer", "transformer_2"):
        transformer = getattr(pipe, which, None)
        if transformer is not None:
            block = getattr(transformer, "transformer_blocks", None) or transformer.blocks
            forward = getattr(block[0], "ff", None) or block[0].ffn
            forward.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1] - text))
    return seen


@every
def test_runtime_one_is_the_identity(family: Family):
    pipe, twin = family.build(), family.build()
    with mmaccel.accelerate(pipe, "hsa:runtime=1.0") as handle:
        for guided in (True, False):
            assert torch.equal(family.call(pipe, steps=4, guided=guided), family.call(twin, steps=4, guided=guided))
    assert handle.report().as_dict()["tokens"][0]["kept"] == 1.0


@every
def test_half_the_rows_are_computed_and_the_report_says_so(family: Family):
    """Rows are counted where they arrive, inside the first block."""
    pipe = family.build()
    dense = family.call(pipe, steps=STEPS)
    seen = rows_of_the_first_block(pipe, family.text)
    family.call(pipe, steps=STEPS)
    whole = sum(seen)
    assert whole % (STEPS * family.tokens) == 0
    seen.clear()
    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, first=2)) as handle:
        ours = family.call(pipe, steps=STEPS)
        counted = handle.report().as_dict()["tokens"][0]
    assert torch.isfinite(ours).all()
    assert not torch.equal(ours, dense)
    assert sum(seen) / whole == pytest.approx(0.5, abs=0.05)
    assert counted["tokens_in"] == whole
    assert counted["tokens_out"] == sum(seen)
    assert "memory of keys and values" in handle.report().events


@every
def test_calls_are_independent_whatever_changes_between_them(family: Family):
    pipe = family.build()
    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, first=2)):
        first = family.call(pipe, steps=STEPS)
        family.call(pipe, steps=13, items=(1,))
        family.call(pipe, steps=STEPS, size=LARGE)
        unguided = family.call(pipe, steps=STEPS, guided=False)
        assert torch.equal(family.call(pipe, steps=STEPS), first)
        family.call(pipe, steps=STEPS, items=(0, 1, 2))
        assert torch.equal(family.call(pipe, steps=STEPS, guided=False), unguided)
        assert torch.equal(family.call(pipe, steps=STEPS), first)


@pytest.mark.parametrize(
    ("name", "guided"), [(name, True) for name in FAMILIES] + [(name, False) for name in ("ltx", "flux", "dit", "ltx2")]
)
def test_a_batch_equals_single_items(name, guided):
    family = FAMILIES[name]
    pipe = family.build()
    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, first=2)):
        both = family.call(pipe, steps=STEPS, items=(0, 1), guided=guided)
        alone = [
            family.call(pipe, steps=STEPS, items=(item,), seed=item, guided=guided)
            for item in (0, 1)
        ]  # fmt: skip
    assert torch.allclose(both, torch.cat(alone), atol=2e-4)


@every
def test_undo_is_exact_and_pipelines_are_independent(family: Family):
    pipe, twin = family.build(), family.build()
    family.call(pipe, steps=2)  # the first call leaves a registry of diffusers' own
    family.call(twin, steps=2)
    before = traces(twin)
    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, first=2)):
        family.call(pipe, steps=STEPS)
        expected = family.call(twin, steps=STEPS, seed=1)
    assert traces(pipe) == before
    assert torch.equal(family.call(pipe, steps=STEPS, seed=1), expected)


@pytest.mark.parametrize("name", ["hunyuan", "flux", "cogvideox", "sd3", "wan_image", "ltx2"])
def test_half_of_the_layers_may_keep_keys_and_values(name):
    """In the others computed rows see each other only, with masks and tables to match."""
    family = FAMILIES[name]
    pipe = family.build()
    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, first=2, layers=0.5, memory="fp8")):
        first = family.call(pipe, steps=STEPS)
        assert torch.isfinite(first).all()
        both = family.call(pipe, steps=STEPS, items=(0, 1))
    assert torch.allclose(both[:1], first, atol=2e-4)


@pytest.mark.parametrize("name", ["ltx", "flux", "dit", "wan_two_experts", "wan_token_times"])
def test_models_that_wait_on_another_device(name):
    family = FAMILIES[name]
    pipe = family.build()
    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, first=2)):
        expected = family.call(pipe, steps=STEPS)
        pipe.enable_model_cpu_offload(device="cpu")
        assert torch.equal(family.call(pipe, steps=STEPS), expected)


@pytest.mark.parametrize("name", ["ltx2", "flux", "cogvideox", "sd3", "wan_two_experts", "wan_token_times"])
def test_a_callback_that_raises_or_interrupts_leaves_the_pipeline_usable(name):
    family = FAMILIES[name]
    pipe = family.build()

    def stop(_pipe, step, *_):
        if step == 5:
            raise RuntimeError("enough")
        return {}

    def interrupt(pipe, step, *_):
        pipe._interrupt = step >= 6
        return {}

    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, first=2)):
        expected = family.call(pipe, steps=STEPS)
        with pytest.raises(RuntimeError, match="enough"):
            family.call(pipe, steps=STEPS, items=(2,), callback_on_step_end=stop)
        assert torch.equal(family.call(pipe, steps=STEPS), expected)
        family.call(pipe, steps=STEPS, items=(2,), callback_on_step_end=interrupt)
        assert torch.equal(family.call(pipe, steps=STEPS), expected)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "dit"])  # which takes no latents
def test_latents_that_are_not_numbers_are_refused(name):
    family = FAMILIES[name]
    pipe = family.build()
    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, first=2)):
        with pytest.raises(NonFiniteError, match="latents of the first step"):
            family.call(pipe, steps=STEPS, latents=torch.full(family.latents, float("nan")))
        family.call(pipe, steps=STEPS)


@every
def test_few_steps_do_not_pay_and_the_message_says_so(family: Family):
    pipe = family.build()
    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.4)), pytest.raises(MethodError, match="does not pay"):
        family.call(pipe, steps=4)


@pytest.mark.parametrize("build", [
    lambda: dit(library.DDIMScheduler()),
    lambda: pixart(library.DDPMScheduler()),
    lambda: cogvideox(library.CogVideoXDDIMScheduler()),
    lambda: cogvideox(library.CogVideoXDPMScheduler()),
])  # fmt: skip
def test_schedulers_without_sigmas_are_refused(build):
    pipe = build()
    with pytest.raises(NotApplicableError, match=f"{type(pipe.scheduler).__name__} has none"):
        mmaccel.accelerate(pipe, "hsa")


def test_held_noise_telescopes_with_a_first_order_solver_and_the_report_names_it():
    """One group at divisor 3 is the solver over every third timestep: its update is linear in the predicted noise."""
    family, noise = FAMILIES["pixart"], {"prediction_type": "epsilon", "use_flow_sigmas": False, "solver_order": 1}
    pipe, twin = (
        pixart(library.DPMSolverMultistepScheduler(**noise)),
        pixart(library.DPMSolverMultistepScheduler(**noise)),
    )
    with mmaccel.accelerate(pipe, mmaccel.HSA(divisors=3, first=2, last=0, order=0)) as handle:
        ours = family.call(pipe, steps=11)
    times = pipe.scheduler.timesteps[[0, 1, 4, 7, 10]].tolist()
    assert torch.allclose(ours, family.call(twin, steps=5, timesteps=times), atol=1e-4)
    assert "prediction of type epsilon" in handle.report().lines()[0]
    with mmaccel.accelerate(FAMILIES["pixart"].build(), "hsa") as handle:
        assert not any("prediction" in line for line in handle.report().lines())


@pytest.mark.parametrize("name", ["ltx2", "sd3", "flux"])
def test_nothing_is_held_between_calls(name):
    """Whatever branches of guidance there were, also such as pause."""
    more = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.4} if name == "sd3" else {}
    pipe, alive, store = FAMILIES[name].build(), [], KeysValues.store

    def watched(self, *parts):
        alive.extend(map(weakref.ref, parts))
        store(self, *parts)

    with pytest.MonkeyPatch.context() as patch, mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, first=2)):
        patch.setattr(KeysValues, "store", watched)
        FAMILIES[name].call(pipe, steps=STEPS, **more)
        gc.collect()
        assert alive
        assert not any(reference() is not None for reference in alive)


@pytest.mark.parametrize(("start", "stop"), [(0.0, 1.0), (0.2, 0.6)])
def test_further_calls_of_a_step_with_a_batch_of_their_own(start, stop):
    """Guidance by skipped layers calls the transformer once more in some of the steps, without the empty prompt."""
    family = FAMILIES["sd3"]
    pipe = family.build()
    more = {"skip_guidance_layers": [1], "skip_layer_guidance_start": start, "skip_layer_guidance_stop": stop}
    seen = rows_of_the_first_block(pipe, 0)
    family.call(pipe, steps=STEPS, **more)
    whole = sum(seen)
    seen.clear()
    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.5, first=2)) as handle:
        first = family.call(pipe, steps=STEPS, **more)
        assert sum(seen) / whole == pytest.approx(0.5, abs=0.1)
        assert handle.report().as_dict()["tokens"][0]["tokens_out"] == sum(seen)
        plain = family.call(pipe, steps=STEPS)
        assert torch.equal(family.call(pipe, steps=STEPS, **more), first)
        assert torch.equal(family.call(pipe, steps=STEPS), plain)
        both = family.call(pipe, steps=STEPS, items=(0, 1), **more)
    assert torch.allclose(both[:1], first, atol=2e-4)


def test_sound_is_computed_at_every_step():
    pipe = FAMILIES["ltx2"].build()
    seen, calls = [], []
    audio = pipe.transformer.transformer_blocks[0].audio_ff
    audio.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.35, divisors=4)):
        FAMILIES["ltx2"].call(pipe, steps=STEPS)
    assert len(seen) == len(calls) == 3 * STEPS
    assert len(set(seen)) == 1


def test_blocks_that_treat_the_first_frame_unlike_the_others():
    """HunyuanVideo from an image: its blocks take the first rows for the image's, which rows chosen are not."""
    family, pipe = FAMILIES["hunyuan"], hunyuan(image_condition_type="token_replace")
    dense = family.call(pipe, steps=STEPS)
    with mmaccel.accelerate(pipe, "hsa:runtime=1.0"):
        assert torch.equal(family.call(pipe, steps=STEPS), dense)
    with (
        mmaccel.accelerate(pipe, "hsa:runtime=0.5;first=2"),
        pytest.raises(NotApplicableError, match="token_replace_emb"),
    ):
        family.call(pipe, steps=STEPS)
    with mmaccel.accelerate(pipe, "tomesd") as handle:
        assert torch.equal(family.call(pipe, steps=STEPS), dense)
    assert any("token_replace_emb" in line for line in handle.report().lines())


class Lengths(TorchFunctionMode):
    """Notes how many queries and keys each attention has."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention:
            query, key = (*args, *(kwargs[name] for name in ("query", "key") if name in kwargs))[:2]
            self.seen.add((query.shape[2], key.shape[2]))
        return func(*args, **kwargs)


@pytest.mark.parametrize("divisors", [None, 4])
def test_sound_always_hears_all_of_the_picture(divisors):
    """Also at steps at which no token of it is due."""
    family, dense, ours = FAMILIES["ltx2"], Lengths(), Lengths()
    pipe = family.build()
    with dense:
        family.call(pipe, steps=2)
    with mmaccel.accelerate(pipe, mmaccel.HSA(runtime=0.35, divisors=divisors, first=2)), ours:
        family.call(pipe, steps=STEPS)
    sound = {pair for pair in dense.seen if pair[0] != family.tokens}
    assert {pair[1] for pair in sound} > {family.tokens}
    assert {pair for pair in ours.seen if pair[0] in {queries for queries, _ in sound}} == sound
    assert {keys for queries, keys in ours.seen if queries < family.tokens} <= {pair[1] for pair in dense.seen}


def test_a_transformer_compiled_in_place_works_and_a_replaced_one_is_told_how():
    family = FAMILIES["wan_image"]
    pipe, twin = family.build(), family.build()
    with mmaccel.accelerate(twin, "hsa:runtime=0.5"):
        expected = family.call(twin, steps=STEPS)
    original = pipe.transformer
    pipe.transformer = torch.compile(original, backend="eager")
    with pytest.raises(NotApplicableError, match="compile in place behind accelerate"):
        mmaccel.accelerate(pipe, "hsa:runtime=0.5")
    pipe.transformer = original
    with mmaccel.accelerate(pipe, "hsa:runtime=0.5"):
        pipe.transformer.compile(backend="eager")
        assert torch.allclose(family.call(pipe, steps=STEPS), expected, atol=1e-4)
    dense = family.call(family.build(), steps=STEPS)
    assert torch.allclose(family.call(pipe, steps=STEPS), dense, atol=1e-4)
