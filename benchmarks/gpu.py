"""All that is to be done on a machine with a GPU: `python benchmarks/gpu.py --out FOLDER [--quick]`.

First the kernel tests, compiled instead of interpreted; only if they pass, the speeds of the kernels and of the
published configurations with random weights. Rows go to FOLDER as JSON lines, as `mmaccel bench` writes them. `--quick`
takes one model and one length.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main(arguments: list[str] | None = None) -> int:
    """Run the tests, then the scenarios; the first failure ends it with its exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    chosen = parser.parse_args(arguments)
    chosen.out.mkdir(parents=True, exist_ok=True)
    bench = [sys.executable, "-c", "import sys; from mmaccel.cli import main; sys.exit(main(sys.argv[1:]))", "bench"]
    kernels = [*bench, "kernels/speed", "--out", str(chosen.out / "kernels.jsonl"), "--set", "device=cuda"]
    models = [*bench, "video_lm/speed_published", "--out", str(chosen.out / "speed.jsonl"), "--set", "device=cuda"]
    if chosen.quick:
        models += ["--set", 'models=["llava-onevision-7b"]', "--set", "frames=[32]"]
    else:
        kernels += ["--set", 'sizes=["small", "full", "video"]']
    tests = [sys.executable, "-m", "pytest", "-n", "0", "tests/kernels"]
    for command in (tests, kernels, models):
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, "MMACCEL_REQUIRE_GPU": "1"}, check=False).returncode
        if code:
            print(f"{' '.join(command[-4:])} ended with {code}; nothing after it was run.")
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
