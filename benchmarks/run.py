"""Run a benchmark scenario: `python benchmarks/run.py video_lm/speed --layers 4 --frames '[8, 32]'`.

Options are those of the scenario's file; values are read as TOML. Results are appended to results/NAME.jsonl.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from mmaccel.errors import MMAccelError
from mmaccel.measure import load_scenario, options_of, run_scenario

HERE = Path(__file__).parent


def scenarios() -> list[str]:
    """The names of all scenarios."""
    return sorted(path.relative_to(HERE).with_suffix("").as_posix() for path in HERE.glob("*/*.toml"))


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("scenario", choices=scenarios())
    known, rest = parser.parse_known_args(arguments)
    scenario = load_scenario(HERE / f"{known.scenario}.toml")
    options = argparse.ArgumentParser(prog=f"run.py {known.scenario}", description=scenario.title)
    options.add_argument("--out", type=Path, default=HERE / "results" / f"{known.scenario}.jsonl")
    for name, value in options_of(scenario).items():
        options.add_argument(f"--{name.replace('_', '-')}", dest=name, metavar="VALUE", help=f"now {value!r}")
    chosen = vars(options.parse_args(rest))
    out = chosen.pop("out")
    start = time.monotonic()

    def progress(what: str, done: int, total: int) -> None:
        print(f"{time.monotonic() - start:8.0f} s  {what}: {done} of {total}", file=sys.stderr, flush=True)

    try:
        rows = run_scenario(scenario, out, {k: v for k, v in chosen.items() if v is not None}, progress)
    except MMAccelError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{len(rows)} rows in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
