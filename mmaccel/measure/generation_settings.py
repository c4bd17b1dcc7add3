"""Settings that a diffusers pipeline is measured with: none, a method of ours, or cache-dit where it is installed."""

from __future__ import annotations

import importlib.util
import re
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmaccel.api import accelerate, plan
from mmaccel.compose import normalise
from mmaccel.errors import MethodError, MMAccelError
from mmaccel.measure.flops import counted_flops
from mmaccel.measure.generation import watch_pipeline
from mmaccel.measure.memory import peak_memory
from mmaccel.measure.stages import DENSE
from mmaccel.targets import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch

__all__ = ["CACHE_DIT", "Profile", "applied", "check_settings", "method_name", "missing", "profile"]

CACHE_DIT = "cache-dit"
_KNOBS = {"blocks": 8, "threshold": 0.08, "warmup": 8, "taylor": 0}


@dataclass(frozen=True)
class Profile:
    """What one untimed call of a setting did.

    missing: why it cannot be measured (not installed, does not fit, refuses this call), or None. flops: of the
    transformers, and work: as a share of the dense ones. memory: {"peak", "growth" (above what was held before),
    "method"}, in bytes. settles: the first call only measures, dense, and the next is what counts.
    """

    missing: str | None = None
    flops: int = 0
    work: float | None = None
    memory: dict[str, Any] | None = None
    settles: bool = False


def profile(
    pipe: Any, spec: str, call: Callable[[], Any], dense: Profile | None = None, device: str | torch.device = "cpu"
) -> Profile:
    """Count one call of `pipe` with a setting on; `dense` is the profile of the same call without."""
    why = missing(spec, pipe)
    if why is not None:
        return Profile(missing=why)
    try:
        with applied(pipe, spec):
            flops, memory = _counted(pipe, call, device)
            settles = dense is not None and flops >= 0.99 * dense.flops
            if settles:
                flops, memory = _counted(pipe, call, device)
                settles = dense is not None and flops < 0.99 * dense.flops
    except MMAccelError as error:  # such as a number of steps at which it refuses to run
        return Profile(missing=str(error))
    return Profile(None, flops, 1.0 if dense is None else flops / dense.flops, memory, settles)


def _counted(pipe: Any, call: Callable[[], Any], device: str | torch.device) -> tuple[int, dict[str, Any]]:
    counter = counted_flops()
    with peak_memory(device) as peak, watch_pipeline(pipe, counter.get_total_flops) as spans, counter:
        call()
    flops = int(spans.totals(lambda a, b: b - a).get("transformer", 0))
    return flops, {"peak": peak.peak, "growth": peak.growth, "method": peak.method}


def method_name(spec: str) -> str:
    """The name in front of the knobs."""
    return spec.partition(":")[0]


def missing(spec: str, pipe: Any) -> str | None:
    """Why a setting cannot be measured on a pipeline, or None: cache-dit is not installed, or the method does not fit.

    Raises:
        MMAccelError: an unknown method or knob.
    """
    if spec == DENSE:
        return None
    if method_name(spec) == CACHE_DIT:
        _cache_dit_knobs(spec)
        return None if importlib.util.find_spec("cache_dit") else "cache-dit is not installed"
    stack = normalise([spec])
    try:
        for method in stack:
            plan(method, resolve(pipe))
    except MMAccelError as error:
        return str(error)
    return None


def check_settings(specs: Sequence[str]) -> None:
    """Refuse settings that nothing can make sense of, or that stand twice.

    Raises:
        MMAccelError: an unknown method or knob, or the same setting twice.
    """
    for spec in specs:
        if method_name(spec) == CACHE_DIT:
            _cache_dit_knobs(spec)
        else:
            normalise([spec])
    if len(set(specs)) < len(specs) or DENSE in specs:
        raise MMAccelError("each setting stands once in specs; dense is always run.")


@contextmanager
def applied(pipe: Any, spec: str) -> Iterator[None]:
    """Have a setting on a pipeline inside the block."""
    if spec == DENSE:
        yield
    elif method_name(spec) == CACHE_DIT:
        with _cache_dit(pipe, **_cache_dit_knobs(spec)):
            yield
    else:
        with accelerate(pipe, spec):
            yield


def _cache_dit_knobs(spec: str) -> dict[str, float]:
    """The knobs of a spec such as `cache-dit:blocks=1;threshold=0.2;warmup=4;taylor=1`."""
    knobs: dict[str, float] = dict(_KNOBS)
    for part in filter(None, spec.partition(":")[2].split(";")):
        match = re.fullmatch(r"(\w+)=(\d+(?:\.\d+)?)", part)
        if match is None or match[1] not in _KNOBS:
            raise MethodError(f"{spec}: cache-dit takes {', '.join(_KNOBS)}, each a number of at least 0.")
        knobs[match[1]] = float(match[2])
    return knobs


@contextmanager
def _cache_dit(pipe: Any, *, blocks: float, threshold: float, warmup: float, taylor: float) -> Iterator[None]:
    import cache_dit  # pyright: ignore[reportMissingImports]  # an optional peer

    calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=int(taylor)) if taylor else None
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=int(blocks), residual_diff_threshold=threshold, max_warmup_steps=int(warmup)
    )
    cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=calibrator)
    try:
        yield
    finally:
        cache_dit.disable_cache(pipe)
