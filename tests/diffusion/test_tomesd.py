"""ToMeSD: against loops over tokens on every family, identity, exact cases, counts, other methods beside it."""

from __future__ import annotations

import inspect

import pytest
import torch

import mmaccel
from mmaccel.adapters.diffusion import Diffusion
from mmaccel.errors import ConflictError, NotApplicableError
from tests.core.test_token_rows import FAMILIES as TRANSFORMERS
from tests.core.test_token_rows import ltx2
from tests.diffusion.families import FAMILIES, LARGE, NUCLEUS
from tests.diffusion.test_caches_on_families import traces

# those left out differ in their pipeline only
every = pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("ltx_image", "wan_embedded")])
TEXT = 5
# frames, height, width of the tokens in TRANSFORMERS
GRIDS = {
    "wan": (3, 2, 3), "wan_token_times": (3, 2, 3), "ltx": (2, 2, 3), "ltx2": (2, 2, 3), "ltx2_token_times": (2, 2, 3),
    "hunyuan": (3, 2, 3), "cogvideox": (3, 2, 3), "flux": (1, 3, 4), "sd3": (1, 4, 4), "pixart": (1, 4, 4),
    "dit": (1, 4, 4),
}  # fmt: skip


def loops(states, grid, ratio, frame_only):
    """Of one item [N, C]: for each token the token that it goes into, itself if it stays."""
    _, height, width = grid
    places = [(n // (height * width), n // width % height, n % width) for n in range(len(states))]
    stays = [y % 2 == 0 and x % 2 == 0 for _, y, x in places]
    target = list(range(len(states)))
    groups = range(grid[0]) if frame_only else [None]
    for group in groups:
        inside = [n for n, place in enumerate(places) if group in (None, place[0])]
        best = []
        for n in (n for n in inside if not stays[n]):
            likeness = [
                (float(torch.nn.functional.cosine_similarity(states[n], states[m], dim=0)), -m)
                for m in inside
                if stays[m]
            ]
            best.append((max(likeness), n))
        best.sort(key=lambda pair: (-pair[0][0], pair[1]))
        for (_, m), n in best[: int(ratio * len(inside))]:
            target[n] = -m
    return target


def rows_of(value, item, kept, count, text_first):
    """What an argument of the module is for one item and the tokens that are left."""
    if isinstance(value, (tuple, list)):
        return tuple(rows_of(part, item, kept, count, text_first) for part in value)
    if not isinstance(value, torch.Tensor):
        return value
    batched = value.shape[0] in (1, 2) and value.shape[0] != count
    value = value[min(item, value.shape[0] - 1)][None] if batched else value
    for axis in range(int(batched), value.ndim):
        if value.shape[axis] == count:
            return value.index_select(axis, torch.tensor(kept))
        if value.shape[axis] == count + TEXT:
            text = list(range(TEXT)) if text_first else list(range(count, count + TEXT))
            own = [n + TEXT for n in kept] if text_first else kept
            return value.index_select(axis, torch.tensor(text + own if text_first else own + text))
    return value


def naive(model, name, ratio, *, frame_only=False, feed_forward=False):
    """Replace the modules of a model by loops over items and tokens; `seed=None` destinations."""
    site = Diffusion(model)
    layout, grid = site.layout, GRIDS[name]
    count = grid[0] * grid[1] * grid[2]
    first = layout.text == "first"
    targets = []

    def wrap(module):
        original, signature = module.forward, inspect.signature(module.forward)

        def forward(*args, **kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            prompt = x.shape[1] - count
            begin = prompt if first else 0
            outputs = []
            for item, target in enumerate(targets):
                kept = [n for n in range(count) if target[n] == n]
                means = [
                    torch.stack([x[item, begin + n] for n in range(count) if target[n] == k]).mean(0) for k in kept
                ]
                text = x[item, :begin] if first else x[item, count:]
                merged = torch.cat([text, torch.stack(means)] if first else [torch.stack(means), text])
                given = signature.bind(*args, **kwargs)
                given.apply_defaults()
                every = {}
                for key, value in given.arguments.items():
                    kind = signature.parameters[key].kind
                    every.update(
                        value if kind is kind.VAR_KEYWORD else {} if kind is kind.VAR_POSITIONAL else {key: value}
                    )
                rest = {
                    key: value[item][None] if key == "encoder_hidden_states" and value is not None
                    else rows_of(value, item, kept, count, first)
                    for key, value in every.items()
                }  # fmt: skip
                rest[next(iter(rest))] = merged[None]
                output = original(**rest)
                parts = list(output) if isinstance(output, tuple) else [output]
                y = parts[0][0]
                places = [kept.index(target[n]) for n in range(count)]
                own = torch.stack([y[begin + place] for place in places])
                parts[0] = torch.cat([y[:begin], own] if first else [own, y[len(kept) :]])[None]
                outputs.append((parts, isinstance(output, tuple)))
            columns = zip(*(parts for parts, _ in outputs), strict=True)
            whole = [None if column[0] is None else torch.cat(column) for column in columns]
            return tuple(whole) if outputs[0][1] else whole[0]

        module.forward = forward

    for block in site.blocks(model).values():
        signature = inspect.signature(type(block).forward)

        def match(block, args, kwargs, signature=signature):
            states = signature.bind(block, *args, **kwargs).arguments["hidden_states"]
            targets[:] = [loops(item, grid, ratio, frame_only) for item in states]

        block.register_forward_pre_hook(match, with_kwargs=True)
        for attribute in layout.attention + (layout.feed_forward if feed_forward else ()):
            if getattr(block, attribute, None) is not None:
                wrap(getattr(block, attribute))


def built(name):
    torch.manual_seed(0)
    model, given = TRANSFORMERS[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model.eval(), given


@pytest.mark.parametrize("knobs", [{}, {"within": "frame", "feed_forward": True}], ids=["plain", "frame"])
@pytest.mark.parametrize("name", GRIDS)
@torch.no_grad()
def test_loops_over_tokens_give_the_same(name, knobs):
    model, given = built(name)
    twin, _ = built(name)
    dense = twin(**given, return_dict=False)
    naive(twin, name, 0.5, frame_only=bool(knobs), feed_forward=bool(knobs))
    with mmaccel.accelerate(model, mmaccel.ToMeSD(ratio=0.5, seed=None, **knobs)):
        ours = model(**given, return_dict=False)
    for mine, theirs in zip(ours, twin(**given, return_dict=False), strict=True):
        assert torch.allclose(mine, theirs, atol=2e-4)
    assert not torch.allclose(ours[0], dense[0], atol=1e-2)
    assert torch.equal(model(**given, return_dict=False)[0], dense[0])


@every
def test_ratio_zero_and_less_than_a_token_are_the_identity(name):
    family = FAMILIES[name]
    pipe, dense = family.build(), family.call(family.build(), steps=2)
    for ratio in (0.0, 0.03):
        with mmaccel.accelerate(pipe, mmaccel.ToMeSD(ratio=ratio)):
            assert torch.equal(family.call(pipe, steps=2), dense)


@every
def test_distance_grows_with_the_ratio_and_calls_are_independent(name):
    family = FAMILIES[name]
    pipe, twin = family.build(), family.build()
    dense, far = family.call(twin, steps=2), []
    for ratio in (0.1, 0.6):
        with mmaccel.accelerate(pipe, mmaccel.ToMeSD(ratio=ratio, proportional=True)) as handle:
            first = family.call(pipe, steps=2)
            family.call(pipe, steps=2, size=LARGE, guided=False)
            both = family.call(pipe, steps=2, items=(0, 1))
            assert torch.equal(family.call(pipe, steps=2), first)
            assert torch.allclose(both[:1], first, atol=1e-4)
        far.append(float((first - dense).norm() / dense.norm()))
        assert handle.report().as_dict()["tokens"][0]["kept"] == pytest.approx(1 - ratio, abs=0.07)
    assert 0 < far[0] < far[1]
    assert traces(pipe) == traces(twin)
    assert torch.equal(family.call(pipe, steps=2), dense)


@pytest.mark.parametrize(
    ("name", "knobs"),
    [("dit", {"ratio": 0.75}), ("pixart", {"ratio": 0.75})]
    + [(name, {"ratio": 0.6, "proportional": True}) for name in ("dit", "pixart", "sd3")],
)
@torch.no_grad()
def test_tokens_that_are_equal_merge_without_loss(name, knobs):
    """In weighted attention any of them, in plain attention whole cells; positions are taken away for it."""
    model, given = built(name)
    embedding = model.pos_embed
    embedding.pos_embed.zero_()
    # tokens are 2 x 2 latents and cells 2 x 2 tokens
    given["hidden_states"] = given["hidden_states"][..., ::4, ::4].repeat_interleave(4, -1).repeat_interleave(4, -2)
    dense = model(**given)[0]
    for feed_forward in (False, True):
        with mmaccel.accelerate(model, mmaccel.ToMeSD(feed_forward=feed_forward, **knobs)) as handle:
            assert torch.allclose(model(**given)[0], dense, atol=2e-5)
        assert handle.report().as_dict()["tokens"][0]["kept"] < 0.5
    with mmaccel.accelerate(model, mmaccel.ToMeSD(ratio=0.6)):
        assert not torch.allclose(model(**given)[0], dense, atol=1e-4)


@pytest.mark.parametrize(("every", "first", "matches"), [(1, 0, 3), (2, 0, 2), (3, 0, 1), (1, 2, 1)])
def test_a_match_serves_several_blocks(every, first, matches):
    model, given = built("wan")
    with mmaccel.accelerate(model, mmaccel.ToMeSD(every=every, first=first)) as handle, torch.no_grad():
        model(**given)
    report = handle.report()
    counted = sum(number for (op, _, _), number in report.kernels.items() if op == "pairwise_match")
    assert counted == matches
    assert report.tokens["tomesd", "self-attention"].calls == 3 - first
    # 18 tokens of width 24, of which 9 stay; cells of 2 x 2 on 2 x 3 leave 6 of 18 as destinations
    spent, dense = report.flops["self-attention"]
    assert dense == (3 - first) * 2 * (8 * 18 * 24**2 + 4 * 18**2 * 24)
    assert spent == (3 - first) * 2 * (8 * 9 * 24**2 + 4 * 9**2 * 24) + matches * 2 * 2 * 12 * 6 * 24


CACHES = [
    mmaccel.FirstBlockCache(threshold=10.0),
    mmaccel.TaylorSeer(interval=3, warmup=2),
    mmaccel.PAB(start=0, stop=1000),
]


@pytest.mark.parametrize("other", CACHES, ids=lambda method: method.info.name)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_with_a_cache_on_the_steps_and_undo_in_any_order(name, first, other):
    """A cache that holds outputs of modules must hold whole ones, and so come second."""
    family = FAMILIES[name]
    pipe, twin = family.build(), family.build()
    dense = family.call(twin, steps=5)
    with mmaccel.accelerate(twin, "tomesd"):
        merged = family.call(twin, steps=5)
    with mmaccel.accelerate(twin, other):
        cached = family.call(twin, steps=5)
        if other.info.name != "first-block-cache":
            with pytest.raises(ConflictError, match="put tomesd on first"):
                mmaccel.accelerate(twin, "tomesd")
            assert torch.equal(family.call(twin, steps=5), cached)
    one = mmaccel.accelerate(pipe, "tomesd")
    two = mmaccel.accelerate(pipe, other)
    both = family.call(pipe, steps=5)
    assert torch.isfinite(both).all()
    assert not torch.equal(both, merged)
    assert not torch.equal(both, cached)
    assert torch.equal(family.call(pipe, steps=5), both)
    (one if first else two).remove()
    assert torch.equal(family.call(pipe, steps=5), cached if first else merged)
    (two if first else one).remove()
    assert torch.equal(family.call(pipe, steps=5), dense)
    assert traces(pipe) == traces(twin)


@torch.no_grad()
def test_calls_with_masked_self_attention_run_whole():
    torch.manual_seed(0)
    model, given = ltx2()
    model.eval()
    mask = torch.ones(2, 12, 12).tril()
    dense = model(**given, video_self_attention_mask=mask, return_dict=False)
    with mmaccel.accelerate(model, "tomesd") as handle:
        found = model(**given, video_self_attention_mask=mask, return_dict=False)
    assert torch.equal(found[0], dense[0])
    assert ("tomesd", "self-attention") not in handle.report().tokens
    assert any("self_attention_mask" in line for line in handle.report().lines())


def test_offload_and_misuse():
    family = FAMILIES["wan_two_experts"]
    pipe = family.build()
    with mmaccel.accelerate(pipe, "tomesd"):
        expected = family.call(pipe)
        pipe.enable_model_cpu_offload(device="cpu")
        assert torch.equal(family.call(pipe), expected)
        with pytest.raises(ConflictError, match="tomesd"):
            mmaccel.accelerate(pipe, "hsa:runtime=0.5")
    with pytest.raises(NotApplicableError, match="has 3 blocks"):
        mmaccel.accelerate(pipe, "tomesd:first=3")
    with pytest.raises(NotApplicableError, match="no token layout"):
        mmaccel.accelerate(NUCLEUS.build(), "tomesd")


def test_a_cell_keeps_one_token_whatever_the_ratio():
    family = FAMILIES["dit"]
    pipe = family.build()
    with mmaccel.accelerate(pipe, mmaccel.ToMeSD(ratio=0.75)):
        most = family.call(pipe, steps=2)
    with mmaccel.accelerate(pipe, mmaccel.ToMeSD(ratio=1.0)) as handle:
        assert torch.equal(family.call(pipe, steps=2), most)
    assert any("cut to 0.75" in line for line in handle.report().lines())
    assert handle.report().as_dict()["tokens"][0]["kept"] == 0.25
