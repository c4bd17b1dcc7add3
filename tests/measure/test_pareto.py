from __future__ import annotations

import random
import subprocess
import sys

import pytest
from PIL import Image

from mmaccel.errors import MMAccelError
from mmaccel.measure import Point, pareto_plot
from mmaccel.measure.pareto import frontier

TEXT = {"x": "GFLOPs", "y": "accuracy", "title": "Accuracy against cost", "source": "embedded model"}


def test_frontier_is_what_nobody_beats():
    draw = random.Random(1)
    for _ in range(50):
        points = [Point("m", draw.randint(0, 6), draw.randint(0, 6)) for _ in range(draw.randint(1, 9))]
        front = frontier(points)
        places = {(p.x, p.y) for p in points}
        unbeaten = {
            (x, y) for x, y in places if not any((a <= x and b >= y) and (a, b) != (x, y) for a, b in places)
        }  # fmt: skip
        assert {(p.x, p.y) for p in front} == unbeaten
        assert [p.x for p in front] == sorted(p.x for p in front)


@pytest.mark.parametrize("log", [False, True])
def test_draws_a_picture_with_everything_in_it(tmp_path, log):
    points = [
        Point("dense", 4.0, 0.95),
        Point("holitom", 1.0, 0.90, 0.85, 0.93, ".15"),
        Point("holitom", 2.0, 0.94, label=".25"),
        Point("random", 1.0, 0.60, 0.5, 0.7, ".15", baseline=True),
    ]
    path = pareto_plot(points, tmp_path / "sub" / "plot.png", **TEXT, log=log, percent=True)
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.size[0] > 900
        seen = {colour for count, colour in image.convert("RGB").getcolors(1 << 20) if count > 20}
    # both methods' colours, and the star of the dense model
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0, 0, 0)} <= seen


def test_leaves_pyplot_alone():
    code = (
        "import sys, tempfile; from mmaccel.measure import Point, pareto_plot; "
        f"pareto_plot([Point('a', 1, 1)], tempfile.mkdtemp() + '/x.png', **{TEXT!r}); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("points", "options"),
    [
        ([], {}),
        ([Point("a", float("nan"), 1.0)], {}),
        ([Point("a", 1.0, 1.0, high=float("inf"))], {}),
        ([Point("a", 0.0, 1.0)], {"log": True}),
    ],
)
def test_wrong_points(tmp_path, points, options):
    with pytest.raises(MMAccelError):
        pareto_plot(points, tmp_path / "x.png", **TEXT, **options)
    assert not (tmp_path / "x.png").exists()
