"""Fewer steps: the baseline that every method of the diffusion stage has to beat at equal cost."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mmaccel.errors import ConflictError, NotApplicableError
from mmaccel.method import Info, Method, Stage, Touch, knob

if TYPE_CHECKING:
    from mmaccel.install import Installer
    from mmaccel.targets import Target


@dataclass(frozen=True)
class FewerSteps(Method):
    """Run max(1, round(keep * steps)) of the steps that the pipeline is asked for, or `keep` of them if it is an int.

    Sentence: nothing -> the schedule -> keep -> the scheduler's own schedule of fewer steps -> the whole sampling.
    The result is bit for bit that of a call with fewer steps. keep=1.0 is the identity. A schedule of the caller's own
    (`timesteps=`, `sigmas=` other than the even spacing from 1 to 1/steps) cannot be thinned and is refused.
    """

    keep: float | int = knob(0.5, "fraction in (0, 1] or number of the steps that are run")

    info: ClassVar[Info] = Info(
        name="fewer-steps", verb="drop", stage=Stage.DIFFUSION, summary="runs fewer denoising steps",
        source="baseline", year=2026, targets=("diffusion",), baseline=True,
        slots=("number of denoising steps",),
    )  # fmt: skip

    def plan(self, target: Target) -> list[Touch]:
        """The scheduler.

        Raises:
            NotApplicableError: a transformer alone has no scheduler.
        """
        if getattr(target.site.pipeline, "scheduler", None) is None:
            raise NotApplicableError("fewer-steps needs a pipeline; a transformer alone has no scheduler.")
        return [Touch("scheduler.set_timesteps", "asks for fewer steps")]

    def install(self, installer: Installer) -> None:
        """Change the number on its way to the scheduler."""
        report, site = installer.report, installer.target.site
        scheduler = weakref.ref(site.scheduler)

        def check(*_: Any) -> None:
            if site.scheduler is not scheduler():
                raise ConflictError(
                    "the scheduler of this pipeline was replaced after fewer-steps was put on, which works on the old "
                    "one; remove the handle and call accelerate again."
                )

        def around(call: Any, num_inference_steps: Any = None, *args: Any, **kwargs: Any) -> Any:
            sigmas = kwargs.get("sigmas")
            if self.neutral:
                return call(num_inference_steps, *args, **kwargs)
            if kwargs.get("timesteps") is not None:
                raise NotApplicableError("fewer-steps cannot thin timesteps of your own; leave timesteps out.")
            asked = num_inference_steps if sigmas is None else len(sigmas)
            steps = min(self.keep, asked) if isinstance(self.keep, int) else max(1, round(self.keep * asked))
            if sigmas is not None:
                kwargs["sigmas"] = _fewer(sigmas, steps)
            report.events["steps"] = f"{steps} of {asked}"
            return call(None if num_inference_steps is None else steps, *args, **kwargs)

        installer.patcher.wrap(site.scheduler, "set_timesteps", around)
        for transformer in site.transformers.values():
            installer.patcher.before(transformer, check)


def _fewer(sigmas: Any, steps: int) -> Any:
    import numpy

    # pipelines make these in two ways, which differ in the last digit
    if not numpy.allclose(sigmas, numpy.linspace(1.0, 1 / len(sigmas), len(sigmas)), rtol=0, atol=1e-9):
        raise NotApplicableError("fewer-steps cannot thin sigmas of your own; leave sigmas out.")
    return numpy.linspace(1.0, 1 / steps, steps)
