"""The token cache where attention is joint, the prompt's tokens beside the latent's, against modules with masks."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import mmaccel
from mmaccel.adapters.diffusion import Diffusion
from mmaccel.core.cached_modules import cached_modules
from mmaccel.core.patching import Patcher
from mmaccel.core.token_cache import TokenCache
from mmaccel.core.token_choice import Signals, TokenChoice
from mmaccel.errors import NotApplicableError
from mmaccel.report import Report
from mmaccel.tokens.levels import LevelPlan
from tests.diffusion.families import FAMILIES, LARGE

JOINT = {name: FAMILIES[name] for name in ("flux", "sd3", "cogvideox", "hunyuan")}
BRANCHES = {"flux": 2, "sd3": 1, "cogvideox": 1, "hunyuan": 2}
STEPS = 7
every = pytest.mark.parametrize("name", JOINT)


def random_plan(pipe, seed=0):
    layers = len(Diffusion(pipe).blocks(pipe.transformer))
    units = torch.randint(0, 5, (STEPS, layers, 3), generator=torch.Generator().manual_seed(seed))
    units[0] = 4
    return LevelPlan(units, 4, float(units.float().mean() / 4))


def put(pipe, plan, signals=None, order=0):
    patcher, report = Patcher(), Report()
    make = plan if callable(plan) else lambda _steps, _layers: plan
    TokenCache(Diffusion(pipe), report, "cache", make, signals, order).install(patcher)
    return patcher, report


@every
@pytest.mark.parametrize("order", [0, 1])
def test_everything_computed_is_the_identity_bit_for_bit(name, order):
    pipe, twin = JOINT[name].build(), JOINT[name].build()
    patcher, _ = put(pipe, lambda steps, layers: LevelPlan.dense(steps, layers), order=order)
    dense = JOINT[name].call(twin, steps=4)
    assert torch.equal(JOINT[name].call(pipe, steps=4), dense)
    patcher.undo()
    for (path, module), (_, other) in zip(
        pipe.transformer.named_modules(), twin.transformer.named_modules(), strict=True
    ):
        assert sorted(vars(module)) == sorted(vars(other)), path
    assert torch.equal(JOINT[name].call(pipe, steps=4), dense)


class Blended(TorchFunctionMode):
    """Explicit attention; keys and values are new at tokens of a mask and of the prompt, and old elsewhere."""

    def __init__(self, text, old, mask):
        super().__init__()
        self.text, self.old, self.mask = text, old, mask

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **kwargs}
        query, key, value, bias = (given.get(part) for part in ("query", "key", "value", "attn_mask"))
        prompt = torch.ones(self.mask.shape[0], key.shape[2] - self.mask.shape[1], dtype=torch.bool)
        new = torch.cat([prompt, self.mask] if self.text == "first" else [self.mask, prompt], 1)[:, None, :, None]
        if self.old:
            key, value = (torch.where(new, *pair) for pair in zip((key, value), self.old, strict=True))
        self.old[:] = [key, value]
        scores = (query @ key.mT) * query.shape[-1] ** -0.5
        if bias is not None:
            scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
        return scores.softmax(-1) @ value


class Reference:
    """One module of a dense twin that holds what a plan says."""

    def __init__(self, module, layout, plan, order, pending, state, branches):
        self.module, self.layout, self.plan, self.order = module, layout, plan, order
        self.pending, self.state, self.branches = pending, state, branches
        self.original, self.held, self.keys = module.module.forward, {}, {}

    def __call__(self, *args, **kwargs):
        step, branch = divmod(self.state["call"], self.branches)
        units = self.plan.at(step, self.module.layer, self.module.kind)
        states = args[0] if args else kwargs["hidden_states"]
        tokens, now = self.state["tokens"], self.state["time"]
        beside = states.shape[1] - tokens
        mask = torch.full((states.shape[0], tokens), units == 4)
        if 0 < units < 4:
            some = next(self.pending)
            assert some.shape[1] == int(units * tokens / 4 + 0.5)
            mask = mask.scatter(1, some.expand(states.shape[0], -1), value=True)
        if self.module.feeds:
            return self.original(*args, **kwargs)
        with Blended(self.layout.text, self.keys.setdefault(branch, []), mask):
            output = self.original(*args, **kwargs)
        if isinstance(output, tuple):
            own, prompt = output
        elif beside:
            first = self.layout.text == "first"
            own = output[:, beside:] if first else output[:, :-beside]
            prompt = output[:, :beside] if first else output[:, -beside:]
        else:
            own, prompt = output, None
        own = self.blend(("own", branch), own, mask, now)
        if prompt is None:
            return own
        every_one = torch.full(prompt.shape[:2], units > 0)
        prompt = self.blend(("prompt", branch), prompt, every_one, now)
        if isinstance(output, tuple):
            return own, prompt
        return torch.cat([prompt, own] if self.layout.text == "first" else [own, prompt], 1)

    def blend(self, key, new, mask, now):
        if key not in self.held:
            self.held[key] = new, torch.zeros_like(new), torch.full(new.shape[:2], now)
            return new
        value, slope, since = self.held[key]
        gap = (now - since)[..., None]
        expected = value + slope * gap if self.order else value
        lines = (new - value) / gap
        wide = mask[..., None]
        self.held[key] = (
            torch.where(wide, new, value), torch.where(wide, lines, slope),
            torch.where(mask, torch.full_like(since, now), since),
        )  # fmt: skip
        return torch.where(wide, new, expected)


@every
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("by_module", [False, True])
def test_partial_refresh_is_dense_modules_with_masks(name, order, by_module, monkeypatch):
    family = JOINT[name]
    pipe, twin = family.build(), family.build()
    plan = random_plan(pipe, seed=order)
    chosen = []
    rows = TokenChoice.rows

    def spy(self, key, count, batch):
        chosen.append(rows(self, key, count, batch))
        return chosen[-1]

    monkeypatch.setattr(TokenChoice, "rows", spy)
    put(pipe, plan, Signals(by_module=by_module), order)
    found = family.call(pipe, steps=STEPS, items=(0, 1))
    monkeypatch.undo()

    site = Diffusion(twin)
    state = {"call": -1, "time": 0.0, "tokens": family.tokens}
    twin.transformer.register_forward_pre_hook(
        lambda _m, _a, kwargs: state.update(call=state["call"] + 1, time=float(kwargs["timestep"].max())),
        with_kwargs=True,
    )
    pending = iter(chosen)
    for module in cached_modules(site, twin.transformer):
        module.module.forward = Reference(module, site.layout, plan, order, pending, state, BRANCHES[name])
    dense = family.call(family.build(), steps=STEPS, items=(0, 1))
    assert torch.allclose(found, family.call(twin, steps=STEPS, items=(0, 1)), atol=2e-4)
    assert not torch.allclose(found, dense, atol=1e-2)
    assert next(pending, None) is None


@every
def test_multiply_adds_are_those_that_a_counter_sees(name):
    family = JOINT[name]
    pipe = family.build()
    plan = random_plan(pipe, seed=1)

    def counted():
        with FlopCounterMode(display=False) as counter:
            family.call(pipe, steps=STEPS)
        return counter.get_total_flops()

    dense = counted()
    _, report = put(pipe, plan)
    sparse = counted()
    spent, whole = report.flops["attention and feed-forward of the blocks"]
    assert whole - spent == pytest.approx(dense - sparse, rel=1e-6)
    assert 0 < spent < whole < dense


@every
def test_calls_of_other_sizes_and_batches_need_no_reset(name):
    family = JOINT[name]
    pipe = family.build()
    put(
        pipe,
        lambda steps, layers: LevelPlan.of_steps(torch.tensor([4, *[2, 1, 4, 0, 3] * 2][:steps]), 4, layers),
        order=1,
    )
    first = family.call(pipe, steps=6)
    both = family.call(pipe, steps=6, items=(0, 1))
    family.call(pipe, steps=7, size=LARGE, guided=False)
    assert torch.equal(family.call(pipe, steps=6), first)
    second = family.call(pipe, steps=6, items=(1,), seed=1)
    assert torch.allclose(both[:1], first, atol=2e-4)
    assert torch.allclose(both[1:], second, atol=2e-4)


@every
def test_sparse_plan_is_nearer_to_dense_than_fewer_steps(name):
    family = JOINT[name]
    pipe = family.build()
    dense = family.call(pipe, steps=12)
    distance = {}
    for spec in ("sparse-plan:cost=0.5", "fewer-steps:keep=0.5"):
        with mmaccel.accelerate(pipe, spec):
            family.call(pipe, steps=12, items=(5,))
            distance[spec] = float((family.call(pipe, steps=12) - dense).norm() / dense.norm())
    assert torch.equal(family.call(pipe, steps=12), dense)
    assert distance["sparse-plan:cost=0.5"] < distance["fewer-steps:keep=0.5"]


def test_a_third_output_is_refused():
    pipe = JOINT["flux"].build()
    attention = pipe.transformer.transformer_blocks[0].attn
    forward = attention.forward
    attention.forward = lambda *args, **kwargs: (*forward(*args, **kwargs), torch.zeros(()))
    put(pipe, random_plan(pipe))
    with pytest.raises(NotApplicableError, match="returns 3 tensors, and 2 were expected; unload IP-Adapters"):
        JOINT["flux"].call(pipe, steps=STEPS)


def test_a_companion_stream_is_refused():
    pipe = FAMILIES["ltx2"].build()
    with pytest.raises(NotApplicableError, match="another stream beside the latent's"):
        cached_modules(Diffusion(pipe), pipe.transformer)
