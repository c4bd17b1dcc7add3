"""Note for a report what the stages of a call cost: seconds, FLOPs, kernels.

Seconds are wall-clock between hooks. On a GPU work is queued, so they say when it was launched; `mmaccel.measure` takes
times that can be compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mmaccel.core.flops import attention_width, decoder_flops, linear_weights
from mmaccel.core.patching import Patcher
from mmaccel.core.run import current
from mmaccel.kernels.dispatch import recording

__all__ = ["watch_overhead", "watch_stages"]


@dataclass
class _Spans:
    """The language model call that is running: one of each watching handle."""

    started: dict[object, float] = field(default_factory=dict)
    shape: tuple[int, int] = (0, 0)
    lengths: list[int] = field(default_factory=list)
    open: dict[object, tuple[ExitStack, Any]] = field(default_factory=dict)
    encoding: set[object] = field(default_factory=set)


def watch_stages(patcher: Patcher, site: Any, report: Any) -> object:
    """Time encoding, prefill and decoding steps, count prefill FLOPs and kernel calls. Put on ahead of other hooks.

    Returns a key that `watch_overhead` needs.
    """
    key = object()
    for method in site.encoders.values():
        patcher.wrap(site.root, method, _timed(site, report, key))
    weights = [linear_weights(layer) for layer in site.layers]
    width = attention_width(site.language_model.config)

    def before(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        run, embeds = current(site.root), kwargs.get("inputs_embeds")
        if run is None or embeds is None:
            return
        spans = run.get(_Spans)
        spans.shape, spans.lengths = (embeds.shape[0], embeds.shape[1]), []
        stack = ExitStack()
        spans.open[key] = (stack, stack.enter_context(recording()))
        spans.started[key] = time.perf_counter()

    def layer_before(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        run = current(site.root)
        if run is None or (spans := run.get(_Spans)).shape[1] <= 1 or len(spans.lengths) == len(weights):
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        spans.lengths.append(hidden.shape[1])

    def after(_module: nn.Module, _args: Any, _kwargs: Any, output: Any = None) -> None:
        run = current(site.root)
        if run is None or key not in (spans := run.get(_Spans)).started:
            return
        seconds = time.perf_counter() - spans.started.pop(key)
        stack, events = spans.open.pop(key)
        stack.close()
        if output is None:
            return
        B, S = spans.shape
        report.spend("prefill" if S > 1 else "decoding step", seconds)
        for event in events:
            report.kernel(event.op, event.backend, event.reason)
        if S > 1 and len(spans.lengths) == len(weights):
            spent = B * decoder_flops(weights, width, spans.lengths)
            report.compute("prefill", spent, B * decoder_flops(weights, width, [S] * len(weights)))

    patcher.before(site.language_model, before, first=True)
    patcher.after(site.language_model, after, always=True)
    for layer in site.layers:
        patcher.before(layer, layer_before)
    return key


def watch_overhead(patcher: Patcher, site: Any, report: Any, key: object) -> None:
    """Time what stands between the first hook of `watch_stages` and this one: our own work before the model's."""

    def before(_module: nn.Module, _args: Any, _kwargs: Any) -> None:
        run = current(site.root)
        if run is not None and key in (spans := run.get(_Spans)).started and spans.shape[1] > 1:
            report.spend("prefill: own work before the first layer", time.perf_counter() - spans.started[key])

    patcher.before(site.language_model, before)


def _timed(site: Any, report: Any, key: object) -> Callable[..., Any]:
    def around(call: Any, *args: Any, **kwargs: Any) -> Any:
        run = current(site.root)
        if run is None or key in (spans := run.get(_Spans)).encoding:  # one encoder method may call the other
            return call(*args, **kwargs)
        spans.encoding.add(key)
        start = time.perf_counter()
        try:
            with recording() as events:
                output = call(*args, **kwargs)
        finally:
            spans.encoding.discard(key)
        report.spend("encode and project", time.perf_counter() - start)
        for event in events:
            report.kernel(event.op, event.backend, event.reason)
        return output

    return around
