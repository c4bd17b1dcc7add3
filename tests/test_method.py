"""Methods as values: knobs and their ranges, spec strings, the registry, methods of other packages."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from typing import ClassVar, Literal

import pytest

import mmaccel
from mmaccel.errors import MethodError
from mmaccel.method import Info, Method, Stage, find, knob, parse, registry

EXPECTED = {
    "holitom", "visionzip", "fastv", "evs", "random", "uniform", "fewer-frames", "fewer-pixels",
    "idpruner", "divprune", "vidcom2", "prumerge",
    "hsa", "diffsparse", "sparse-plan", "taylorseer", "magcache", "pab", "seacache", "fewer-steps",
    "fastercache", "text-kv-cache", "tomesd",
    "first-block-cache", "prompt-lookup", "dycoke", "fastvid", "prunevid", "earlytom",
}  # fmt: skip


def test_the_registry_holds_every_method_by_its_spec_name():
    assert set(registry()) >= EXPECTED
    for name, cls in registry().items():
        assert cls.info.name == name
        assert cls.info.verb in ("drop", "merge", "reuse", "guess")
        assert cls.info.summary
        assert cls.info.source
        assert cls.__doc__
        assert not cls.info.summary.endswith(".")
        for entry in fields(cls):
            assert entry.metadata.get("doc"), f"{name}.{entry.name} has no meaning"


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_presets_can_be_made(name):
    cls = find(name)
    for preset in cls.presets.values():
        values = {key: value for key, value in preset.items() if key != "source"}
        assert cls(**values).spec
        assert preset["source"]


@dataclass(frozen=True)
class Sample(Method):
    """A method with one knob of each kind."""

    keep: float | int = knob(0.5, "how much")
    share: float = knob(0.2, "a share", low=0.0, high=1.0)
    layer: int | None = knob(None, "a layer", low=1)
    above: float = knob(1.0, "a factor", above=0.0)
    word: Literal["a", "b"] = knob("a", "a choice", choices=("a", "b"))
    flag: bool = knob(False, "a switch")

    info: ClassVar[Info] = Info("sample", "drop", Stage.LLM, "samples", "a test", 2026, ("video-lm",))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"keep": 0}, "keep=0 keeps nothing"),
        ({"keep": -3}, "keeps nothing"),
        ({"keep": 0.0}, r"outside \(0, 1\]"),
        ({"keep": 1.5}, r"outside \(0, 1\]"),
        ({"keep": float("nan")}, r"outside \(0, 1\]"),
        ({"keep": "all"}, "keep must be float or int, not 'all'"),
        ({"keep": True}, "keep must be float or int"),
        ({"keep": None}, "keep must be float or int"),
        ({"share": 1.01}, "share=1.01 is outside 0.0 .. 1.0"),
        ({"share": -0.1}, "outside"),
        ({"share": float("nan")}, "outside"),
        ({"share": "x"}, "share must be float"),
        ({"layer": 0}, "layer=0 is outside >= 1"),
        ({"layer": 2.5}, "layer must be NoneType or int"),
        ({"above": 0.0}, "must be greater than 0.0"),
        ({"word": "c"}, "none of 'a', 'b'"),
        ({"word": 1}, "word must be str"),
        ({"flag": 1}, "flag must be bool"),
    ],
)
def test_knobs_outside_their_range(knobs, message):
    with pytest.raises(MethodError, match=message):
        Sample(**knobs)
    with pytest.raises(MethodError, match=message):
        replace(Sample(), **knobs)


def test_knobs_inside_their_range():
    for knobs in ({"keep": 1}, {"keep": 1.0}, {"share": 0}, {"share": 1}, {"layer": None}, {"layer": 7}, {"word": "b"}):
        assert getattr(Sample(**knobs), next(iter(knobs))) == next(iter(knobs.values()))
    with pytest.raises(FrozenInstanceError):
        Sample().keep = 0.1
    assert Sample(keep=1.0).neutral
    assert not Sample(keep=1).neutral  # one token
    assert not Sample(keep=0.99).neutral


@pytest.mark.parametrize(
    "method",
    ["random", "holitom:keep=0.15;tau=0.65", "fastv:keep=12;layer=3", "random:keep=0.3;positions=original;seed=4",
     "holitom:inner_layer=None;temporal_only=True"],
)  # fmt: skip
def test_a_spec_makes_the_method_again(method):
    (made,) = parse(method)
    (again,) = parse(made.spec)
    assert again == made
    assert parse(f" {method} + uniform ")[0] == made


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "names no method"),
        ("random+", "names no method"),
        (":keep=1", "names no method"),
        ("holitm", "did you mean 'holitom'"),
        ("zzzz", "known are"),
        ("random:keep", "'keep' is not knob=value"),
        ("random:kep=0.1", "no knob 'kep'; its knobs are keep, positions, seed"),
        ("random:keep=0.1;keep=0.2", "'keep' is given twice"),
        ("random:keep=2.5", "outside"),
        ("random:keep=", "keep must be"),
        ("random:positions=sideways", "none of"),
    ],
)
def test_specs_that_mean_nothing(spec, message):
    with pytest.raises(MethodError, match=message):
        parse(spec)


PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar
from mmaccel.method import Info, Stage
from mmaccel.reducer import BEFORE_LLM, GridReducer
from mmaccel.tokens.place import Reduction
import torch

@dataclass(frozen=True)
class EveryOther(GridReducer):
    """Keep every other token."""
    info: ClassVar[Info] = Info("every-other", "drop", Stage.BEFORE_LLM, "halves", "a third party", 2026,
                                ("video-lm",), slots=(BEFORE_LLM,))
    def reduce(self, tokens):
        return Reduction(torch.arange(0, len(tokens), 2))

class Twice(GridReducer):
    info: ClassVar[Info] = Info("random", "drop", Stage.BEFORE_LLM, "a name that is taken", "x", 2026, ("video-lm",))

nothing = 3
'''


def with_plugin(folder, entry, code):
    """Run `code` where a package that offers `entry` as a method is installed."""
    (folder / "third_party.py").write_text(PLUGIN)
    info = folder / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[mmaccel.methods]\nextra = third_party:{entry}\n")
    head = f"import sys; sys.path.insert(0, {str(folder)!r}); import mmaccel\n"
    return subprocess.run([sys.executable, "-c", head + textwrap.dedent(code)], capture_output=True, text=True)


def test_a_method_of_another_package_is_one_of_ours(tmp_path):
    run = with_plugin(tmp_path, "EveryOther", """
        from mmaccel.tiny.families import FAMILIES
        family = FAMILIES["llava"]
        model, inputs = family.build(), family.inputs("image")
        with mmaccel.accelerate(model, "every-other") as handle:
            model(**inputs)
        print(handle.report().as_dict()["tokens"][0]["kept"], mmaccel.EveryOther().spec)
    """)  # fmt: skip
    assert run.stdout.split() == ["0.5", "every-other"], run.stderr


@pytest.mark.parametrize(
    ("entry", "message"), [("Twice", "two methods are called 'random'"), ("nothing", "is not a Method with an info")]
)
def test_a_bad_method_of_another_package_is_named(tmp_path, entry, message):
    run = with_plugin(tmp_path, entry, """
        try:
            mmaccel.methods()
        except mmaccel.MMAccelError as error:
            print(error)
    """)  # fmt: skip
    assert message in run.stdout, run.stderr


def test_a_class_in_place_of_an_instance_says_so(model):
    from mmaccel.tiny.families import FAMILIES

    with pytest.raises(MethodError, match=r"HoliTom is a class; give an instance, such as HoliTom\(...\)"):
        mmaccel.accelerate(model(FAMILIES["llava"]), mmaccel.HoliTom)


def test_a_package_that_cannot_be_imported_takes_nothing_away(tmp_path):
    run = with_plugin(tmp_path, "Missing", """
        import warnings
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            names = set(mmaccel.methods())
        print("holitom" in names, "extra" in names, caught[0].message)
    """)  # fmt: skip
    assert run.stdout.startswith("True False the method 'extra' of third-party"), run.stderr


def test_numbers_of_numpy_are_numbers():
    import numpy as np

    assert mmaccel.EVS(keep=np.float64(0.25)) == mmaccel.EVS(keep=0.25)
    few = mmaccel.EVS(keep=np.int64(3))
    assert (few.keep, type(few.keep), few.spec) == (3, int, "evs:keep=3")


def test_presets_make_instances():
    assert mmaccel.HoliTom.preset("llava-onevision keep 0.10") == mmaccel.HoliTom(keep=0.1, tau=0.65)
    assert mmaccel.FastV.preset("llava", keep=0.25) == mmaccel.FastV(keep=0.25, layer=2)
    with pytest.raises(MethodError, match="no preset 'nonsense'; it has 'llava'"):
        mmaccel.FastV.preset("nonsense")
    with pytest.raises(MethodError, match="it has none"):
        mmaccel.Uniform.preset("llava")
