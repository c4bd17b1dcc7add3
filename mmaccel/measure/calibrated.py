"""Which setting of which method comes nearest to the dense result of one checkpoint at a share of its work."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from mmaccel.errors import MMAccelError
from mmaccel.method import Method, find
from mmaccel.report import plain_text

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Calibration", "Candidate", "Subject", "label"]

_FORMAT = 1
_WEIGHTS = 16


@dataclass(frozen=True)
class Candidate:
    """One setting that was tried, over all prompts.

    work: FLOPs of the transformers as a fraction of the dense ones. distance: root mean square difference of the final
    latents to the dense ones, relative to theirs; 0 is equal. time: seconds of the transformers as a fraction of the
    dense ones, and psnr: of the pixels to the dense ones in dB, both of the best setting of each method and None for
    others. problem: why it could not be run; work and distance are then None.
    """

    method: Method
    work: float | None = None
    distance: float | None = None
    time: float | None = None
    psnr: float | None = None
    problem: str = ""

    def fits(self, runtime: float) -> bool:
        """Whether it was run and did no more than that share of the work."""
        return self.work is not None and self.work <= runtime + 1e-9


@dataclass(frozen=True)
class Subject:
    """What was calibrated: classes, steps, a few of its weights, versions, and how it was called."""

    pipeline: str
    transformer: str
    scheduler: str
    steps: int
    weights: tuple[float, ...]
    versions: dict[str, str]
    device: str
    dtype: str
    prompts: int
    seed: int
    arguments: dict[str, Any]


@dataclass(frozen=True, repr=False)
class Calibration:
    """The result of `calibrate`. Give it, or its `method`, to `accelerate`.

    method: the setting that came nearest to the dense result of those that do at most `runtime` of its work.
    candidates: all that was tried, the nearest first. unreached: names of methods without a setting that does, and the
    smallest share of the work that they came to, or why they could not be tried.
    """

    method: Method
    runtime: float
    candidates: tuple[Candidate, ...]
    unreached: dict[str, str]
    subject: Subject

    @property
    def best(self) -> Candidate:
        """The candidate of `method`."""
        return next(candidate for candidate in self.candidates if candidate.method == self.method)

    def save(self, path: str | Path) -> Path:
        """Write it as JSON.

        Raises:
            MMAccelError: the file cannot be written.
        """
        try:
            Path(path).write_text(json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except (OSError, TypeError, ValueError) as error:
            raise MMAccelError(f"{path} cannot be written ({error}).") from error
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            MMAccelError: the file cannot be read, or is no calibration that this version can read.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise MMAccelError(f"{path} cannot be read ({error}).") from error
        if not isinstance(found, dict) or found.get("format") != _FORMAT or found.get("kind") != "calibration":
            raise MMAccelError(f"{path} is no calibration of this version of mmaccel; run mmaccel calibrate again.")
        try:
            subject = {**found["subject"], "weights": tuple(found["subject"]["weights"])}
            candidates = tuple(
                Candidate(
                    _method(one["method"]),
                    one["work"],
                    one["distance"],
                    one["time"],
                    _number(one["psnr"]),
                    one["problem"],
                )
                for one in found["candidates"]
            )
            return cls(_method(found["method"]), found["runtime"], candidates, found["unreached"], Subject(**subject))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MMAccelError(f"{path} is a damaged calibration ({error}); run mmaccel calibrate again.") from error

    def method_for(self, pipe: Any, *, steps: int | None = None) -> Method:
        """The method, with a warning where `pipe`, or its number of steps, is not what was calibrated."""
        differences = self.differences(pipe, steps=steps)
        if differences:
            warnings.warn(
                f"{label(self.method)} was calibrated for something else: {'; '.join(differences)}. Its work and "
                "quality may be off; run mmaccel.calibrate on this one.",
                stacklevel=2,
            )
        return self.method

    def differences(self, pipe: Any, *, steps: int | None = None) -> list[str]:
        """In what `pipe`, and its number of steps if given, is not what was calibrated; empty where it is the same."""
        made, here = self.subject, describe(pipe)
        found = [
            f"{name} {here[name]}, not {getattr(made, name)}"
            for name in ("pipeline", "transformer", "scheduler")
            if here[name] != getattr(made, name)
        ]
        if steps is not None and steps != made.steps:
            found.append(f"{steps} steps, not {made.steps}")
        weights = here["weights"]
        if not found and made.weights and weights and not _alike(weights, made.weights):
            found.append("other weights")
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        candidates = [
            {
                "method": _plain(one.method), "label": label(one.method), "work": one.work, "distance": one.distance,
                "time": one.time, "psnr": "inf" if one.psnr == math.inf else one.psnr, "problem": one.problem,
                "fits": one.fits(self.runtime),
            }
            for one in self.candidates
        ]  # fmt: skip
        return {
            "kind": "calibration", "format": _FORMAT, "runtime": self.runtime, "method": _plain(self.method),
            "candidates": candidates, "unreached": dict(self.unreached), "subject": asdict(self.subject),
        }  # fmt: skip

    def table(self, *, everything: bool = False) -> Table:
        """The best setting of each method, or all that was tried, as a rich table."""
        from rich.table import Table
        from rich.text import Text

        subject = self.subject
        prompts = f"{subject.prompts} prompt" + ("s" if subject.prompts > 1 else "")
        title = f"{subject.pipeline}, {subject.steps} steps, {prompts}: at most {self.runtime:g} of the work"
        table = Table(title=Text(title), caption=Text("\n".join(self._remarks())), caption_justify="left")
        for heading in ("setting", "work", "time", "distance to dense", "PSNR, dB"):
            table.add_column(heading, justify="left" if heading == "setting" else "right")
        seen: set[str] = set()
        for one in self.candidates:
            name = one.method.info.name
            if not everything and (name in seen or not one.fits(self.runtime)):
                continue
            seen.add(name)
            mark = " <- best" if one.method == self.method else "" if one.fits(self.runtime) else " (over)"
            shown = (
                _share(one.work),
                _share(one.time),
                "-" if one.distance is None else f"{one.distance:.4f}",
                _psnr(one),
            )
            table.add_row(Text(label(one.method) + mark, style="bold" if one.method == self.method else ""), *shown)
        return table

    def _remarks(self) -> list[str]:
        reasons: dict[str, list[str]] = {}
        for name, why in self.unreached.items():
            reasons.setdefault(why.rstrip("."), []).append(name)
        lines = [
            "work: FLOPs of the transformer, counted; time: its seconds on this machine, one call a prompt",
            *(f"without a setting: {', '.join(names)} ({why})" for why, names in reasons.items()),
        ]
        slow = [
            f"{label(one.method)} {one.time:.2f}"
            for one in self.candidates
            if one.time is not None and one.time > 1.15 * max(one.work or 0.0, self.runtime)
        ]
        if slow:
            lines.append(
                "more of the time than of the work (own overhead, what is no matrix product, or a busy machine): "
                + ", ".join(slow)
            )
        lines += [
            f"{label(one.method)} could not be run: {one.problem}"
            for one in self.candidates
            if one.problem and one.method.info.name not in self.unreached
        ]
        return lines

    def __repr__(self) -> str:
        best = self.best
        return (
            f"<Calibration of {self.subject.pipeline}: {label(best.method)} at {best.work:.3f} of the work, distance "
            f"{best.distance:.4f}; {len(self.candidates)} settings tried>"
        )

    def __rich__(self) -> Table:
        return self.table()

    def __str__(self) -> str:
        return plain_text(self.table())


def label(method: Method) -> str:
    """The spec string of a method, with measured tables of numbers left out."""
    long = {entry.name for entry in fields(method) if isinstance(getattr(method, entry.name), tuple)}
    name, colon, knobs = method.spec.partition(":")
    kept = [pair for pair in knobs.split(";") if pair.partition("=")[0] not in long] if colon else []
    kept += [f"{entry}=measured" for entry in sorted(long)]
    return name + (":" + ";".join(kept) if kept else "")


def describe(pipe: Any) -> dict[str, Any]:
    """Classes and a few weights of a pipeline, to tell one checkpoint from another; no weights if none is at hand."""
    from mmaccel.targets import resolve

    site = resolve(pipe).site
    transformers = list(getattr(site, "transformers", {}).values())
    parameters = [parameter for transformer in transformers for parameter in transformer.parameters()]
    count = min(_WEIGHTS, len(parameters))
    chosen = [parameters[(2 * place + 1) * len(parameters) // (2 * count)] for place in range(count)]
    readable = all(parameter.device.type != "meta" and parameter.numel() for parameter in chosen)
    return {
        "pipeline": type(pipe).__name__,
        "transformer": " + ".join(type(transformer).__name__ for transformer in transformers),
        "scheduler": type(getattr(site, "scheduler", None)).__name__,
        "weights": tuple(float(p.detach().flatten()[0]) for p in chosen) if readable else (),
    }


def _alike(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    # a dtype of fewer digits is the same checkpoint
    return len(one) == len(other) and all(
        math.isclose(a, b, rel_tol=0.02, abs_tol=1e-4) for a, b in zip(one, other, strict=True)
    )


def _plain(method: Method) -> dict[str, Any]:
    return {"name": method.info.name, "knobs": {entry.name: getattr(method, entry.name) for entry in fields(method)}}


def _method(found: dict[str, Any]) -> Method:
    knobs = {name: tuple(value) if isinstance(value, list) else value for name, value in found["knobs"].items()}
    return find(found["name"])(**knobs)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _psnr(one: Candidate) -> str:
    return "-" if one.psnr is None else "same" if one.psnr == math.inf else f"{one.psnr:.1f}"
