"""One call of a diffusers pipeline: where its time goes (text encoders, transformers, autoencoder), and its latents."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mmaccel.core.patching import Patcher
from mmaccel.measure.boundaries import Spans, watch_module
from mmaccel.measure.stages import DeviceClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["STAGES", "Denoised", "pipeline_stages", "watch_pipeline", "watch_steps"]

STAGES = ("text encoder", "transformer", "vae", "rest")


def pipeline_stages(pipe: Any, call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Run `call`, which calls `pipe` as it stands, methods on it included; its result and seconds by stage.

    The stages are those of `STAGES`, disjoint, and add up to the time of the call. Each counts what mmaccel's hooks do
    inside of it; what a method does in the scheduler is part of "rest". On CUDA they are told apart by events on the
    stream, without a wait between them. The pipeline is left exactly as it was, also by a call that raises.
    """
    clock = DeviceClock(torch.device(getattr(pipe, "_execution_device", pipe.device)))
    with watch_pipeline(pipe, clock.read) as spans:
        start = clock.wait()
        result = call()
        whole = clock.wait() - start
    totals = spans.totals(clock.seconds)
    parts = {name: totals.get(name, 0.0) for name in STAGES[:-1]}
    return result, {**parts, "rest": whole - sum(parts.values())}


@contextmanager
def watch_pipeline(pipe: Any, read: Callable[[], Any]) -> Iterator[Spans]:
    """Collect the spans of the text encoders, transformers and the autoencoder of `pipe` inside the block."""
    spans, patcher = Spans(read), Patcher()
    try:
        for name, part in pipe.components.items():
            if not isinstance(part, torch.nn.Module):
                continue
            if name.startswith(("text_encoder", "transformer")):
                watch_module(patcher, spans, part, name.rstrip("_0123456789").replace("_", " "))
            elif name.startswith("vae"):
                # pipelines call these by name, where hooks of modules do not run
                for method in ("encode", "decode"):
                    if callable(getattr(part, method, None)):
                        patcher.wrap(part, method, _metered(spans, "vae"))
        yield spans
    finally:
        patcher.undo()


@dataclass
class Denoised:
    """What the scheduler of a pipeline gave last, and how many steps it has made; None before the first."""

    latents: torch.Tensor | None = None
    steps: int = 0


@contextmanager
def watch_steps(pipe: Any) -> Iterator[Denoised]:
    """Keep the latents of the last step of the scheduler, which not every pipeline hands out itself."""
    denoised, patcher = Denoised(), Patcher()

    def step(call: Any, *args: Any, **kwargs: Any) -> Any:
        result = call(*args, **kwargs)
        denoised.latents = result[0] if isinstance(result, tuple) else result.prev_sample
        denoised.steps += 1
        return result

    patcher.wrap(pipe.scheduler, "step", step)
    try:
        yield denoised
    finally:
        patcher.undo()


def _metered(spans: Spans, account: str) -> Callable[..., Any]:
    def around(call: Any, *args: Any, **kwargs: Any) -> Any:
        return spans.metered(account, call)(*args, **kwargs)

    return around
