"""What the caches that diffusers ships have in common under our handle: exact undo, fresh state, honest counts."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmaccel.diffusion.diffusers_hooks import Installed, added, traces, undo_hooks
from mmaccel.errors import ConflictError, NonFiniteError, NotApplicableError
from mmaccel.method import Method, Touch

if TYPE_CHECKING:
    from mmaccel.install import Installer
    from mmaccel.targets import Target

__all__ = [
    "STEPS",
    "TOKENS",
    "Clock",
    "DiffusersCache",
    "count_steps",
    "one_batch",
    "refuse_cache",
]

STEPS = "on the steps of the diffusion transformer"
TOKENS = "on the tokens inside the diffusion transformer"


class Clock:
    """The timestep of the step under way, on the scale 0 .. 1000, and whether a new sampling has begun.

    A pipeline says so by itself (`current_timestep`). Elsewhere there is the argument `timestep`: fractions where the
    first one of a sampling is 1 at most. A turn of its direction, or another shape of the latents, begins a new
    sampling for a transformer alone. Calls with the same timestep are numbered by `branch`.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = None if pipeline is None else weakref.ref(pipeline)
        self.last: float | None = None
        self.direction = 0
        self.shape: Any = None
        self.branch = 0
        self.fractions = False

    def __call__(self) -> float:
        """The timestep."""
        told = None if self.pipeline is None else getattr(self.pipeline(), "_current_timestep", None)
        value = self.last if told is None else float(told)
        if value is None:
            raise NotApplicableError(
                "this transformer was called without the argument timestep, which the cache needs."
            )
        return value * 1000 if told is None and self.fractions else value

    def tick(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Take note of a call of the transformer. Returns whether it begins a new sampling."""
        latents = kwargs.get("hidden_states", args[0] if args else None)
        timestep, shape = kwargs.get("timestep"), getattr(latents, "shape", None)
        if timestep is None:
            return False
        now = float(timestep.max() if hasattr(timestep, "max") else timestep)
        step = 0 if self.last is None else (now > self.last) - (now < self.last)
        begun = self.shape not in (None, shape) or (step != 0 and self.direction != 0 and step != self.direction)
        self.direction = 0 if begun else (step or self.direction)
        self.branch = 0 if step or self.last is None else self.branch + 1
        if begun or self.last is None:
            self.fractions = now <= 1
        self.last, self.shape = now, shape
        return begun


@dataclass(frozen=True)
class DiffusersCache(Method):
    """Base of the methods that wrap a cache of diffusers."""

    def sites(self, transformer: Any) -> list[str]:
        """Dotted names of the modules that the cache will hook."""
        raise NotImplementedError

    def config(self, transformer: Any, clock: Clock) -> Any:
        """The configuration of diffusers."""
        raise NotImplementedError

    def enable(self, transformer: Any, config: Any) -> None:
        """Have diffusers put its hooks on, also where the model itself has no interface for it."""
        if hasattr(transformer, "enable_cache"):
            transformer.enable_cache(config)
        else:
            self.apply()(transformer, config)

    def apply(self) -> Callable[[Any, Any], None]:
        """The function of diffusers that puts the hooks on any module."""
        raise NotImplementedError

    def watch(self, installer: Installer, installed: Installed, config: Any) -> None:  # noqa: ARG002
        """Count what the cache does; by default whether the first hooked module computes."""
        count_steps(installer, installed.hooks[0][2])

    def begin(self, config: Any, installed: Installed, steps: int | None) -> None:  # noqa: ARG002
        """A new sampling of `steps` steps begins; None where nobody says how many."""
        installed.fresh()

    def plan(self, target: Target) -> list[Touch]:
        """The hooked modules.

        Raises:
            NotApplicableError: the transformer has nothing that the cache can hook.
            ConflictError: a cache of diffusers is switched on already.
        """
        refuse_cache(target.site)
        touches = []
        for name, transformer in target.site.transformers.items():
            kind = type(transformer).__name__
            found = self.sites(transformer)
            if not found:
                raise NotApplicableError(f"{self.info.name} finds no module in {kind} that it can hook.")
            touches += [Touch(f"{name}.{site}", "diffusers' hook: computes or reuses") for site in found]
        return touches

    def install(self, installer: Installer) -> None:
        """Have diffusers put its hooks on, and note which traces to take away behind them."""
        site, patcher = installer.target.site, installer.patcher
        for transformer in site.transformers.values():
            clock, before, called = Clock(site.pipeline), traces(transformer), []
            config = self.config(transformer, clock)
            # whatever fails half way must find its undo recorded
            installed = Installed(transformer, [])
            patcher.on_undo(undo_hooks(installed, before, config, called))
            patcher.before(transformer, _start(self, site, config, installed))
            try:
                self.enable(transformer, config)
            finally:
                installed.hooks.extend(added(before))
            if not installed.hooks:
                raise NotApplicableError(f"{self.info.name} hooked no module of {type(transformer).__name__}.")
            self.watch(installer, installed, config)
            for method in ("cache_context", "_reset_stateful_cache"):
                if hasattr(transformer, method):
                    patcher.wrap(transformer, method, _note(called))
            patcher.before(transformer, self._tick(site.pipeline is None, clock, config, installed))
            patcher.after(transformer, lambda *_, at=installed: at.name(None), always=True)
            if site.pipeline is not None:
                # the pipeline clears the cache at its end, which a call that raised never reaches
                again = self._around(site.pipeline, clock, config, installed)
                patcher.wrap(site.pipeline.scheduler, "set_timesteps", again)

    def _tick(self, alone: bool, clock: Clock, config: Any, installed: Installed) -> Any:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            if clock.tick(args, kwargs) and alone:
                self.begin(config, installed, None)
            if not installed.named:
                installed.name(f"call {clock.branch}")

        return hook

    def _around(self, pipeline: Any, clock: Clock, config: Any, installed: Installed) -> Any:
        reference = weakref.ref(pipeline.scheduler)

        def around(call: Any, *args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            scheduler = reference()
            clock.last = None
            self.begin(config, installed, None if scheduler is None else len(scheduler.timesteps))
            return result

        return around


def refuse_cache(site: Any) -> None:
    """Make sure that no cache is on which diffusers itself was asked for.

    Raises:
        ConflictError: one is.
    """
    if site.cache is not None:
        raise ConflictError(f"{site.family} has diffusers' {site.cache} on; call disable_cache() first.")


def _note(called: list[Any]) -> Callable[..., Any]:
    def around(call: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(True)
        return call(*args, **kwargs)

    return around


def one_batch(installer: Installer, installed: Installed, name: str) -> None:
    """Refuse pipelines that call the transformer with several sizes of batch in a sampling.

    For caches that keep one output a module, whoever calls it.
    """
    if installer.target.site.pipeline is None:  # another shape begins another sampling then
        return

    def hook(_: Any, args: Any, kwargs: Any) -> None:
        size = len(kwargs.get("hidden_states", args[0] if args else ()))
        if installed.batch not in (None, size):
            raise NotApplicableError(
                f"{name} keeps one output a module, and this pipeline calls its transformer with batches of "
                f"{installed.batch} and {size}; switch off guidance that needs calls of its own (such as stg_scale and "
                "modality_scale of LTX-2, skip_guidance_layers of Stable Diffusion 3), or use taylorseer."
            )
        installed.batch = size

    installer.patcher.before(installed.transformer, hook)


def count_steps(installer: Installer, hook: Any) -> None:
    """Count in the report how often `hook` calls the module below it, and how often it answers by itself."""
    events, computed = installer.report.events, []
    note, methods = installer.report.note, " + ".join(installer.report.methods)

    def outer(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        computed.clear()
        result = call(*args, **kwargs)
        event = "steps computed" if computed else "steps reused"
        events[event] = events.get(event, 0) + 1
        calls = events.get("steps computed", 0)
        note("" if event == "steps reused" else f"{methods}: nothing was reused in {calls} calls", about="reused")
        return result

    def inner(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        computed.append(True)
        return call(*args, **kwargs)

    installer.patcher.wrap(hook.fn_ref, "forward", outer)
    installer.patcher.wrap(hook.fn_ref, "original_forward", inner)


def _start(method: DiffusersCache, site: Any, config: Any, installed: Installed) -> Callable[..., None]:
    """What the first call of a sampling is checked for, ahead of everything else."""
    given = None if site.scheduler is None else weakref.ref(site.scheduler)
    tables: list[Any] = []

    def hook(_: Any, args: Any, kwargs: Any) -> None:
        scheduler = site.scheduler
        table = getattr(scheduler, "timesteps", None)
        if tables and tables[0] is table:
            return
        tables[:] = [table]
        if given is not None and scheduler is not given():  # one that came later, whose calls nobody follows
            method.begin(config, installed, len(scheduler.timesteps))
        latents = kwargs.get("hidden_states", args[0] if args else None)
        if hasattr(latents, "isfinite") and not latents.isfinite().all():
            raise NonFiniteError(
                "the latents of the first step hold NaN or infinity; check what was given to the pipeline."
            )

    return hook
