"""Learned allocation: the soft cache against the real one and finite differences; the table against known costs."""

from __future__ import annotations

import pytest
import torch

from mmaccel.adapters.diffusion import Diffusion
from mmaccel.core.patching import Patcher
from mmaccel.core.token_cache import TokenCache
from mmaccel.diffusion.diffsparse import Schedule
from mmaccel.report import Report
from mmaccel.tiny import class_to_image, train_diffsparse
from mmaccel.tiny.sparsity_training import CostTable, Pool, Student, sample, train_table, warm_start
from mmaccel.tokens.levels import LevelPlan, cheapest_levels

torch.set_num_threads(1)
STEPS, LAYERS = 4, 8


@pytest.fixture(scope="module")
def pipe():
    found = class_to_image()
    found.transformer.requires_grad_(False)
    found.vae.requires_grad_(False)
    return found


def pool(seed=0):
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(seed))
    return Pool(noise, torch.tensor([3, 7]), torch.zeros(2, 3, 64, 64))


def plan(seed=0):
    units = torch.randint(0, 5, (STEPS, LAYERS), generator=torch.Generator().manual_seed(seed))
    units[0] = 4
    return units


@pytest.mark.parametrize("order", [0, 1])
def test_the_student_is_the_cached_sampler(pipe, order):
    some = pool()
    student = Student(pipe, Diffusion(pipe), {"a": some}, STEPS, 3.0, order)
    seen = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda latents: seen.append(latents) or decode(latents)
    with torch.no_grad():
        student.distances(torch.nn.functional.one_hot(plan(), 5).float(), None, "a")
    del pipe.vae.decode
    student.undo()
    patcher = Patcher()
    levels = LevelPlan.of_layers(plan(), 4)
    TokenCache(Diffusion(pipe), Report(), "cache", lambda *_: levels, None, order).install(patcher)
    with torch.no_grad():
        wanted = sample(pipe, some.noise, some.labels, STEPS, 3.0)
    patcher.undo()
    assert torch.allclose(seen[0], wanted, atol=1e-4)


@pytest.mark.parametrize("order", [0, 1])
def test_gradients_of_choices_are_finite_differences(pipe, order):
    """A choice that moves a little from nothing towards everything moves the images by its gradient."""
    some = pool()
    student = Student(pipe, Diffusion(pipe), {"a": some}, STEPS, 3.0, order)
    units = plan() // 2 * 4 % 8  # whole or nothing: which tokens a partial step takes would jump
    choices = torch.nn.functional.one_hot(units, 5).float().requires_grad_()
    student.distances(choices, None, "a").sum().backward()
    gradient = choices.grad
    assert gradient is not None
    held = (units == 0).nonzero().tolist()
    for step, layer in (held[0], held[len(held) // 2], held[-1]):
        moved = []
        for by in (-0.02, 0.02):
            other = choices.detach().clone()
            other[step, layer, 4] += by
            with torch.no_grad():
                moved.append(float(student.distances(other, None, "a").double().sum()))
        slope = (moved[1] - moved[0]) / 0.04
        assert float(gradient[step, layer, 4]) == pytest.approx(slope, rel=0.05, abs=2e-3)
    student.undo()
    assert gradient[0].abs().max() == 0


def table(rows=12, total=24, seed=0):
    fixed = torch.full((rows,), -1)
    fixed[0] = 4
    return CostTable(rows, 5, total, fixed, torch.Generator().manual_seed(seed))


def test_choices_are_one_hot_and_a_level_that_would_help_becomes_cheaper():
    found = table()
    levels = found.levels()
    assert int(levels.sum()) == 24
    assert int(levels[0]) == 4
    choices = found.choices(levels)
    assert torch.allclose(choices, torch.nn.functional.one_hot(levels, 5).float(), atol=1e-6)
    weights = torch.randn(12, 5)
    (choices * weights).sum().backward()
    assert found.costs.grad is not None
    assert torch.allclose(found.costs.grad, -weights)


def test_noise_moves_the_choice_and_keeps_the_budget():
    found = table()
    generator = torch.Generator().manual_seed(1)
    drawn = [found.levels(1.0, generator) for _ in range(4)]
    assert all(int(levels.sum()) == 24 for levels in drawn)
    assert not all(torch.equal(levels, drawn[0]) for levels in drawn)


def test_a_warm_start_makes_its_steps_whole():
    found = table(rows=12, total=24)
    warm_start(found, (1, 3), 2, 10.0)  # rows 2, 3, 6, 7 of 6 steps of 2 layers
    assert found.levels()[[2, 3, 6, 7]].tolist() == [4] * 4


def test_training_finds_the_levels_of_known_costs(tmp_path):
    costs = torch.rand(12, 5, generator=torch.Generator().manual_seed(3)).sort(1, descending=True).values
    found = table()
    best = cheapest_levels(costs, torch.arange(5), 24, found.fixed)
    least = float(costs.gather(1, best[:, None]).sum())

    def score(choices, images, split):
        return (choices * costs).sum()[None]

    begin = float(costs.gather(1, found.levels()[:, None]).sum())
    reached = train_table(
        found, tmp_path / "a.pt", score, iterations=200, peak=0.3, seed=0, batch=1, pool=4, noise=0.2
    )  # fmt: skip
    levels = found.levels()
    assert float(costs.gather(1, levels[:, None]).sum()) == pytest.approx(reached, rel=1e-5)
    assert reached - least < 0.2 * (begin - least)


def test_a_resumed_training_is_the_same_training(tmp_path):
    costs = torch.rand(12, 5, generator=torch.Generator().manual_seed(3))

    def score(choices, images, split):
        scale = 1.0 if images is None else 1.0 + float(images.float().mean())
        return (choices * costs).sum()[None] * scale

    more = {"peak": 0.3, "seed": 0, "batch": 2, "pool": 8, "noise": 0.3}
    straight, stopped, resumed = table(), table(), table(seed=5)
    train_table(straight, tmp_path / "a.pt", score, iterations=40, **more)

    def failing(choices, images, split):
        failing.calls += split == "training"
        if failing.calls > 25:
            raise KeyboardInterrupt
        return score(choices, images, split)

    failing.calls = 0
    with pytest.raises(KeyboardInterrupt):
        train_table(stopped, tmp_path / "b.pt", failing, iterations=40, **more)
    train_table(resumed, tmp_path / "b.pt", score, iterations=40, **more)
    assert torch.equal(resumed.costs, straight.costs)


@pytest.mark.slow
def test_the_script_writes_a_schedule_that_the_method_takes(tmp_path):
    out = tmp_path / "table.safetensors"
    short = ["--images", "1", "--validation-images", "1", "--batch", "1"]
    short += [f"--{name}-iterations=1" for name in ("step", "layer", "merged")]
    train_diffsparse.main(["--out", str(out), "--work", str(tmp_path / "work"), *short])
    schedule = Schedule.load(str(out))
    schedule.check("DiTTransformer2DModel", 8, 20)
    assert schedule.facts["cost"] == 0.46
    assert schedule.table.shape == (20, 8, 5)
    levels = cheapest_levels(
        schedule.table.flatten(0, 1), torch.arange(5), 294, torch.tensor([4] * 8 + [-1] * 152)
    ).unflatten(0, (20, 8))  # fmt: skip
    assert (levels == 4).all(1).sum() == 9
