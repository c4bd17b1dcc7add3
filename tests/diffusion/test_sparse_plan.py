"""sparse-plan: a dense first run that measures, the plan that follows from it, budgets, undo, misuse."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import pytest
import torch

import mmaccel
from mmaccel.errors import ConflictError, MethodError, NonFiniteError, NotApplicableError
from mmaccel.tiny import IMAGE_CALL, class_to_image
from mmaccel.tiny.pipelines import tiny_wan_pipeline

library: Any = diffusers
torch.set_num_threads(1)


def wan(pipe, seed=0, steps=8, prompt: Any = "a word", **more):
    count = len(prompt) if isinstance(prompt, list) else 1
    generators = [torch.Generator().manual_seed(seed + n) for n in range(count)]
    size = {"height": 32, "width": 48, "num_frames": 9, "output_type": "latent"}
    return pipe(prompt, num_inference_steps=steps, generator=generators, **{**size, **more}).frames


def images(pipe, labels, **more):
    generators = [torch.Generator().manual_seed(label) for label in labels]
    found = pipe(class_labels=list(labels), generator=generators, output_type="np", **{**IMAGE_CALL, **more}).images
    return torch.from_numpy(found)


def levels(handle, steps):
    return [int(level) for level in handle.report().events[f"levels of {steps} steps"]]


def test_cost_one_and_the_first_run_are_the_identity():
    pipe, twin = tiny_wan_pipeline(), tiny_wan_pipeline()
    dense = wan(twin)
    with mmaccel.accelerate(pipe, "sparse-plan:cost=1.0") as handle:
        assert torch.equal(wan(pipe), dense)
        assert torch.equal(wan(pipe), dense)
    with mmaccel.accelerate(pipe, "sparse-plan:cost=0.5") as handle:
        assert torch.equal(wan(pipe), dense)
        assert "is dense, as it measures" in str(handle.report())
        assert not torch.equal(wan(pipe), dense)
    assert torch.equal(wan(pipe), dense)
    assert "forward" not in vars(pipe.transformer)


@pytest.mark.parametrize("order", [0, 1])
def test_the_plan_is_the_best_of_all_for_the_velocities_of_the_first_run(order):
    """Enumeration over the whole steps of a run, with lengths of held errors taken from the velocities themselves."""
    pipe, twin = tiny_wan_pipeline(), tiny_wan_pipeline()
    given: list[torch.Tensor] = []
    step = twin.scheduler.step

    def spy(velocity, *args, **kwargs):
        given.append(velocity.double().flatten())
        return step(velocity, *args, **kwargs)

    twin.scheduler.step = spy
    wan(twin, steps=7)
    times = [float(time) for time in twin.scheduler.timesteps]
    lengths = twin.scheduler.sigmas.double().diff().abs()

    def loss(whole):
        total, b, a = 0.0, 0, 0
        for t in range(1, 7):
            if t in whole:
                b, a = (a, t)
                continue
            held = given[a]
            if order and a > b:
                held = held + (given[a] - given[b]) * (times[t] - times[a]) / (times[a] - times[b])
            total += float((given[t] - held).norm() * lengths[t]) * (1 + 3 * (6 - t) / 6)
        return total

    best = min((rest for rest in itertools.combinations(range(1, 7), 2)), key=loss)
    with mmaccel.accelerate(pipe, mmaccel.SparsePlan(cost=3 / 7, order=order)) as handle:
        wan(pipe, steps=7)
        found = levels(handle, 7)
    whole = [index for index, level in enumerate(found) if level == 4]
    assert sum(found) == 12
    assert whole == [0, *best] or loss(whole) == pytest.approx(loss(best), rel=1e-6)


def test_each_number_of_steps_is_measured_once_and_other_changes_need_no_reset():
    pipe = tiny_wan_pipeline()
    with mmaccel.accelerate(pipe, mmaccel.SparsePlan(cost=0.55)) as handle:
        wan(pipe)
        first = wan(pipe)
        wan(pipe, steps=11, height=48, guidance_scale=1.0)
        both = wan(pipe, prompt=["a word", "another longer text"])
        assert torch.equal(wan(pipe), first)
        assert torch.allclose(both[:1], first, atol=1e-4)
        assert torch.allclose(both[1:], wan(pipe, prompt="another longer text", seed=1), atol=1e-4)
        assert sum(levels(handle, 8)) == round(0.55 * 8 * 4)
        assert sum(levels(handle, 11)) == round(0.55 * 11 * 4)


def test_it_is_nearer_to_dense_than_fewer_steps_at_the_same_cost():
    pipe = class_to_image()
    labels = list(range(0, 24, 3))
    dense = images(pipe, labels)
    distance = {}
    for spec in ("fewer-steps:keep=0.45", "sparse-plan:cost=0.45", "sparse-plan:cost=0.45;order=0"):
        with mmaccel.accelerate(pipe, spec):
            images(pipe, [1, 5])
            distance[spec] = float((images(pipe, labels) - dense).square().mean((1, 2, 3)).sqrt().mean())
    fewer, ours, held = distance.values()
    assert ours < 0.6 * fewer
    assert held < 0.8 * fewer


def test_costs_that_cannot_be_reached_and_misuse_are_refused():
    pipe = tiny_wan_pipeline()
    with pytest.raises(NotApplicableError, match="give it the pipeline"):
        mmaccel.accelerate(pipe.transformer, "sparse-plan")
    with mmaccel.accelerate(pipe, "sparse-plan:cost=0.1"):
        with pytest.raises(MethodError, match=r"cost=0\.1 cannot be reached in 4 steps.* smallest cost is 0\.25"):
            wan(pipe, steps=4)
        with pytest.raises(ConflictError):
            mmaccel.accelerate(pipe, "hsa")
        with pytest.raises(NonFiniteError, match="latents"):
            wan(pipe, steps=12, latents=torch.full((1, 16, 3, 4, 6), torch.nan))
        wan(pipe, steps=12)
        pipe.scheduler = library.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
        with pytest.raises(ConflictError, match="scheduler was replaced"):
            wan(pipe, steps=12)


def test_it_works_with_offloaded_models_and_beside_another_pipeline():
    pipe, other = tiny_wan_pipeline(), tiny_wan_pipeline(seed=1)
    dense = wan(other)
    with mmaccel.accelerate(pipe, mmaccel.SparsePlan(cost=0.5)):
        wan(pipe)
        expected = wan(pipe)
        assert torch.equal(wan(other), dense)
    pipe.enable_model_cpu_offload(device="cpu")
    with mmaccel.accelerate(pipe, mmaccel.SparsePlan(cost=0.5)):
        wan(pipe)
        assert torch.equal(wan(pipe), expected)


def test_a_raising_callback_leaves_the_pipeline_usable():
    pipe = tiny_wan_pipeline()

    def stop(_pipe, step, *_):
        if step == 4:
            raise RuntimeError("enough")
        return {}

    with mmaccel.accelerate(pipe, mmaccel.SparsePlan(cost=0.5)):
        with pytest.raises(RuntimeError, match="enough"):
            wan(pipe, seed=3, callback_on_step_end=stop)
        wan(pipe)
        expected = wan(pipe)
        with pytest.raises(RuntimeError, match="enough"):
            wan(pipe, seed=3, callback_on_step_end=stop)
        assert torch.equal(wan(pipe), expected)
