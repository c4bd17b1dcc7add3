"""mmaccel list says what the classes enforce."""

from __future__ import annotations

import dataclasses
import re

import pytest

from mmaccel.cli.catalogue import describe
from mmaccel.errors import MethodError
from mmaccel.method import registry


def test_lists_every_method_with_its_defaults(document):
    listed = {entry["name"]: entry for entry in document("list")["methods"]}
    assert set(listed) == set(registry())
    for name, cls in registry().items():
        instance = cls()
        assert {knob["name"]: knob["default"] for knob in listed[name]["knobs"]} == dataclasses.asdict(instance)
        assert listed[name]["lossless"] is cls.info.lossless
        assert listed[name]["source"]


def test_the_table_names_every_method(cli):
    code, out, _ = cli("list")
    assert code == 0
    for name in registry():
        assert name in out
    assert "(0, 1]" in out


NUMBER = r"-?[\d.]+"
CASES = [(cls, knob) for cls in registry().values() for knob in describe(cls)["knobs"] if knob["range"]]


@pytest.mark.parametrize(("cls", "knob"), CASES, ids=[f"{cls.info.name}-{knob['name']}" for cls, knob in CASES])
def test_printed_ranges_are_the_enforced_ones(cls, knob):
    def accepted(value):
        try:
            cls(**{knob["name"]: value})
        except MethodError:
            return False
        return True

    text, whole = knob["range"], "float" not in knob["type"]
    bounds = [int(n) if whole else float(n) for n in re.findall(NUMBER, text)]
    step = 1 if whole else 1e-6
    if " | " in text:
        assert all(accepted(choice) for choice in text.split(" | "))
        assert not accepted("something else")
    elif knob["name"] == "keep":
        assert [accepted(v) for v in (0.0, 1e-6, 1.0, 1.5, 0, 1, 7)] == [False, True, True, False, False, True, True]
    elif text.startswith("["):
        low, high = bounds
        assert [accepted(v) for v in (low - step, low, high, high + step)] == [False, True, True, False]
    elif text.startswith("("):
        low, high = bounds
        assert [accepted(v) for v in (low, low + step, high, high + step)] == [False, True, True, False]
    elif text.startswith(">="):
        assert [accepted(v) for v in (bounds[0] - step, bounds[0])] == [False, True]
    elif text.startswith(">"):
        assert [accepted(v) for v in (bounds[0], bounds[0] + step)] == [False, True]
    else:
        raise AssertionError(f"no test for the range {text!r}")
