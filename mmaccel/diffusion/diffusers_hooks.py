"""The hooks that diffusers' caches put on modules: which there are, what they hold, and how they come off exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmaccel.core.patching import Chain, settle
from mmaccel.errors import NotApplicableError

__all__ = ["Installed", "Traces", "added", "blocks", "holding", "known_blocks", "traces", "undo_hooks"]

Traces = dict[Any, tuple[dict[str, Any], frozenset[str]]]


def blocks(transformer: Any) -> dict[str, Any]:
    """The blocks that diffusers' caches know, by dotted name, in order."""
    from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS as KNOWN

    return {
        f"{name}.{index}": block
        for name, children in transformer.named_children()
        if name in KNOWN and type(children).__name__ == "ModuleList"
        for index, block in enumerate(children)
    }


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


def holding(module: Any) -> list[str]:
    """Names of diffusers' hooks on a module that hold something from call to call."""
    registry = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else [name for name, hook in registry.hooks.items() if hook._is_stateful]


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


def traces(transformer: Any) -> Traces:
    """What each module of a transformer has of diffusers' hooks: its own attributes, and the names of its hooks."""
    names = ("_diffusers_hook", "_cache_config", "forward")
    found = {}
    for module in transformer.modules():
        own = vars(module)
        registry = own.get("_diffusers_hook")
        hooks = frozenset(registry.hooks) if registry is not None else frozenset()
        found[module] = {name: own[name] for name in names if name in own}, hooks
    return found


def added(before: Traces) -> list[tuple[Any, str, Any, Any]]:
    """Hooks that have come since: module, name, hook, and the `forward` that calls it."""
    return [
        (module, name, hook, vars(module)["forward"])
        for module, (_, had) in before.items()
        if "_diffusers_hook" in vars(module)
        for name, hook in module._diffusers_hook.hooks.items()
        if name not in had
    ]


def undo_hooks(installed: Installed, before: Traces, config: Any, called: list[Any]) -> Callable[[], None]:
    """What takes the hooks of a cache off and leaves all else as `before`; `called` holds something after a call."""
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
