"""Tiny random models of seven families for tests, and real configs with random weights for measuring speed.

`FAMILIES[name].build()` gives a model, `.inputs(kind)` what to call it with, `.places(kind)` which token is what;
`build_real(name)` and `real_inputs(name, frames)` do the same at real size. All of it works offline.
"""

from __future__ import annotations

from mmaccel.tiny.families.family import KINDS, Family, Item, Place
from mmaccel.tiny.families.internvl import INTERNVL
from mmaccel.tiny.families.llava import LLAVA, LLAVA_NEXT_VIDEO, LLAVA_ONEVISION
from mmaccel.tiny.families.qwen import QWEN2_5_VL, QWEN2_VL, QWEN3_VL
from mmaccel.tiny.families.real import REAL, Real, build_real, real_inputs

__all__ = ["FAMILIES", "KINDS", "REAL", "Family", "Item", "Place", "Real", "build_real", "real_inputs"]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (LLAVA, LLAVA_NEXT_VIDEO, LLAVA_ONEVISION, QWEN2_VL, QWEN2_5_VL, QWEN3_VL, INTERNVL)
}
