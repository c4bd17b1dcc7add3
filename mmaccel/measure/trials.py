"""Calls of one diffusers pipeline with the same prompts and noise, dense or with a method on, that leave no trace."""

from __future__ import annotations

import copy
import inspect
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeVar

import torch

from mmaccel.api import accelerate
from mmaccel.errors import AdapterError, ConflictError, MethodError, NonFiniteError, NotApplicableError
from mmaccel.handle import present
from mmaccel.measure.flops import counted_flops
from mmaccel.measure.generation import pipeline_stages, watch_pipeline, watch_steps
from mmaccel.targets import resolve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    import numpy as np

    from mmaccel.method import Method

__all__ = ["Trial", "Trials"]

T = TypeVar("T")

_OURS = {"prompt", "class_labels", "generator", "num_inference_steps", "output_type", "return_dict"}


@dataclass(frozen=True)
class Trial:
    """One call. latents: what the last step left, on the CPU. steps: steps of the scheduler.

    flops: of the transformers, as `count_flops` counts them, or None in a call that was timed. seconds: of the
    transformers, and pixels, float, 0 to 1, in a call that was timed, else None.
    """

    latents: torch.Tensor
    steps: int
    flops: int | None = None
    seconds: float | None = None
    pixels: np.ndarray | None = None


class Trials:
    """Calls a pipeline with each of some prompts. A context manager; at its end the pipeline is what it was before.

    The calls run on copies of the scheduler, with noise from a generator of their own, and outside of the random state
    of torch. prompts: texts, or numbers or names of classes where the pipeline is asked for classes. A method that
    measures in its first call, which is dense then, is judged by the next one.

    Raises:
        MethodError: no prompts, or prompts or arguments that the pipeline cannot be given.
        AdapterError, NotApplicableError: no pipeline with a transformer, or one that takes no prompt.
        ConflictError: a method, or a cache of diffusers, is on it already.
    """

    def __init__(self, pipe: Any, prompts: Any, steps: int | None, seed: int, arguments: Mapping[str, Any]) -> None:
        self.pipe, self.target = pipe, resolve(pipe)
        if self.target.kind != "diffusion" or self.target.site.pipeline is None:
            raise AdapterError(f"calibrate needs a pipeline of diffusers, not a {type(pipe).__name__}.")
        if self.target.site.scheduler is None:
            raise NotApplicableError(f"{type(pipe).__name__} has no scheduler, so there are no steps to save.")
        _check_dense(self.target)
        self.takes = inspect.signature(pipe.__call__).parameters
        self.requests = _requests(pipe, self.takes, prompts)
        self.arguments = _arguments(pipe, self.takes, steps, arguments)
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise MethodError(f"seed must be a whole number of at least 0, not {seed!r}.")
        self.seed = seed
        self._compiled = _compiled(self.target)
        self._stack = ExitStack()
        self._dense: dict[int, int] = {}
        self._measuring: set[Method] = set()

    def __enter__(self) -> Self:
        pipe = self.pipe
        device = torch.device(getattr(pipe, "_execution_device", pipe.device))
        cuda = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=cuda))
            stack.callback(_restore, pipe, dict(vars(pipe)), _without_registry(self.target))
            vars(pipe)["_progress_bar_config"] = {**getattr(pipe, "_progress_bar_config", {}), "disable": True}
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stack.close()

    def dense(self) -> list[Trial]:
        """Call the pipeline with every prompt as it is, counting; to be done first.

        Raises:
            NonFiniteError: the latents of a call are not finite.
        """
        with self._scheduler():
            found = [self._count(number) for number in range(len(self.requests))]
        self._dense = {number: trial.flops or 0 for number, trial in enumerate(found)}
        return found

    def run(self, method: Method) -> list[Trial]:
        """Call the pipeline with a method on and every prompt, counting.

        Raises:
            NonFiniteError: the latents of a call are not finite.
        """
        with self._scheduler(), accelerate(self.pipe, method):
            first = self._count(0)
            if (first.flops or 0) >= 0.99 * self._dense[0] and not method.neutral:
                again = self._count(0)
                if (again.flops or 0) < (first.flops or 0):
                    self._measuring.add(method)
                    first = again
            return [first, *(self._count(number) for number in range(1, len(self.requests)))]

    def timed(self, method: Method | None, number: int) -> Trial:
        """Call the pipeline with one of the prompts, decode and time it."""
        with self._scheduler(), accelerate(self.pipe, method) if method is not None else nullcontext():
            if self._compiled or method in self._measuring:  # counted calls ran what was not compiled
                self._call(number, "latent")
            return self._time(number)

    def first_call(self, method: Method, number: int, read: Callable[[], T]) -> T:
        """Call the pipeline once with a method on and one of the prompts; what `read` gives while it is still on."""
        with self._scheduler(), accelerate(self.pipe, method):
            self._call(number, "latent")
            return read()

    @contextmanager
    def _scheduler(self) -> Iterator[None]:
        # not by setattr, which would write into the configuration of the pipeline
        given = vars(self.pipe)["scheduler"]
        vars(self.pipe)["scheduler"] = copy.deepcopy(given)
        try:
            yield
        finally:
            vars(self.pipe)["scheduler"] = given

    def _count(self, number: int) -> Trial:
        counter = counted_flops()
        with watch_pipeline(self.pipe, counter.get_total_flops) as spans, counter:
            latents, steps, _ = self._call(number, "latent")
        return Trial(latents, steps, flops=int(spans.totals(lambda a, b: b - a).get("transformer", 0)))

    def _time(self, number: int) -> Trial:
        (latents, steps, found), stages = pipeline_stages(self.pipe, lambda: self._call(number, "np"))
        return Trial(latents, steps, seconds=stages["transformer"], pixels=_pixels(found))

    def _call(self, number: int, kind: str) -> tuple[torch.Tensor, int, Any]:
        with watch_steps(self.pipe) as denoised:
            found = self.pipe(
                **self.requests[number],
                **self.arguments,
                **({"output_type": kind} if "output_type" in self.takes else {}),
                # on the host, so that a seed means the same noise on every device
                generator=torch.Generator().manual_seed(self.seed + number),
            )
        if denoised.latents is None:
            raise NotApplicableError(f"{type(self.pipe).__name__} never called its scheduler, so it cannot be judged.")
        latents = denoised.latents.detach().cpu()
        if not torch.isfinite(latents).all():
            raise NonFiniteError("the latents of the last step hold NaN or infinity; try another dtype.")
        return latents, denoised.steps, found


def _check_dense(target: Any) -> None:
    on = [method.spec for method in present(target)]
    if on:
        raise ConflictError(f"{' + '.join(on)} is on this pipeline already; remove it before you calibrate.")
    if target.site.cache is not None:
        raise ConflictError(f"diffusers' {target.site.cache} is on; call disable_cache() before you calibrate.")


def _compiled(target: Any) -> bool:
    """Whether a transformer, or a part of it, is made by torch.compile."""
    modules = [module for transformer in target.site.transformers.values() for module in transformer.modules()]
    return any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in modules)


def _requests(pipe: Any, takes: Mapping[str, Any], prompts: Any) -> list[dict[str, Any]]:
    given = [prompts] if isinstance(prompts, (str, int)) else [] if prompts is None else list(prompts)
    if not given:
        raise MethodError("no prompts given; a few that are like those you will use are enough.")
    if "prompt" in takes:
        wrong = next((prompt for prompt in given if not isinstance(prompt, str)), None)
        if wrong is not None:
            raise MethodError(f"{type(pipe).__name__} takes prompts of text, not {wrong!r}.")
        return [{"prompt": prompt} for prompt in given]
    if "class_labels" not in takes:
        raise NotApplicableError(f"{type(pipe).__name__} takes neither a prompt nor a class, so it is not calibrated.")
    names = dict(getattr(pipe, "labels", None) or {})
    count = getattr(pipe.transformer.config, "num_embeds_ada_norm", None)
    found = []
    for prompt in given:
        number: Any = names.get(prompt) if isinstance(prompt, str) else prompt
        if hasattr(number, "item"):  # a number of numpy or torch
            number = number.item()
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < (count or number + 1):
            known = f"; it knows {', '.join(list(names)[:8])} and others" if names else ""
            raise MethodError(f"{type(pipe).__name__} knows no class {prompt!r}{known}.")
        found.append({"class_labels": [number]})
    return found


def _arguments(pipe: Any, takes: Mapping[str, Any], steps: int | None, given: Mapping[str, Any]) -> dict[str, Any]:
    kind = type(pipe).__name__
    for name in given:
        if name in _OURS:
            raise MethodError(f"{name} is set by calibrate; give prompts, steps and seed.")
        if name not in takes:
            raise MethodError(f"{kind} cannot be given {name}.")
    if steps is None:
        return dict(given)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise MethodError(f"steps must be a whole number of at least 1, not {steps!r}.")
    if "num_inference_steps" not in takes:
        raise MethodError(f"{kind} cannot be given a number of steps.")
    return {**given, "num_inference_steps": steps}


def _pixels(found: Any) -> np.ndarray:
    import numpy as np

    values = getattr(found, "frames", None)
    return np.asarray(found.images if values is None else values, dtype=np.float64)


def _without_registry(target: Any) -> list[Any]:
    return [
        module
        for transformer in target.site.transformers.values()
        for module in transformer.modules()
        if "_diffusers_hook" not in vars(module)
    ]


def _restore(pipe: Any, before: dict[str, Any], bare: list[Any]) -> None:
    own = vars(pipe)
    for name in set(own) - set(before):
        del own[name]
    own.update(before)
    for module in bare:
        registry = vars(module).get("_diffusers_hook")
        # the first call of a pipeline leaves an empty one
        if registry is not None and not registry.hooks:
            del vars(module)["_diffusers_hook"]
