"""diffusers' caches under our handle on whole pipelines of every family: they work, or say why not."""

from __future__ import annotations

import pytest
import torch
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.hooks.pyramid_attention_broadcast import (
    PyramidAttentionBroadcastConfig,
    apply_pyramid_attention_broadcast,
)

import mmaccel
from mmaccel.errors import NotApplicableError
from tests.diffusion.families import FAMILIES
from tests.diffusion.test_diffusers_caches import active

NAMES = ["first-block-cache", "taylorseer", "magcache", "pab", "seacache"]
WAN = ["wan_image", "wan_token_times", "wan_two_experts"]
REFUSED = {
    ("ltx2", "first-block-cache"): "LTX2VideoTransformerBlock",
    ("ltx2", "magcache"): "LTX2VideoTransformerBlock",
    ("sd3", "first-block-cache"): "returns none",
    ("wan_two_experts", "magcache"): "two transformers",
    **{(name, "seacache"): "cannot read the latents" for name in FAMILIES if name not in WAN[1:]},
}


def traces(pipe):
    found = []
    for name, module in pipe.transformer.named_modules():
        registry = vars(module).get("_diffusers_hook")
        hooks = None if registry is None else sorted(registry.hooks)
        found.append((name, sorted(vars(module)), hooks, len(module._forward_hooks), len(module._forward_pre_hooks)))
    return found, sorted(vars(pipe.scheduler))


@pytest.mark.parametrize("cache", NAMES)
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("ltx_image", "wan_embedded")])
def test_it_works_or_says_why_not(name, cache):
    family = FAMILIES[name]
    pipe, method = family.build(), active()[cache]
    if (name, cache) in REFUSED:
        before = traces(pipe)
        with pytest.raises(NotApplicableError, match=REFUSED[name, cache]):
            mmaccel.accelerate(pipe, method)
        assert traces(pipe) == before
        return
    dense = family.call(pipe, steps=5)
    twin = family.build()
    family.call(twin, steps=1 + (name == "pixart"))
    with mmaccel.accelerate(pipe, method) as handle:
        if (name, cache) == ("ltx2", "pab"):
            with pytest.raises(NotApplicableError, match="batches of 2 and 1"):
                family.call(pipe, steps=5)
        first = family.call(pipe, steps=5, guided=name != "ltx2")
        family.call(pipe, steps=2, items=(1,), size=1, guided=False)
        assert torch.equal(family.call(pipe, steps=5, guided=name != "ltx2"), first)
        both = family.call(pipe, steps=5, items=(0, 1), guided=name != "ltx2")
        report = handle.report()
    if (name, cache) == ("wan_token_times", "seacache"):
        assert any("nothing was reused in" in line for line in report.lines())  # this pipeline announces no steps
    else:
        assert report.events["steps reused"] > 0
        assert not any("nothing was reused" in line for line in report.lines())
        assert not torch.equal(first, dense)
    if cache != "magcache":
        assert torch.allclose(both[:1], first, atol=1e-3)
    assert traces(pipe) == traces(twin)
    assert torch.equal(family.call(pipe, steps=5), dense)


@pytest.mark.parametrize("name", ["sd3", "pixart", "dit"])
def test_models_without_an_interface_do_what_diffusers_own_functions_do(name):
    """Put on by hand, with a context by hand: these pipelines have none."""
    family = FAMILIES[name]
    dense = family.call(family.build())
    for method in (mmaccel.FirstBlockCache(threshold=0.3), mmaccel.PAB(every=3, start=0, stop=1000)):
        if name == "sd3" and isinstance(method, mmaccel.FirstBlockCache):
            continue
        pipe, twin = family.build(), family.build()
        time = []
        twin.transformer.register_forward_pre_hook(
            lambda _, _args, kwargs, time=time: time.append(float(kwargs["timestep"].max())), with_kwargs=True
        )
        if isinstance(method, mmaccel.PAB):
            config = PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=3, cross_attention_block_skip_range=1,
                spatial_attention_timestep_skip_range=(0, 1000), current_timestep_callback=lambda t=time: t[-1],
            )  # fmt: skip
            apply_pyramid_attention_broadcast(twin.transformer, config)
        else:
            apply_first_block_cache(twin.transformer, FirstBlockCacheConfig(threshold=0.3))
            _set_cache_context(twin.transformer, CacheContext("by hand"))
        with mmaccel.accelerate(pipe, method):
            ours = family.call(pipe)
        assert torch.equal(ours, family.call(twin))
        assert not torch.equal(ours, dense)
