"""accelerate: resolve -> plan -> check -> apply -> Handle. Nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

from mmaccel.compose import arrange, check, normalise
from mmaccel.errors import AdapterError, NotApplicableError
from mmaccel.handle import Handle, present
from mmaccel.method import Method, Touch, registry
from mmaccel.targets import Target, resolve

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Explanation", "accelerate", "explain", "methods", "plan"]


class Choice(Protocol):
    """What knows which method suits a target, such as a `Calibration`."""

    def method_for(self, pipe: Any, /) -> Method:
        """The method."""
        ...


def accelerate(target: Any, *methods: Method | str | Choice | Iterable[Method | str]) -> Handle:
    """Put methods on a model or pipeline, in place, until the handle is removed.

    Args:
        target: a vision-language or text model of transformers or a pipeline of it, or a pipeline or transformer of
            diffusers. It keeps its class and the signatures of `generate` and `__call__`.
        methods: instances (`HoliTom(keep=0.15)`), spec strings (`"holitom:keep=0.15"`), stacks (`"fewer-frames:
            keep=0.5+fastv"`), lists of these, or the result of `calibrate` (with a warning where it was made for
            something else). Their order is that of the pipeline, however they are given.

    Returns:
        a `Handle`, which is also a context manager: `with accelerate(model, ...) as h: model.generate(...)`.

    Raises:
        MethodError: an unknown method or knob, or a value out of range.
        AdapterError: nothing is known of the target.
        NotApplicableError: a method does not fit the target; the message names those that do.
        ConflictError: two methods exclude each other.
    In each case the target is as it was.
    """
    found = resolve(target)
    wanted = arrange(normalise(_chosen(entry, target) for entry in methods))
    for method in wanted:
        plan(method, found)
    check(wanted, present(found))
    return Handle(found, wanted)


def _chosen(entry: Any, target: Any) -> Any:
    return entry.method_for(target) if callable(getattr(entry, "method_for", None)) else entry


def plan(method: Method, target: Target) -> list[Touch]:
    """What a method would touch on a target.

    Raises:
        NotApplicableError: it does not fit; the message names the methods that do.
    """
    info = method.info
    if target.kind not in info.targets:
        fitting = [name for name, cls in registry().items() if target.kind in cls.info.targets]
        raise NotApplicableError(
            f"{info.name} works on {' or '.join(info.targets)}, and {type(target.given).__name__} is a {target.kind}; "
            f"methods that fit: {', '.join(fitting) or 'none'}."
        )
    touches = method.plan(target)
    if not touches:
        raise NotApplicableError(f"{info.name} finds nothing to hook in {type(target.given).__name__}.")
    return touches


@dataclass(frozen=True)
class Explanation:
    """Which methods fit a target: for each the modules it would touch, or why it does not fit."""

    target: str
    kind: str
    family: str
    touches: dict[str, list[Touch]]
    reasons: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "target": self.target,
            "kind": self.kind,
            "family": self.family,
            "fits": {name: [{"where": t.where, "why": t.why} for t in ts] for name, ts in self.touches.items()},
            "does_not_fit": dict(self.reasons),
        }

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title=f"{self.target}: {self.kind} ({self.family})", show_lines=True)
        table.add_column("method")
        table.add_column("would touch")
        for name, touches in self.touches.items():
            table.add_row(name, "\n".join(f"{t.where}: {t.why}" for t in touches))
        for name, reason in self.reasons.items():
            table.add_row(f"[dim]{name}[/dim]", f"[dim]does not fit: {reason}[/dim]")
        return table

    def __str__(self) -> str:
        from io import StringIO

        from rich.console import Console

        console = Console(file=StringIO(), width=120, record=True)
        console.print(self.__rich__())
        return console.export_text()


def explain(target: Any) -> Explanation:
    """Say which methods fit `target` and what each would touch. Touches nothing.

    Raises:
        AdapterError: nothing is known of the target.
    """
    found = resolve(target)
    touches: dict[str, list[Touch]] = {}
    reasons: dict[str, str] = {}
    for name, cls in registry().items():
        try:
            if found.kind not in cls.info.targets:
                reasons[name] = f"works on {' or '.join(cls.info.targets)}"
                continue
            needed = [entry.name for entry in fields(cls) if MISSING == entry.default == entry.default_factory]
            if needed:
                reasons[name] = f"cannot be tried without values for {', '.join(needed)}"
                continue
            touches[name] = plan(cls(), found)
        except (NotApplicableError, AdapterError) as error:
            reasons[name] = str(error)
    return Explanation(type(target).__name__, found.kind, found.family, touches, reasons)


def methods() -> dict[str, type[Method]]:
    """All methods by spec name, those of other packages included."""
    return dict(registry())
