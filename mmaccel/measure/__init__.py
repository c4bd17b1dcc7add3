"""Timers, memory, FLOPs, quality and plots: what the command line, the benchmarks and the tests measure with.

times = measure.compare(model, inputs, ["holitom:keep=0.15", "evs:keep=0.15"])  # dense and methods, interleaved
times["holitom:keep=0.15"].total.median / times["dense"].total.median

model, processor = mmaccel.tiny.video_qa()
cases = [measure.Case(render(clip), [(q.text, q.answer, q.kind) for q in questions]) for ...]
result = measure.evaluate(model, processor, cases, ["holitom:keep=0.15", "random:keep=0.15"])
result.rows()  # dense first: accuracy with interval, agreement, KL, tokens, FLOPs
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmaccel.measure.calibrated import Calibration as Calibration
    from mmaccel.measure.calibrated import Candidate as Candidate
    from mmaccel.measure.calibration import calibrate as calibrate
    from mmaccel.measure.evaluation import Case as Case
    from mmaccel.measure.evaluation import Evaluation as Evaluation
    from mmaccel.measure.evaluation import evaluate as evaluate
    from mmaccel.measure.flops import count_flops as count_flops
    from mmaccel.measure.flops import encoder_flops as encoder_flops
    from mmaccel.measure.flops import paper_prefill_macs as paper_prefill_macs
    from mmaccel.measure.flops import prefill_flops as prefill_flops
    from mmaccel.measure.memory import Peak as Peak
    from mmaccel.measure.memory import peak_memory as peak_memory
    from mmaccel.measure.pareto import Point as Point
    from mmaccel.measure.pareto import pareto_plot as pareto_plot
    from mmaccel.measure.quality import Interval as Interval
    from mmaccel.measure.quality import bootstrap_difference as bootstrap_difference
    from mmaccel.measure.quality import bootstrap_mean as bootstrap_mean
    from mmaccel.measure.quality import bootstrap_ratio as bootstrap_ratio
    from mmaccel.measure.quality import kl_to_dense as kl_to_dense
    from mmaccel.measure.rows import append_rows as append_rows
    from mmaccel.measure.rows import environment as environment
    from mmaccel.measure.rows import read_rows as read_rows
    from mmaccel.measure.scenario import Scenario as Scenario
    from mmaccel.measure.scenario import load_scenario as load_scenario
    from mmaccel.measure.scenario import options_of as options_of
    from mmaccel.measure.scenario import run_scenario as run_scenario
    from mmaccel.measure.shapes import Shapes as Shapes
    from mmaccel.measure.shapes import record_shapes as record_shapes
    from mmaccel.measure.stages import Spread as Spread
    from mmaccel.measure.stages import StageTimes as StageTimes
    from mmaccel.measure.stages import compare as compare
    from mmaccel.measure.stages import time_per_output_token as time_per_output_token
    from mmaccel.measure.stages import ttft as ttft

_HOMES = {
    "calibrated": ("Calibration", "Candidate"),
    "calibration": ("calibrate",),
    "evaluation": ("Case", "Evaluation", "evaluate"),
    "flops": ("count_flops", "encoder_flops", "paper_prefill_macs", "prefill_flops"),
    "memory": ("Peak", "peak_memory"),
    "pareto": ("Point", "pareto_plot"),
    "quality": ("Interval", "bootstrap_difference", "bootstrap_mean", "bootstrap_ratio", "kl_to_dense"),
    "rows": ("append_rows", "environment", "read_rows"),
    "scenario": ("Scenario", "load_scenario", "options_of", "run_scenario"),
    "shapes": ("Shapes", "record_shapes"),
    "stages": ("Spread", "StageTimes", "compare", "time_per_output_token", "ttft"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
