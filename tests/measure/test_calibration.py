"""calibrate: the setting nearest to the dense result within a budget of work, and a pipeline that is left as found."""

from __future__ import annotations

import copy
import itertools
import json
import math
import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mmaccel
from mmaccel.errors import AdapterError, ConflictError, MethodError, MMAccelError, NonFiniteError, NotApplicableError
from mmaccel.measure.calibrated import label
from mmaccel.measure.search_space import first_fitting, ladders
from mmaccel.tiny import class_to_image, text_to_video
from mmaccel.tiny.pipelines import tiny_text_lm, tiny_wan_pipeline

PROMPTS = ["a word", "another thing"]
CALL = {"height": 32, "width": 48, "num_frames": 9, "max_sequence_length": 16}
STEPS, RUNTIME, SEED = 7, 0.6, 3
SOME = ("fewer-steps", "first-block-cache", "taylorseer:interval=3;warmup=1", "hsa:order=0", "pab:every=3")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def calibration():
    return mmaccel.calibrate(tiny_wan_pipeline(), PROMPTS, RUNTIME, SOME, STEPS, SEED, **CALL)


def latents(pipe, number, steps=STEPS):
    generator = torch.Generator().manual_seed(SEED + number)
    return pipe(
        PROMPTS[number], num_inference_steps=steps, output_type="latent", generator=generator, **CALL
    ).frames  # fmt: skip


def counted(pipe, number):
    """Latents, and FLOPs below the transformer's own name by the library's counter alone."""
    with FlopCounterMode(display=False) as counter:
        made = latents(pipe, number).double()
    return made, sum(counter.get_flop_counts()[type(pipe.transformer).__name__].values())


def by_hand(pipe, dense, method):
    """Work and distance of a method."""
    with mmaccel.accelerate(pipe, method):
        made = [counted(pipe, number) for number in range(len(PROMPTS))]
    apart = [math.sqrt(((a - b) ** 2).sum() / (b**2).sum()) for (a, _), (b, _) in zip(made, dense, strict=True)]
    return sum(flops for _, flops in made) / sum(flops for _, flops in dense), sum(apart) / len(apart)


def test_the_best_is_the_nearest_within_the_budget_measured_by_hand(calibration):
    pipe = tiny_wan_pipeline()
    dense = [counted(pipe, number) for number in range(len(PROMPTS))]
    measured = {one.method: by_hand(pipe, dense, one.method) for one in calibration.candidates}
    for one in calibration.candidates:
        work, distance = measured[one.method]
        assert one.work == pytest.approx(work, rel=1e-9)
        assert one.distance == pytest.approx(distance, rel=1e-5)
    within = {method: distance for method, (work, distance) in measured.items() if work <= RUNTIME + 1e-9}
    assert calibration.method == min(within, key=lambda method: within[method])
    assert len({method.info.name for method in within}) > 2
    assert any(work > RUNTIME for work, _ in measured.values())


def test_the_best_of_each_method_is_timed_and_compared_in_pixels(calibration):
    seen = set()
    for one in calibration.candidates:
        first = one.fits(RUNTIME) and one.method.info.name not in seen
        assert (one.time is not None) == (one.psnr is not None) == first
        if first:
            seen.add(one.method.info.name)
            assert 0 < one.time < 10
    pipe, error = tiny_wan_pipeline(), []
    for number in range(len(PROMPTS)):
        pictures = []
        for method in (None, calibration.method):
            with mmaccel.accelerate(pipe, *([method] if method else ["fewer-steps:keep=1.0"])):
                generator = torch.Generator().manual_seed(SEED + number)
                pictures.append(
                    pipe(
                        PROMPTS[number], num_inference_steps=STEPS, output_type="np", generator=generator, **CALL
                    ).frames.astype(np.float64)
                )  # fmt: skip
        error.append(-10 * math.log10(((pictures[0] - pictures[1]) ** 2).mean()))
    assert calibration.best.psnr == pytest.approx(sum(error) / len(error), abs=1e-3)


def test_two_calibrations_agree(calibration):
    some = [name for name in SOME if not name.startswith(("taylorseer", "pab"))]
    other = mmaccel.calibrate(tiny_wan_pipeline(), iter(PROMPTS), RUNTIME, some, STEPS, SEED, **CALL)
    names = {one.method.info.name for one in other.candidates}
    assert names == {"fewer-steps", "first-block-cache", "hsa"}
    first = [one for one in calibration.candidates if one.method.info.name in names]
    assert [replace(one, time=None) for one in other.candidates] == [replace(one, time=None) for one in first]


def test_what_does_not_reach_the_budget_is_named(calibration):
    assert set(calibration.unreached) == {"pab"}
    least = next(one for one in calibration.candidates if one.method.info.name == "pab")
    assert calibration.unreached["pab"].startswith(f"{least.work:.3f} at least")
    text = str(calibration)
    assert "without a setting: pab (0." in text
    assert f"{label(calibration.method)} <- best" in " ".join(text.split())
    assert repr(calibration) == (
        f"<Calibration of WanPipeline: {label(calibration.method)} at {calibration.best.work:.3f} of the work, "
        f"distance {calibration.best.distance:.4f}; {len(calibration.candidates)} settings tried>"
    )


def state(pipe):
    """Everything that a calibration could leave on a pipeline."""
    modules = {}
    for part, component in pipe.components.items():
        if isinstance(component, torch.nn.Module) and part != "vae":  # any call leaves its buffers there
            for name, module in component.named_modules():
                hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
                modules[part, name] = type(module), sorted(vars(module)), hooks, module.training
    scheduler = {name: repr(value) for name, value in vars(pipe.scheduler).items()}
    own = {name: id(value) for name, value in vars(pipe).items()}
    return modules, scheduler, own, dict(pipe.config)


@pytest.mark.parametrize("stop", [None, KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("used", [False, True])
def test_the_pipeline_is_left_as_found(stop, used):
    pipe, twin = tiny_wan_pipeline(), tiny_wan_pipeline()
    if used:
        latents(pipe, 0, steps=6)
        latents(twin, 0, steps=6)
    before, random, calls = state(pipe), torch.random.get_rng_state(), []

    def interrupt(candidate):
        calls.append(candidate)
        if stop is not None and len(calls) == 3:
            raise stop

    def run():
        return mmaccel.calibrate(pipe, "a word", 0.6, ["magcache", "hsa"], 6, progress=interrupt, **CALL)

    if stop is None:
        run()
    else:
        with pytest.raises(stop):
            run()
    assert state(pipe) == before
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(latents(pipe, 1), latents(twin, 1))


def test_an_interrupt_inside_a_step_leaves_no_method_on():
    pipe, calls = tiny_wan_pipeline(), []
    before = state(pipe)

    def interrupt(*_):
        calls.append(1)
        if len(calls) > 8:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        mmaccel.calibrate(pipe, "a word", 0.5, ["hsa"], 6, callback_on_step_end=interrupt, **CALL)
    assert state(pipe) == before
    assert torch.equal(latents(pipe, 0), latents(tiny_wan_pipeline(), 0))


def test_save_and_load(calibration, tmp_path):
    path = calibration.save(tmp_path / "calibration.json")
    again = mmaccel.Calibration.load(path)
    assert again == calibration
    assert again.method == calibration.method
    assert json.loads(path.read_text())["runtime"] == RUNTIME
    with pytest.raises(MMAccelError, match="cannot be written"):
        calibration.save(tmp_path / "nowhere" / "calibration.json")
    with pytest.raises(MMAccelError, match="cannot be read"):
        mmaccel.Calibration.load(tmp_path / "none.json")
    for text, message in (
        ("[", "cannot be read"),
        ("[]", "no calibration"),
        ('{"kind": "calibration", "format": 99}', "no calibration"),
        ('{"kind": "calibration", "format": 1}', "damaged"),
        (path.read_text().replace("first-block-cache", "no-such-cache"), "no-such-cache"),
        (path.read_text().replace('"threshold"', '"treshold"'), "damaged"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(MMAccelError, match=message):
            mmaccel.Calibration.load(tmp_path / "bad.json")


def test_measured_ratios_survive_a_file(tmp_path):
    pipe = tiny_wan_pipeline()
    found = mmaccel.calibrate(pipe, PROMPTS, 0.6, "magcache", 6, **CALL)
    # the dense residuals of the blocks, by hooks: mean over tokens of the ratio of their norms
    assert len(found.method.ratios) == 6
    assert mmaccel.Calibration.load(found.save(tmp_path / "c.json")).method == found.method
    assert "ratios=measured" in label(found.method)
    expected = np.mean(
        [residual_ratios(tiny_wan_pipeline(), prompt, number) for number, prompt in enumerate(PROMPTS)], 0
    )
    np.testing.assert_allclose(found.method.ratios, expected, rtol=1e-4)


def test_a_method_that_measures_in_its_first_call_is_judged_by_the_next():
    method, pipe = mmaccel.MagCache(threshold=1e9), tiny_wan_pipeline()
    found = mmaccel.calibrate(pipe, PROMPTS, 0.9, [method], STEPS, SEED, **CALL).best
    dense = [counted(pipe, number) for number in range(len(PROMPTS))]
    with mmaccel.accelerate(pipe, method):
        assert torch.equal(counted(pipe, 0)[0], dense[0][0])
        made = [counted(pipe, number) for number in range(len(PROMPTS))]
    assert found.work == pytest.approx(sum(flops for _, flops in made) / sum(flops for _, flops in dense))
    apart = [float((a - b).norm() / b.norm()) for (a, _), (b, _) in zip(made, dense, strict=True)]
    assert found.distance == pytest.approx(sum(apart) / 2, rel=1e-5)
    assert found.psnr < 60


def residual_ratios(pipe, prompt, seed):
    """Ratio of the norms of successive residuals of all blocks, mean over tokens, in the branch with the prompt."""
    residuals, entered = [], []
    first, last = pipe.transformer.blocks[0], pipe.transformer.blocks[-1]
    hooks = [
        first.register_forward_pre_hook(lambda _, args: entered.append(args[0].clone())),
        last.register_forward_hook(lambda _m, _a, output: residuals.append(output - entered[-1])),
    ]
    pipe(
        prompt, num_inference_steps=6, output_type="latent", generator=torch.Generator().manual_seed(seed), **CALL
    )  # fmt: skip
    for hook in hooks:
        hook.remove()
    norms = [residual.float().norm(dim=-1) for residual in residuals[::2]]
    return [1.0, *(float((b / a).mean()) for a, b in itertools.pairwise(norms))]


def test_accelerate_takes_it_and_warns_where_it_is_for_another(calibration):
    pipe = tiny_wan_pipeline()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with mmaccel.accelerate(pipe, calibration) as handle:
            assert handle.methods == (calibration.method,)
            made = latents(pipe, 0)
    with mmaccel.accelerate(pipe, calibration.method):
        assert torch.equal(latents(pipe, 0), made)
    other = tiny_wan_pipeline(seed=9)
    with pytest.warns(UserWarning, match="other weights"), mmaccel.accelerate(other, calibration):
        pass
    half = tiny_wan_pipeline()
    half.transformer.to(torch.bfloat16)
    assert calibration.differences(half) == []
    assert calibration.differences(pipe, steps=STEPS) == []
    assert calibration.differences(pipe, steps=4) == [f"4 steps, not {STEPS}"]
    pipe.scheduler = euler(pipe)
    with pytest.warns(UserWarning, match="FlowMatchEulerDiscreteScheduler, not UniPCMultistepScheduler"):
        mmaccel.accelerate(pipe, calibration).remove()


def test_it_is_no_method_for_another_kind_of_model(calibration):
    model, _ = tiny_text_lm()
    something_else = pytest.warns(UserWarning, match="calibrated for something else")
    with something_else, pytest.raises(NotApplicableError, match="works on diffusion"):
        mmaccel.accelerate(model, calibration)


def euler(pipe):
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=pipe.scheduler.config.flow_shift)


def test_a_class_conditional_pipeline_without_caches_of_diffusers():
    pipe = class_to_image()
    found = mmaccel.calibrate(
        pipe,
        ["red ring", np.int64(3)],
        np.float64(0.5),
        ["hsa:order=0", "seacache", "fewer-steps"],
        8,
        guidance_scale=3.0,
    )
    assert found.best.work <= 0.5
    assert "DiTTransformer2DModel" in found.unreached["seacache"]
    best, apart = found.best, []
    for number, label_id in enumerate([pipe.get_label_ids(["red ring"])[0], 3]):
        last = []
        for methods in (["fewer-steps:keep=1.0"], [best.method]):
            with mmaccel.accelerate(pipe, *methods):
                step, kept = pipe.scheduler.step, []
                pipe.scheduler.step = lambda *a, step=step, kept=kept, **k: kept.append(step(*a, **k)) or kept[-1]
                pipe(
                    class_labels=[label_id], num_inference_steps=8, guidance_scale=3.0, output_type="np",
                    generator=torch.Generator().manual_seed(number),
                )  # fmt: skip
                del pipe.scheduler.step
            last.append(kept[-1].prev_sample.double())
        apart.append(float((last[1] - last[0]).norm() / last[0].norm()))
    assert best.distance == pytest.approx(sum(apart) / 2, rel=1e-5)


def test_the_shipped_generator():
    call = {"height": 64, "width": 64, "num_frames": 5, "guidance_scale": 3.0, "max_sequence_length": 24}
    found = mmaccel.calibrate(
        text_to_video(), ["a red ring moves left"], 0.5, ["fewer-steps", "taylorseer:interval=3"], 10, **call
    )
    assert {one.method.info.name for one in found.candidates} == {"fewer-steps", "taylorseer"}
    assert found.best.work <= 0.5
    assert found.subject.transformer == "WanTransformer3DModel"


def test_a_stronger_budget_is_no_nearer():
    def best(runtime):
        return mmaccel.calibrate(tiny_wan_pipeline(), "a word", runtime, "fewer-steps", STEPS, **CALL).best

    assert best(1.0).distance == 0
    assert best(0.3).work == pytest.approx(2 / STEPS)
    assert best(0.3).distance > best(0.8).distance > 0


@pytest.mark.parametrize("count", [1, 2, 3, 17, 40])
def test_the_search_finds_the_first_rung_from_anywhere(count):
    for border in range(count + 1):
        for start in range(count):
            asked = []
            first_fitting(count, start, lambda at, b=border, a=asked: a.append(at) or at < b, lambda _: False)
            assert len(asked) == len(set(asked))
            assert border == count or border in asked
            assert border == 0 or border - 1 in asked
            assert len(asked) <= 2 * math.ceil(math.log2(count + 1)) + 1


def test_ladders_begin_with_most_work_and_cover_methods_that_nobody_listed():
    def made(**knobs):
        name, default = next(iter(knobs.items()), ("", 0.0))
        body = {"__annotations__": {name: type(default).__name__}, name: default} if name else {}
        return dataclass(frozen=True)(type("Made", (mmaccel.Method,), {"info": mmaccel.HSA.info, **body}))

    def values(name, default, runtime=0.5):
        cls = made(**{name: default})
        cls.info = replace(cls.info, name="made")
        (ladder,) = ladders(cls, runtime, 20, tuple)
        return [getattr(setting, name) for setting in ladder.settings], ladder.start

    for name in ("runtime", "cost", "keep"):
        found, start = values(name, 1.0)
        assert found == sorted(found, reverse=True)
        assert found[start] == 0.5
        assert 0 < found[-1] < 0.5 < found[0] < 1
        found, start = values(name, 1.0, 1.0)
        assert (found[0], start) == (1.0, 0)
    for name, default in (("threshold", 0.05), ("ratio", 0.5), ("interval", 2), ("every", 2)):
        found, start = values(name, default)
        assert found == sorted(set(found))
        assert 0 <= start < len(found)
    cls = made()
    cls.info = replace(cls.info, name="made")
    assert [ladder.settings for ladder in ladders(cls, 0.5, 20, tuple)] == [(cls(),)]


@pytest.mark.parametrize("steps", [5, 7, 13, 20, 40, 50])
@pytest.mark.parametrize("runtime", [0.1, 0.25, 0.5, 0.9, 1.0])
def test_fewer_steps_is_searched_from_the_right_number(steps, runtime):
    (ladder,) = ladders(mmaccel.FewerSteps, runtime, steps, tuple)
    counts = [round(setting.keep * steps) for setting in ladder.settings]
    assert counts == list(range(steps, 0, -1))
    fitting = [count for count in counts if count / steps <= runtime + 1e-9]
    assert counts[ladder.start] == max(fitting, default=1)


def refuse(error, match, pipe=None, prompts=PROMPTS, **more):
    with pytest.raises(error, match=match) as caught:
        mmaccel.calibrate(tiny_wan_pipeline() if pipe is None else pipe, prompts, **{"steps": 6, **CALL, **more})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("runtime", [0, 0.0, -1, 1.01, float("nan"), "0.5", None, True])
def test_a_runtime_out_of_range(runtime):
    refuse(MethodError, "outside", runtime=runtime)


def test_wrong_prompts():
    for none in ([], (), None, iter(())):
        refuse(MethodError, "no prompts", prompts=none)
    refuse(MethodError, "prompts of text", prompts=["a", 3])
    pipe = class_to_image()
    for wrong in (["no such thing"], [True], [-1], [10**6], [1.5]):
        with pytest.raises(MethodError, match="knows no class"):
            mmaccel.calibrate(pipe, wrong, steps=6)


def test_wrong_arguments():
    for name in ("prompt", "generator", "num_inference_steps", "output_type"):
        refuse(MethodError, f"{name} is set by calibrate", **{name: None})
    refuse(MethodError, "cannot be given tempo", tempo=3)
    for steps in (0, -3, 2.5, True):
        refuse(MethodError, "steps must be", steps=steps)
    refuse(MethodError, "seed must be", seed=-1)
    refuse(MethodError, "no method", methods=[])
    refuse(MethodError, "did you mean 'hsa'", methods=["hsaa"])
    refuse(MethodError, "is no method", methods=[3])
    refuse(MethodError, "stack", methods=["hsa:order=0+fewer-steps"])
    refuse(NotApplicableError, "does not work on diffusion", methods=["holitom"])


def test_what_is_no_pipeline():
    refuse(AdapterError, "needs a pipeline", pipe=tiny_wan_pipeline().transformer)
    refuse(AdapterError, "does not know", pipe=object())
    pipe = tiny_wan_pipeline()
    pipe.scheduler = None
    refuse(NotApplicableError, "has no scheduler", pipe=pipe)


def test_a_method_or_a_cache_is_on_already():
    from diffusers.hooks.first_block_cache import FirstBlockCacheConfig

    pipe = tiny_wan_pipeline()
    with mmaccel.accelerate(pipe, "hsa"):
        refuse(ConflictError, "hsa is on this pipeline already", pipe=pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    refuse(ConflictError, "disable_cache", pipe=pipe)


def test_a_distilled_schedule_does_not_pay():
    refuse(NotApplicableError, r"4 steps.*does not pay", steps=4)
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    class Distilled(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, num_inference_steps=None, **more):
            super().set_timesteps(3, **more)

    pipe = tiny_wan_pipeline()
    pipe.scheduler = Distilled()
    refuse(NotApplicableError, r"3 steps.*does not pay", pipe=pipe)


def test_a_runtime_that_nobody_reaches_names_the_smallest_of_each():
    some = ["fewer-steps", "hsa:runtime=0.1", "taylorseer:interval=2;warmup=2", "pab:every=9"]
    refuse(
        MethodError, r"fewer-steps: 0\.167 at least.*hsa: .*smallest runtime is.*taylorseer: 0\.\d+ at least.*pab: 0",
        runtime=0.1, methods=some, prompts="a word",
    )  # fmt: skip


def test_a_dense_result_that_is_not_finite_and_a_setting_that_fails():
    pipe = tiny_wan_pipeline()
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(float("nan"))
    refuse(NonFiniteError, "NaN", pipe=pipe)
    broken = tiny_wan_pipeline()
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == 14:  # in the call behind the dense one
            raise RuntimeError("out of luck")

    broken.transformer.register_forward_pre_hook(fail)
    found = mmaccel.calibrate(broken, "a word", 0.7, ["taylorseer:interval=3;warmup=1", "fewer-steps"], 6, **CALL)
    assert found.unreached["taylorseer"] == "RuntimeError: out of luck"
    assert found.method.info.name == "fewer-steps"
    assert copy.copy(found) == found
