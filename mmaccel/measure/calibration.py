"""calibrate: try the settings of every diffusion method on a checkpoint, and take the nearest to its dense result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from mmaccel.errors import MethodError, MMAccelError, NotApplicableError
from mmaccel.measure.calibrated import Calibration, Candidate, Subject, describe, label
from mmaccel.measure.search_space import Ladder, first_fitting, ladders
from mmaccel.measure.trials import Trial, Trials
from mmaccel.method import Method, find, parse, registry

__all__ = ["calibrate", "checked_runtime", "wanted_methods"]

_FEWEST_STEPS = 5

logger = logging.getLogger(__name__)


def calibrate(
    pipe: Any,
    prompts: Iterable[str | int] | str,
    runtime: float = 0.5,
    methods: Iterable[str | type[Method] | Method] | None = None,
    steps: int | None = None,
    seed: int = 0,
    *,
    progress: Callable[[Candidate], None] | None = None,
    **call_arguments: Any,
) -> Calibration:
    """Find the method, and its setting, whose result is nearest to the dense one at `runtime` of the dense work.

    Work is counted and not timed: FLOPs of the transformers (matrix products, convolutions, attention) relative to the
    dense run, so that the result does not depend on what else the machine does and two calibrations agree. The best
    setting of each method is timed as well and compared in pixels; the table shows both. The distance that decides is
    that of the latents behind the last step, root mean square relative to the dense ones, mean over the prompts.

    Args:
        pipe: a diffusers pipeline with a transformer and no method on it. It is left as it was found, also by an
            exception or Ctrl-C: its scheduler and torch's random state are not touched. (Buffers of the autoencoder
            hold what any call leaves there.)
        prompts: a few texts like those that will be used; numbers or names of classes for class-conditional pipelines.
        runtime: the largest share of the dense transformer's work, in (0, 1].
        methods: which to try; all that fit if not given. A name or class is searched for its best setting; an instance,
            or a spec with knobs, is tried as it is.
        steps: steps of the sampler; those of the pipeline if not given. seed: of the noise; the n-th prompt has
            seed + n. progress: called with each candidate that was tried; they are logged as well (level INFO).
        call_arguments: what else the pipeline is called with (`height=480`, `guidance_scale=5.0`).

    Returns:
        a `Calibration`: give it, or its `method`, to `accelerate`, and `save` it for the next time.

    Raises:
        MethodError: no prompts, arguments out of range, or a runtime that no method reaches; the message names the
            smallest that each does.
        NotApplicableError: fewer than 5 steps (distilled models), where it does not pay.
        AdapterError: no pipeline. ConflictError: a method or a cache of diffusers is on it already.
        NonFiniteError: the dense result is not finite.
    """
    runtime = checked_runtime(runtime)
    wanted = wanted_methods(methods)
    trials = Trials(pipe, prompts, steps, seed, call_arguments)
    if steps is not None:
        _refuse_few(steps)
    with trials:
        search = _Search(trials, trials.dense(), runtime, progress)
        _refuse_few(search.steps)
        for entry in wanted:
            search.one(entry)
        candidates = _timed(search)
    best = min((one for one in candidates if one.fits(runtime)), key=_rank, default=None)
    unreached = search.unreached()
    if best is None:
        found = "; ".join(f"{name}: {why}" for name, why in unreached.items())
        raise MethodError(f"no method reaches runtime={runtime:g} here ({found}); ask for more.")
    subject = _subject(trials, search.steps, call_arguments)
    return Calibration(best.method, runtime, tuple(sorted(candidates, key=_rank)), unreached, subject)


def checked_runtime(runtime: Any) -> float:
    """A runtime as a float.

    Raises:
        MethodError: it is outside (0, 1].
    """
    if isinstance(runtime, (bool, str)) or not hasattr(runtime, "__float__") or not 0 < float(runtime) <= 1:
        raise MethodError(f"runtime={runtime!r} is outside (0, 1]; give a fraction of the dense time, such as 0.5.")
    return float(runtime)


def _refuse_few(steps: int) -> None:
    if steps < _FEWEST_STEPS:
        raise NotApplicableError(
            f"this schedule has {steps} steps, and with fewer than {_FEWEST_STEPS} (distilled models) it does not pay: "
            "what is left out of so few is seen. Run it as it is."
        )


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, MMAccelError) else f"{type(error).__name__}: {text}"


def wanted_methods(methods: Iterable[str | type[Method] | Method] | None) -> list[type[Method] | Method]:
    """The classes to search and the instances to try.

    Raises:
        MethodError: an unknown name, a stack, or none at all. NotApplicableError: not a method for diffusion.
    """
    if methods is None:
        return [cls for cls in registry().values() if "diffusion" in cls.info.targets]
    found: list[type[Method] | Method] = []
    for entry in [methods] if isinstance(methods, (str, type, Method)) else methods:
        if isinstance(entry, str):
            entry = find(entry) if ":" not in entry and "+" not in entry else _single(entry)
        if not (isinstance(entry, Method) or (isinstance(entry, type) and issubclass(entry, Method))):
            raise MethodError(f"{entry!r} is no method; give a name, a class or an instance.")
        if "diffusion" not in entry.info.targets:
            raise NotApplicableError(f"{entry.info.name} does not work on diffusion pipelines.")
        found.append(entry)
    if not found:
        raise MethodError("no method given; leave methods out to try all that fit.")
    return found


def _single(spec: str) -> Method:
    found = parse(spec)
    if len(found) != 1:
        raise MethodError(f"{spec!r} is a stack; calibrate tries methods one by one.")
    return found[0]


@dataclass
class _Search:
    """What has been tried so far."""

    trials: Trials
    dense: list[Trial]
    runtime: float
    progress: Callable[[Candidate], None] | None
    tried: dict[Method, Candidate] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return self.dense[0].steps

    def one(self, entry: type[Method] | Method) -> None:
        """Try one method."""
        name = entry.info.name
        self.names += [name] * (name not in self.names)
        try:
            for ladder in self._ladders(entry):
                found = ladder.settings
                first_fitting(
                    len(found),
                    ladder.start,
                    lambda at, found=found: self._over(self.attempt(found[at])),
                    lambda at, found=found: self._enough(self.attempt(found[at])),
                )
        except NotApplicableError as error:
            self.refused[name] = _one_line(error)

    def _ladders(self, entry: type[Method] | Method) -> list[Ladder]:
        if isinstance(entry, Method):
            return [Ladder((entry,))]
        try:
            return ladders(entry, self.runtime, self.steps, self._ratios)
        except Exception as error:  # a method that fails is a line of the table, not the end of an hour's work
            self.refused[entry.info.name] = _one_line(error)
            return []

    def attempt(self, method: Method) -> Candidate:
        """Call the pipeline with a method on, unless that was done before."""
        if method not in self.tried:
            try:
                made = self.trials.run(method)
                candidate = Candidate(method, self._work(made), self._distance(made))
            except NotApplicableError:
                raise
            except Exception as error:  # so is a setting
                candidate = Candidate(method, problem=_one_line(error))
            self.tried[method] = candidate
            outcome = candidate.problem or f"work {candidate.work:.3f}, distance {candidate.distance:.4f}"
            logger.info("%s: %s", label(method), outcome)
            if self.progress is not None:
                self.progress(candidate)
        return self.tried[method]

    def unreached(self) -> dict[str, str]:
        """Why the methods that have no setting within the budget have none."""
        found: dict[str, str] = {}
        for name in self.names:
            mine = [one for one in self.tried.values() if one.method.info.name == name]
            if any(one.fits(self.runtime) for one in mine):
                continue
            if name in self.refused:
                found[name] = self.refused[name]
                continue
            run = [one for one in mine if one.work is not None]
            least = min(run, key=lambda one: one.work or 0.0, default=None)
            found[name] = f"{least.work:.3f} at least ({label(least.method)})" if least else mine[0].problem
        return found

    def _over(self, candidate: Candidate) -> bool:
        return candidate.work is not None and not candidate.fits(self.runtime)

    def _enough(self, candidate: Candidate) -> bool:
        return candidate.work is not None and self.runtime - candidate.work < 0.5 / self.steps

    def _work(self, made: list[Trial]) -> float:
        return sum(trial.flops or 0 for trial in made) / sum(trial.flops or 0 for trial in self.dense)

    def _distance(self, made: list[Trial]) -> float:
        return float(np.mean([_relative(a.latents, b.latents) for a, b in zip(made, self.dense, strict=True)]))

    def _ratios(self) -> tuple[float, ...]:
        from mmaccel.diffusion.magcache import MagCache, measured_ratios

        transformer = self.trials.target.site.transformer
        found = [
            self.trials.first_call(MagCache(), number, lambda: measured_ratios(transformer))
            for number in range(len(self.dense))
        ]
        return tuple(np.mean(np.asarray(found, dtype=np.float64), axis=0).tolist())


def _timed(search: _Search) -> list[Candidate]:
    """All candidates, the best of each method with its time and PSNR."""
    finalists: dict[str, Candidate] = {}
    for one in sorted(search.tried.values(), key=_rank):
        if one.fits(search.runtime):
            finalists.setdefault(one.method.info.name, one)
    found = {one.method: one for one in search.tried.values()}
    seconds: dict[Method, list[float]] = {one.method: [] for one in finalists.values()}
    psnr: dict[Method, list[float]] = {one.method: [] for one in finalists.values()}
    dense = []
    for number in range(len(search.dense)):
        reference = search.trials.timed(None, number)
        dense.append(reference.seconds)
        for method in list(seconds):
            try:
                made = search.trials.timed(method, number)
            except Exception as error:
                found[method] = Candidate(method, problem=_one_line(error))
                del seconds[method]
                continue
            seconds[method].append(made.seconds or 0.0)
            psnr[method].append(_psnr(made.pixels, reference.pixels))
    for method, spent in seconds.items():
        time = sum(spent) / sum(dense)
        found[method] = replace(found[method], time=time, psnr=float(np.mean(psnr[method])))
    search.tried.update(found)
    return list(found.values())


def _rank(one: Candidate) -> tuple[float, float, str]:
    infinite = float("inf")
    return (
        infinite if one.distance is None else one.distance,
        infinite if one.work is None else one.work,
        one.method.spec,
    )


def _relative(made: torch.Tensor, dense: torch.Tensor) -> float:
    if made.shape != dense.shape:
        raise MMAccelError(f"the result has shape {tuple(made.shape)}, and the dense one {tuple(dense.shape)}.")
    return float((made.double() - dense.double()).norm() / dense.double().norm().clamp_min(1e-30))


def _psnr(made: Any, dense: Any) -> float:
    error = float(np.mean((made - dense) ** 2))
    return float("inf") if error == 0 else float(-10 * np.log10(error))


def _subject(trials: Trials, steps: int, arguments: dict[str, Any]) -> Subject:
    import diffusers

    from mmaccel import __version__

    pipe = trials.pipe
    return Subject(
        **describe(pipe),
        steps=trials.arguments.get("num_inference_steps", steps),
        versions={"mmaccel": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        device=str(pipe.device),
        dtype=str(trials.target.site.transformer.dtype).removeprefix("torch."),
        prompts=len(trials.requests),
        seed=trials.seed,
        arguments={k: v for k, v in arguments.items() if isinstance(v, (bool, int, float, str, type(None)))},
    )
