"""Benchmarks as data: a TOML file says what is run; the runners live in the package and need no checkout.

name = "video_lm/speed"
title = "Time to first token at real sizes"
runner = "speed"

[options]
frames = [8, 32]
"""

from __future__ import annotations

import tomllib
import types
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from mmaccel.errors import MMAccelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Scenario", "load_scenario", "options_of", "run_scenario"]


@dataclass(frozen=True)
class Scenario:
    """One benchmark: its name, what it is about, its runner (such as "quality"), its options."""

    name: str
    title: str
    runner: str
    options: dict[str, Any]


def _runner(name: str) -> tuple[type, Callable[..., list[dict[str, Any]]]]:
    from mmaccel.measure import (
        run_codec_signals,
        run_codecs,
        run_generation_quality,
        run_generation_speed,
        run_kernels,
        run_quality,
        run_speed,
        run_streaming,
        run_towers,
    )

    known = {
        "quality": (run_quality.QualityOptions, run_quality.run),
        "speed": (run_speed.SpeedOptions, run_speed.run),
        "kernels": (run_kernels.KernelOptions, run_kernels.run),
        "codec-signals": (run_codec_signals.CodecSignalOptions, run_codec_signals.run),
        "towers": (run_towers.TowerOptions, run_towers.run),
        "streaming": (run_streaming.StreamingOptions, run_streaming.run),
        "generation-quality": (run_generation_quality.GenerationQualityOptions, run_generation_quality.run),
        "generation-speed": (run_generation_speed.GenerationSpeedOptions, run_generation_speed.run),
        "codecs": (run_codecs.CodecOptions, run_codecs.run),
    }
    if name not in known:
        raise MMAccelError(f"no benchmark runner is called {name!r}; known are {', '.join(known)}.")
    return known[name]


def load_scenario(path: str | Path) -> Scenario:
    """Read a scenario.

    Raises:
        MMAccelError: the file is missing or no TOML, names no known runner, or an option that the runner does not have.
    """
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise MMAccelError(f"the scenario {path} cannot be read ({error.strerror}).") from error
    except tomllib.TOMLDecodeError as error:
        raise MMAccelError(f"the scenario {path} is no TOML: {error}") from error
    missing = {"name", "title", "runner"} - data.keys()
    strange = data.keys() - {"name", "title", "runner", "options"}
    if missing or strange:
        raise MMAccelError(
            f"the scenario {path} must have name, title, runner and [options]; "
            f"missing: {', '.join(sorted(missing)) or 'none'}, unknown: {', '.join(sorted(strange)) or 'none'}."
        )
    scenario = Scenario(data["name"], data["title"], data["runner"], data.get("options", {}))
    _options(scenario, {})
    return scenario


def options_of(scenario: Scenario) -> dict[str, Any]:
    """All options of a scenario, those that it leaves at their default included."""
    return asdict(_options(scenario, {}))


def run_scenario(
    scenario: Scenario,
    out: str | Path,
    overrides: Mapping[str, Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Run a scenario, append its rows to the JSON-lines file `out`, and return the rows that `out` holds of it then.

    `overrides` replaces options; a string for an option that is no string is read as TOML ("[8, 32]", "true").
    `progress(what, done, total)` is called now and then. What `out`, or the work file beside it, already holds for the
    same options is not run again.

    Raises:
        MMAccelError: an unknown option or a value of the wrong type.
    """
    options = _options(scenario, overrides or {})
    _, run = _runner(scenario.runner)
    return run(scenario.name, options, Path(out), progress or (lambda _what, _done, _total: None))


def _options(scenario: Scenario, overrides: Mapping[str, Any]) -> Any:
    cls, _ = _runner(scenario.runner)
    hints = get_type_hints(cls)
    given = {**scenario.options, **overrides}
    unknown = given.keys() - hints.keys()
    if unknown:
        raise MMAccelError(
            f"{scenario.name} has no option {', '.join(sorted(unknown))}; its options are {', '.join(hints)}."
        )
    missing = [entry.name for entry in fields(cls) if entry.default is MISSING and entry.name not in given]
    if missing:
        raise MMAccelError(f"{scenario.name} needs the options {', '.join(missing)}.")
    return cls(**{name: _value(scenario.name, name, hints[name], value) for name, value in given.items()})


def _value(scenario: str, name: str, hint: Any, value: Any) -> Any:
    if isinstance(value, str) and hint is not str:
        try:
            value = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError as error:
            raise MMAccelError(f"{scenario}: {name}={value!r} cannot be read as TOML: {error}") from error
    if get_origin(hint) is tuple:
        value = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        inner = get_args(hint)[0]
        return tuple(_value(scenario, name, inner, entry) for entry in value)
    allowed = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in allowed and type(value) is int:
        value = float(value)
    if type(value) not in allowed:
        raise MMAccelError(f"{scenario}: {name}={value!r} must be {' or '.join(t.__name__ for t in allowed)}.")
    return value
