"""FasterCache: extrapolate attention outputs, and the branch without the prompt, over some steps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mmaccel.diffusion.diffusers_caches import STEPS, Clock, DiffusersCache, one_batch
from mmaccel.diffusion.diffusers_hooks import Installed
from mmaccel.errors import AdapterError, NotApplicableError
from mmaccel.method import Info, Stage, knob

if TYPE_CHECKING:
    from mmaccel.install import Installer
    from mmaccel.method import Touch
    from mmaccel.targets import Target


@dataclass(frozen=True)
class FasterCache(DiffusersCache):
    """diffusers' own FasterCache under our handle, told for each call whether it is guided.

    Sentence: nothing -> every self-attention alike -> all but every n-th step below a timestep -> extrapolate -> the
    attention's output from its last two, and the branch without the prompt from the other one and their last difference
    at low and at high frequencies. Source: "FasterCache: Training-Free Video Diffusion Model Acceleration with High
    Quality" (2024). Guided calls must bring both branches in one batch, without the prompt first, and latents with
    height and width (CogVideoX, Stable Diffusion 3, PixArt). diffusers extrapolates attention in a guided call only
    while the branch is skipped. A call without guidance has its attention extrapolated at any step of the range, whose
    first call diffusers would fail at: the first step of a sampling is computed whatever the range. every=1 with
    branch_every=1 is the identity.
    """

    every: int = knob(2, "calls from one computed self-attention to the next", low=1)
    branch_every: int = knob(5, "calls from one computed branch without the prompt to the next", low=1)
    stop: float = knob(681, "timestep (0 .. 1000) below which attention is extrapolated", low=0)
    branch_stop: float = knob(641, "timestep below which the branch without the prompt is extrapolated", low=0)
    weight: float = knob(0.5, "how far attention is extrapolated along its last change; 0 holds it", low=0.0, high=1.0)

    info: ClassVar[Info] = Info(
        name="fastercache", verb="reuse", stage=Stage.DIFFUSION,
        summary="extrapolates attention and the branch without the prompt over some steps (diffusers' own)",
        source="FasterCache: Training-Free Video Diffusion Model Acceleration with High Quality", year=2024,
        targets=("diffusion",), slots=(STEPS,), licence="Apache-2.0 (diffusers)",
    )  # fmt: skip

    @property
    def neutral(self) -> bool:
        """Every call computes."""
        return self.every == 1 and self.branch_every == 1

    def plan(self, target: Target) -> list[Touch]:
        """The transformer and its self-attentions.

        Raises:
            NotApplicableError: the family's pipelines bring their branches in calls of their own or in another order,
                or its latents have no height and width.
        """
        site = target.site
        try:
            layout = site.layout
        except AdapterError as error:
            raise NotApplicableError(f"fastercache: {error}") from None
        wrong = {
            "pipelines call it once for each branch of guidance": layout.guidance == "calls",
            "pipelines put the branch without the prompt last": layout.prompt_first,
            "its latents come as a sequence, whose frequencies diffusers does not take": layout.packed,
        }
        for reason, applies in wrong.items():
            if applies:
                raise NotApplicableError(f"fastercache does not fit {site.family}: {reason}. Use pab or taylorseer.")
        return super().plan(target)

    def sites(self, transformer: Any) -> list[str]:
        """The transformer's self-attentions of diffusers' classes."""
        from diffusers.hooks._common import _ATTENTION_CLASSES
        from diffusers.hooks.faster_cache import _TRANSFORMER_BLOCK_IDENTIFIERS

        return [
            name
            for name, module in transformer.named_modules()
            if isinstance(module, _ATTENTION_CLASSES)
            and not getattr(module, "is_cross_attention", False)
            and any(re.search(pattern, name) for pattern in _TRANSFORMER_BLOCK_IDENTIFIERS)
        ]

    def apply(self) -> Any:
        """diffusers' function."""
        from diffusers.hooks.faster_cache import apply_faster_cache

        return apply_faster_cache

    def config(self, transformer: Any, clock: Clock) -> Any:  # noqa: ARG002
        """The knobs; the timestep of the first call of a sampling is out of every range."""
        from diffusers.hooks.faster_cache import FasterCacheConfig

        def time() -> float:
            return clock() if config.begun else float("inf")

        inside: Any = (-1, self.stop), (-1, self.branch_stop)
        callback: Any = time
        config: Any = FasterCacheConfig(
            spatial_attention_block_skip_range=self.every, spatial_attention_timestep_skip_range=inside[0],
            unconditional_batch_skip_range=self.branch_every, unconditional_batch_timestep_skip_range=inside[1],
            attention_weight_callback=lambda _: self.weight, current_timestep_callback=callback,
        )  # fmt: skip
        config.begun = False
        return config

    def begin(self, config: Any, installed: Installed, steps: int | None) -> None:
        """The first call of a sampling computes everything."""
        config.begun = False
        super().begin(config, installed, steps)

    def watch(self, installer: Installer, installed: Installed, config: Any) -> None:
        """Tell the hooks of each call how it is laid out, and count what they do."""
        site, patcher, events = installer.target.site, installer.patcher, installer.report.events
        transformer = installed.transformer
        root, *inner = (hook for _, _, hook, _ in installed.hooks)
        signature = site.arguments

        def before(_: Any, args: Any, kwargs: Any) -> None:
            latents = signature(transformer, args, kwargs)["hidden_states"]
            if not config.begun:
                guided = site.parts(latents) == 2
                for hook in (root, *inner):
                    hook.is_guidance_distilled = not guided
            root.tensor_format = "BCHW" if latents.ndim == 4 else "BFCHW" if site.layout.frames_first else "BCFHW"
            root.uncond_cond_input_kwargs_identifiers = [
                name for name, value in kwargs.items() if getattr(value, "shape", ())[:1] == latents.shape[:1]
            ]

        def count(call: Any, *args: Any, **kwargs: Any) -> Any:
            latents = signature(transformer, args, kwargs)["hidden_states"]
            if not root.is_guidance_distilled:
                event = "branches computed" if len(latents) == installed.batch else "branches reused"
                events[event] = events.get(event, 0) + 1
            return call(*args, **kwargs)

        one_batch(installer, installed, self.info.name)
        patcher.before(transformer, before)
        patcher.wrap(root.fn_ref, "original_forward", count)
        patcher.after(transformer, lambda *_: setattr(config, "begun", True))
        super().watch(installer, Installed(transformer, installed.hooks[1:]), config)
