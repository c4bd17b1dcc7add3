"""What is recorded of a run is what the scheduler was given."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from mmaccel.adapters.diffusion import Diffusion
from mmaccel.core.patching import Patcher
from mmaccel.core.velocity_record import VelocityRecord
from mmaccel.errors import ConflictError
from mmaccel.tiny.pipelines import tiny_wan_pipeline

library: Any = diffusers
torch.set_num_threads(1)


def call(pipe, steps=4, **more):
    return pipe(
        "a word", num_inference_steps=steps, height=32, width=48, num_frames=9, output_type="latent",
        generator=torch.Generator().manual_seed(0), **more,
    ).frames  # fmt: skip


def test_a_run_is_measured_and_left_as_it_was():
    pipe, twin = tiny_wan_pipeline(), tiny_wan_pipeline()
    given: list[torch.Tensor] = []
    found: list[Any] = []
    step = twin.scheduler.step

    def spy(velocity, *args, **kwargs):
        given.append(velocity.clone())
        return step(velocity, *args, **kwargs)

    twin.scheduler.step = spy
    patcher = Patcher()
    VelocityRecord(Diffusion(pipe), lambda _: True, lambda *pair: found.append(pair)).install(patcher)
    assert torch.equal(call(pipe), call(twin))
    ((steps, measured),) = found
    flat = torch.stack(given, 1).flatten(2).double()
    assert steps == 4
    assert torch.allclose(measured.gram, flat @ flat.mT)
    changed = torch.stack(given, 1).diff(dim=1).square()  # [1, 3, 16, 3, 4, 6], tokens are 1 x 2 x 2
    tokens = changed.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).sum((2, 5, 7)).flatten(2)
    assert torch.allclose(measured.changes.float(), tokens, rtol=1e-4)
    assert measured.times.tolist() == [float(time) for time in twin.scheduler.timesteps]
    assert torch.allclose(measured.lengths.float(), -twin.scheduler.sigmas.diff())
    patcher.undo()
    assert "step" not in vars(pipe.scheduler)


def test_runs_that_are_not_wanted_or_not_finished_are_not_measured():
    pipe = tiny_wan_pipeline()
    found: list[int] = []
    VelocityRecord(Diffusion(pipe), lambda steps: steps != 3, lambda steps, _: found.append(steps)).install(Patcher())

    def stop(_pipe, step, *_):
        if step == 1:
            raise RuntimeError("enough")
        return {}

    call(pipe, steps=3)
    with pytest.raises(RuntimeError, match="enough"):
        call(pipe, callback_on_step_end=stop)
    assert found == []
    call(pipe)
    assert found == [4]


def test_another_scheduler_is_noticed():
    pipe = tiny_wan_pipeline()
    record = VelocityRecord(Diffusion(pipe), lambda _: True, lambda *_: None)
    record.install(Patcher())
    record.check()
    pipe.scheduler = library.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ConflictError, match="scheduler was replaced"):
        record.check()
