"""What the caches that diffusers ships have in common under our handle: exact undo, fresh state, honest counts."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmaccel.core.patching import Chain, settle
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
    "Installed",
    "blocks",
    "count_steps",
    "holding",
    "known_blocks",
    "one_batch",
    "refuse_cache",
]

STEPS = "on the steps of the diffusion transformer"
TOKENS = "on the tokens inside the diffusion transformer"


def blocks(transformer: Any) -> dict[str, Any]:
    """The blocks that diffusers' caches know, by dotted name, in order."""
    from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS as KNOWN

    return {
        f"{name}.{index}": block
        for name, children in transformer.named_children()
        if name in KNOWN and type(children).__name__ == "ModuleList"
        for index, block in enumerate(children)
    }


@dataclass
class Installed:
    """The hooks that one cache has put on one transformer."""

    transformer: Any
    hooks: list[tuple[Any, str, Any, Any]]  # module, name, hook, the `forward` that calls it
    batch: int | None = None

    def fresh(self) -> None:
        """Forget what earlier calls left; the context of a call under way stays."""
        self.batch = None
        for module, _, hook, _ in self.hooks:
            if hook._is_stateful:
                kept = [(manager, manager._context) for manager in _managers(hook)]
                hook.reset_state(module)
                for manager, context in kept:
                    manager.set_context(context)

    @property
    def named(self) -> bool:
        """Whether somebody has named the call under way, or nothing in the cache asks for its name."""
        managers = [manager for _, _, hook, _ in self.hooks for manager in _managers(hook)]
        return not managers or any(manager._context is not None for manager in managers)

    def name(self, name: str | None) -> None:
        """Name the call under way, for pipelines that do not; None takes a name of ours away again."""
        from diffusers.hooks.hooks import CacheContext

        for _, _, hook, _ in self.hooks:
            for manager in _managers(hook):
                if name is not None:
                    manager.set_context(CacheContext(name))
                elif manager._context is not None and manager._context.name.startswith("call "):
                    manager.set_context(None)


def _managers(hook: Any) -> list[Any]:
    return [value for value in vars(hook).values() if hasattr(value, "set_context")]


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
            clock, before, called = Clock(site.pipeline), _traces(transformer), []
            config = self.config(transformer, clock)
            # whatever fails half way must find its undo recorded
            installed = Installed(transformer, [])
            patcher.on_undo(_undo(installed, before, config, called))
            patcher.before(transformer, _start(self, site, config, installed))
            try:
                self.enable(transformer, config)
            finally:
                installed.hooks.extend(_added(before))
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


def holding(module: Any) -> list[str]:
    """Names of diffusers' hooks on a module that hold something from call to call."""
    registry = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else [name for name, hook in registry.hooks.items() if hook._is_stateful]


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


def known_blocks(name: str, transformer: Any) -> list[str]:
    """The blocks, if diffusers knows where their hidden states are.

    Raises:
        NotApplicableError: it does not.
    """
    from diffusers.hooks._helpers import TransformerBlockRegistry

    found = blocks(transformer)
    for block in found.values():
        try:
            TransformerBlockRegistry.get(type(block))
        except ValueError:
            raise NotApplicableError(
                f"{name}: diffusers does not say where the hidden states of a {type(block).__name__} are; use "
                "taylorseer, which needs no block to be skipped."
            ) from None
    return list(found)


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


_Before = dict[Any, tuple[dict[str, Any], frozenset[str]]]


def _traces(transformer: Any) -> _Before:
    names = ("_diffusers_hook", "_cache_config", "forward")
    found = {}
    for module in transformer.modules():
        own = vars(module)
        registry = own.get("_diffusers_hook")
        hooks = frozenset(registry.hooks) if registry is not None else frozenset()
        found[module] = {name: own[name] for name in names if name in own}, hooks
    return found


def _added(before: _Before) -> list[tuple[Any, str, Any, Any]]:
    return [
        (module, name, hook, vars(module)["forward"])
        for module, (_, had) in before.items()
        if "_diffusers_hook" in vars(module)
        for name, hook in module._diffusers_hook.hooks.items()
        if name not in had
    ]


def _undo(installed: Installed, before: _Before, config: Any, called: list[Any]) -> Callable[[], None]:
    transformer = installed.transformer

    def undo() -> None:
        for module, name, hook, _ in reversed(installed.hooks):
            registry = vars(module).get("_diffusers_hook")
            if registry is not None and registry.hooks.get(name) is hook:
                _unhook(module, registry, name)
        for module, (had, _) in before.items():
            own = vars(module)
            registry = own.get("_diffusers_hook")
            if registry is None:
                continue
            settle(module, "forward")
            # a pipeline's first call puts a registry on the transformer, cache or not, and it stays there
            if not ("_diffusers_hook" in had or (module is transformer and called)) and not registry.hooks:
                del own["_diffusers_hook"]
            if "forward" not in had and getattr(own.get("forward"), "__func__", None) is type(module).forward:
                del own["forward"]
        own = vars(transformer)
        if own.get("_cache_config") is config or own.get("_cache_config", ...) is None:
            own.pop("_cache_config")
            if "_cache_config" in before[transformer][0]:
                own["_cache_config"] = before[transformer][0]["_cache_config"]
        registry = own.get("_diffusers_hook")
        if registry is not None:
            registry.invalidate_child_registries_cache()
            registry._get_child_registries()

    return undo


def _unhook(module: Any, registry: Any, name: str) -> None:
    """Take out one hook and leave those around it: diffusers' own removal of an inner hook drops the outer one."""
    index = registry._hook_order.index(name)
    reference = registry._fn_refs[index]
    below = reference.original_forward if reference.original_forward is not None else reference.forward
    above = registry._fn_refs[index + 1] if index + 1 < len(registry._fn_refs) else None
    if above is not None:
        field = "forward" if above.original_forward is None else "original_forward"
        current = getattr(above, field)
        if isinstance(current, Chain):
            current.original = below
        else:
            setattr(above, field, below)
    elif _calls(vars(module).get("forward"), reference):
        module.forward = below
    elif _calls(vars(module).get("_old_forward"), reference):  # under a hook of accelerate
        module._old_forward = below
    else:  # under somebody's wrapper: stays there as a plain call of what is below
        reference.forward = below
    del registry.hooks[name]
    registry._hook_order.pop(index)
    registry._fn_refs.pop(index)


def _calls(forward: Any, reference: Any) -> bool:
    """Whether `forward` is what diffusers made of this very hook."""
    cells = getattr(getattr(forward, "func", None), "__closure__", None) or ()
    return any(cell.cell_contents is reference for cell in cells)


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
