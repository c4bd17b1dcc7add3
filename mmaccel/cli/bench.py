"""mmaccel bench: run a scenario of the repository's benchmarks folder, or list them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmaccel.errors import MMAccelError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mmaccel.cli.terminal import Terminal

__all__ = ["run"]


def run(terminal: Terminal, name: str | None, out: Path | None, options: Sequence[str]) -> None:
    """Run the scenario `name` with `option=value` replacements; without a name list what there is.

    Raises:
        MMAccelError: no scenario of that name, an option that it does not have, or a file that cannot be written.
    """
    from mmaccel.measure import load_scenario, run_scenario
    from mmaccel.measure.scenario import options_of

    known = _scenarios()
    if name is None:
        titles = {key: load_scenario(path).title for key, path in known.items()}
        terminal.show("\n".join(f"{key}: {title}" for key, title in titles.items()))
        terminal.finish({"scenarios": titles})
        return
    if name not in known:
        raise MMAccelError(f"no scenario is called {name!r}; known are {', '.join(known)}.")
    scenario = load_scenario(known[name])
    overrides = dict(_pair(option) for option in options)
    _check_numbers(overrides, options_of(scenario))
    target = _writable(out or Path("out") / f"{name.replace('/', '-')}.jsonl")
    with terminal.progress() as progress:
        bars: dict[str, Any] = {}

        def note(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what)
            progress.update(bars[what], completed=done, total=total)

        rows = run_scenario(scenario, target, overrides, note)
    terminal.show(f"{len(rows)} rows: {target}")
    terminal.finish({"scenario": name, "out": target, "rows": rows})


def _scenarios() -> dict[str, Path]:
    """Scenario files by name, such as "video_lm/quality".

    Raises:
        MMAccelError: there is no benchmarks folder; installed packages come without it.
    """
    import mmaccel

    for folder in (Path(mmaccel.__file__).parents[1] / "benchmarks", Path("benchmarks")):
        found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.glob("*/*.toml"))}
        if found:
            return found
    raise MMAccelError("there is no benchmarks folder here; run this in a checkout of the repository.")


def _pair(option: str) -> tuple[str, str]:
    key, equals, text = option.partition("=")
    if not equals:
        raise MMAccelError(f"--set {option}: write option=value.")
    return key.strip(), text.strip()


def _check_numbers(overrides: Mapping[str, str], options: Mapping[str, Any]) -> None:
    for key, text in overrides.items():
        if type(options.get(key)) not in (int, float):
            continue
        try:
            float(text)
        except ValueError:
            raise MMAccelError(f"--set {key}={text}: write a number, such as {key}={options[key]}.") from None


def _writable(out: Path) -> Path:
    """Find out now, and not after hours of work, that the rows have no place; leave no trace of that."""
    new = not out.exists()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a"):
            pass
        if new:
            out.unlink()
    except OSError as error:
        raise MMAccelError(f"{out} cannot be written ({error.strerror}); choose another file with --out.") from error
    return out
