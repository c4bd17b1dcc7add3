"""DiffSparse: levels of a table against enumeration, schedules that do not fit, and the shipped one at its cost."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import save_file

import mmaccel
from mmaccel.core.token_cache import TokenCache
from mmaccel.errors import MethodError, NotApplicableError
from mmaccel.tiny import IMAGE_CALL, class_to_image
from mmaccel.tiny.pipelines import tiny_wan_pipeline

torch.set_num_threads(1)


def wan(pipe, seed=0, steps=4, **more):
    size = {"height": 32, "width": 48, "num_frames": 9, "output_type": "latent"}
    generator = torch.Generator().manual_seed(seed)
    return pipe("a word", num_inference_steps=steps, generator=generator, **{**size, **more}).frames


def images(pipe, labels, **more):
    generators = [torch.Generator().manual_seed(label) for label in labels]
    found = pipe(class_labels=list(labels), generator=generators, output_type="np", **{**IMAGE_CALL, **more}).images
    return torch.from_numpy(found)


@pytest.fixture
def schedule(tmp_path):
    """A table of random costs for the tiny Wan pipeline of 2 layers and 4 steps."""
    path = tmp_path / "wan.safetensors"
    table = torch.rand(4, 2, 5, generator=torch.Generator().manual_seed(0))
    facts = {"model": "WanTransformer3DModel", "steps": 4, "layers": 2, "cost": 0.5, "order": 0}
    save_file({"table": table}, path, {"mmaccel": json.dumps(facts)})
    return path, table


def computed(pipe, monkeypatch, **more):
    """Rows that each module computes, by step and layer and kind, in the first branch."""
    found: dict = {}
    whole = TokenCache._module

    def spy(self, now, asked, **rest):
        before, module = now.spent, asked.module
        output = whole(self, now, asked, **rest)
        spent = (now.spent - before) / asked.states.shape[0]
        rows = [n for n in range(now.tokens + 1) if module.work(n, now.tokens, now.text) == spent]
        found.setdefault((now.at.step, module.layer, module.kind), (rows[0], now.tokens))
        return output

    with monkeypatch.context() as patch:
        patch.setattr(TokenCache, "_module", spy)
        wan(pipe, **more)
    return found


def test_the_levels_are_those_of_least_cost_at_the_budget(schedule, monkeypatch):
    path, table = schedule
    best = min(
        (c for c in itertools.product(range(5), repeat=6) if sum(c) == 16 - 8),
        key=lambda choice: sum(float(table.flatten(0, 1)[2 + row, level]) for row, level in enumerate(choice)),
    )
    levels = torch.tensor([4, 4, *best]).view(4, 2)
    pipe = tiny_wan_pipeline(layers=2)
    with mmaccel.accelerate(pipe, mmaccel.DiffSparse(cost=0.5, schedule=str(path))):
        for size in ({}, {"height": 64, "width": 64}):
            for (step, layer, _), (rows, tokens) in computed(pipe, monkeypatch, **size).items():
                assert rows == int(int(levels[step, layer]) * tokens / 4 + 0.5)


def test_cost_one_is_the_identity_at_any_number_of_steps():
    pipe, twin = tiny_wan_pipeline(), tiny_wan_pipeline()
    with mmaccel.accelerate(pipe, "diffsparse:cost=1.0"):
        assert torch.equal(wan(pipe, steps=5), wan(twin, steps=5))


def test_second_call_undo_and_pause(schedule):
    path, _ = schedule
    pipe, twin = tiny_wan_pipeline(layers=2), tiny_wan_pipeline(layers=2)
    dense = wan(twin)
    handle = mmaccel.accelerate(pipe, mmaccel.DiffSparse(cost=0.5, schedule=str(path)))
    first = wan(pipe)
    assert not torch.equal(first, dense)
    assert torch.equal(wan(pipe), first)
    with handle.paused():
        assert torch.equal(wan(pipe), dense)
    assert torch.equal(wan(pipe), first)
    handle.remove()
    assert torch.equal(wan(pipe), dense)
    for (name, module), (_, other) in zip(
        pipe.transformer.named_modules(), twin.transformer.named_modules(), strict=True
    ):
        assert sorted(vars(module)) == sorted(vars(other)), name


def test_a_schedule_that_does_not_fit_says_what_to_do(schedule, tmp_path):
    path, _ = schedule
    method = mmaccel.DiffSparse(cost=0.5, schedule=str(path))
    with pytest.raises(NotApplicableError, match="with 2 layers, and this is WanTransformer3DModel with 3; train one"):
        mmaccel.accelerate(tiny_wan_pipeline(layers=3), method)
    with pytest.raises(NotApplicableError, match="and this is DiTTransformer2DModel with 8"):
        mmaccel.accelerate(class_to_image(), method)
    pipe = tiny_wan_pipeline(layers=2)
    with mmaccel.accelerate(pipe, method):
        with pytest.raises(NotApplicableError, match="this call has 6; call with num_inference_steps=4, train one"):
            wan(pipe, steps=6)
        wan(pipe)
    with pytest.raises(MethodError, match="no schedule at"):
        mmaccel.accelerate(pipe, mmaccel.DiffSparse(schedule=str(tmp_path / "none.safetensors")))
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(MethodError, match="is no schedule of mmaccel"):
        mmaccel.accelerate(pipe, mmaccel.DiffSparse(schedule=str(tmp_path / "text.safetensors")))
    save_file({"other": torch.zeros(1)}, tmp_path / "other.safetensors", {"mmaccel": "{}"})
    with pytest.raises(MethodError, match="is no schedule of mmaccel"):
        mmaccel.accelerate(pipe, mmaccel.DiffSparse(schedule=str(tmp_path / "other.safetensors")))
    with pytest.raises(MethodError, match=r"cost=0\.2 cannot be reached in 4 steps.* smallest cost is 0\.25"):
        mmaccel.accelerate(pipe, mmaccel.DiffSparse(cost=0.2, schedule=str(path)))


def test_another_cost_than_the_trained_one_is_remarked(schedule):
    path, _ = schedule
    pipe = tiny_wan_pipeline(layers=2)
    with mmaccel.accelerate(pipe, mmaccel.DiffSparse(cost=0.5, schedule=str(path))) as handle:
        wan(pipe)
        assert "untrained" not in str(handle.report())
    with mmaccel.accelerate(pipe, mmaccel.DiffSparse(cost=0.75, schedule=str(path))) as handle:
        wan(pipe)
        assert any("was trained at cost 0.5; at 0.75" in line for line in handle.report().lines())


def test_the_shipped_schedule_is_nearer_to_dense_than_fewer_steps():
    pipe = class_to_image()
    labels = list(range(0, 24, 3))
    dense = images(pipe, labels)
    distance = {}
    for spec in ("fewer-steps:keep=0.45", "diffsparse"):
        with mmaccel.accelerate(pipe, spec) as handle:
            distance[spec] = float((images(pipe, labels) - dense).square().mean((1, 2, 3)).sqrt().mean())
    spent, whole = handle.report().flops["attention and feed-forward of the blocks"]
    assert spent / whole == pytest.approx(0.46, abs=0.003)
    assert distance["diffsparse"] < 0.6 * distance["fewer-steps:keep=0.45"]
