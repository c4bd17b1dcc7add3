"""The token cache against dense modules with masks, on DiT (branches in one batch) and Wan (a call each, rotary)."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import diffusers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmaccel.adapters.diffusion import Diffusion
from mmaccel.core.cached_modules import cached_modules
from mmaccel.core.patching import Patcher
from mmaccel.core.token_cache import TokenCache
from mmaccel.core.token_choice import Signals, TokenChoice
from mmaccel.errors import NonFiniteError, NotApplicableError
from mmaccel.report import Report
from mmaccel.tiny import class_to_image
from mmaccel.tiny.pipelines import tiny_wan_pipeline
from mmaccel.tokens.levels import LevelPlan

library: Any = diffusers
torch.set_num_threads(1)


def wan(pipe, steps=4, seed=0, prompt: Any = "a word", **more):
    count = len(prompt) if isinstance(prompt, list) else 1
    generators = [torch.Generator().manual_seed(seed + n) for n in range(count)]
    size = {"height": 32, "width": 48, "num_frames": 9, "output_type": "latent"}
    return pipe(prompt, num_inference_steps=steps, generator=generators, **{**size, **more}).frames


def dit(pipe, steps=4, labels=(3,), seed=0, **more):
    generators = [torch.Generator().manual_seed(seed + n) for n in range(len(labels))]
    images = pipe(
        class_labels=list(labels), num_inference_steps=steps, generator=generators, output_type="np",
        **{"guidance_scale": 3.0, **more},
    ).images  # fmt: skip
    return torch.from_numpy(images)


MODELS = {"dit": (class_to_image, dit), "wan": (tiny_wan_pipeline, wan)}


def random_plan(pipe, steps=4, seed=0, lowest=0):
    site = Diffusion(pipe)
    layers = len(site.blocks(pipe.transformer))
    units = torch.randint(lowest, 5, (steps, layers, 3), generator=torch.Generator().manual_seed(seed))
    units[0] = 4
    return LevelPlan(units, 4, float(units.float().mean() / 4))


def put(pipe, plan, signals=None, order=0):
    patcher, report = Patcher(), Report()
    make = plan if callable(plan) else lambda _steps, _layers: plan
    TokenCache(Diffusion(pipe), report, "cache", make, signals, order).install(patcher)
    return patcher, report


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("order", [0, 1])
def test_everything_computed_is_the_identity_bit_for_bit(model, order):
    make, call = MODELS[model]
    pipe = make()
    dense = call(pipe)
    put(pipe, lambda steps, layers: LevelPlan.dense(steps, layers), order=order)
    assert torch.equal(call(pipe), dense)


@pytest.mark.parametrize("model", MODELS)
def test_nothing_computed_gives_the_held_tensor_itself(model):
    make, call = MODELS[model]
    pipe = make()
    site = Diffusion(pipe)
    modules = cached_modules(site, pipe.transformer)
    units = torch.full((4, 1 + modules[-1].layer, 3), 4)
    units[2, 1] = 0
    put(pipe, LevelPlan(units, 4, 0.0))
    seen: dict[str, list[torch.Tensor]] = {module.name: [] for module in modules}
    for module in modules:
        module.module.register_forward_hook(lambda _m, _a, output, name=module.name: seen[name].append(output))
    call(pipe)
    branches = 1 if model == "dit" else 2
    for module in modules:
        for branch in range(branches):
            outputs = seen[module.name][branch::branches]
            assert len(outputs) == 4
            assert (outputs[2] is outputs[1]) == (module.layer == 1)
            assert outputs[3] is not outputs[2]


class Blended:
    """Explicit attention over keys and values that are new at rows of a mask and old elsewhere."""

    def __init__(self) -> None:
        self.old: dict[int, Any] = {}
        self.mask: torch.Tensor | None = None
        self.branch = 0

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb: Any = None, **_
    ):
        def turned(x):
            if rotary_emb is None:
                return x
            cos, sin = rotary_emb[0][..., 0::2], rotary_emb[1][..., 1::2]
            pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
            return torch.view_as_real(pairs * torch.complex(cos.double(), sin.double())).flatten(-2).float()

        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        if getattr(attn, "norm_q", None) is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        query, key = turned(query), turned(key)
        if self.mask is not None:
            old = self.old[self.branch]
            key, value = (
                torch.where(self.mask[..., None, None], *pair) for pair in zip((key, value), old, strict=True)
            )
        self.old[self.branch] = key, value
        weights = torch.einsum("bqhd,bkhd->bhqk", query, key).mul(query.shape[-1] ** -0.5).softmax(-1)
        return attn.to_out[0](torch.einsum("bhqk,bkhd->bqhd", weights, value).flatten(2))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("by_module", [False, True])
def test_partial_refresh_is_dense_modules_with_masks(model, order, by_module, monkeypatch):
    """Chosen rows see new keys of chosen rows and old keys of the others; the others hold or go on along a line."""
    make, call = MODELS[model]
    pipe, twin = make(), make()
    plan = random_plan(pipe, lowest=1)
    chosen: list[tuple[str, torch.Tensor]] = []
    rows = TokenChoice.rows

    def spy(self, key, count, batch):
        found = rows(self, key, count, batch)
        chosen.append((key, found))
        return found

    monkeypatch.setattr(TokenChoice, "rows", spy)
    put(pipe, plan, Signals(by_module=by_module), order)
    found = call(pipe)
    monkeypatch.undo()

    site = Diffusion(twin)
    state = {"call": -1, "time": 0.0}
    branches = 1 if model == "dit" else 2
    twin.transformer.register_forward_pre_hook(
        lambda _m, _a, kwargs: state.update(call=state["call"] + 1, time=float(kwargs["timestep"].max())),
        with_kwargs=True,
    )
    pending = iter(chosen)

    def replace(module):
        original, held = module.module.forward, {}
        processor = None
        if module.kind == "self-attention":
            processor = Blended()
            module.module.set_processor(processor)

        def forward(*args, **kwargs):
            step, branch = divmod(state["call"], branches)
            units = plan.at(step, module.layer, module.kind)
            states = args[0] if args else kwargs["hidden_states"]
            mask = torch.ones(states.shape[:2], dtype=torch.bool)
            if units < 4:
                _, some = next(pending)
                assert some.shape[1] == int(units * states.shape[1] / 4 + 0.5)
                mask = torch.zeros_like(mask).scatter(1, some.expand(states.shape[0], -1), value=True)
            if processor is not None:
                processor.mask, processor.branch = (None if step == 0 else mask), branch
            new, now = original(*args, **kwargs), state["time"]
            if step == 0:
                held[branch] = new, torch.zeros_like(new), torch.full(states.shape[:2], now)
                return new
            value, slope, since = held[branch]
            gap = (now - since)[..., None]
            expected = value + slope * gap if order else value
            lines = (new - value) / gap
            held[branch] = tuple(
                torch.where(mask.view(*mask.shape, *[1] * (fresh.ndim - 2)), fresh, old)
                for fresh, old in ((new, value), (lines, slope), (torch.full_like(since, now), since))
            )
            return torch.where(mask[..., None], new, expected)

        module.module.forward = forward

    for module in cached_modules(site, twin.transformer):
        replace(module)
    assert torch.allclose(found, call(twin), atol=2e-4)
    assert next(pending, None) is None


def test_chosen_rows_are_those_whose_input_changed_most(monkeypatch):
    """The first partial step takes the tokens of the largest relative change of the first module's input."""
    pipe = class_to_image()
    units = torch.full((3, 8, 3), 4)
    units[2] = 1
    inputs, chosen = [], []
    rows = TokenChoice.rows
    monkeypatch.setattr(TokenChoice, "rows", lambda *a: chosen.append(rows(*a)) or chosen[-1])
    put(pipe, LevelPlan(units, 4, 0.0), Signals(staleness=0.0, bonus=0.0))
    pipe.transformer.transformer_blocks[0].attn1.register_forward_pre_hook(
        lambda _m, args, kwargs: inputs.append((args[0] if args else kwargs["hidden_states"]).clone()), with_kwargs=True
    )
    dit(pipe, steps=3, labels=(3, 7))
    before, now = inputs[1], inputs[2]
    moved = (now - before).norm(dim=-1) / before.norm(dim=-1)
    scores = moved / moved.mean(1, keepdim=True)
    both = (scores[:2] + scores[2:]) / 2
    wanted = both.topk(64, dim=1).indices.sort(1).values
    assert all(torch.equal(found, wanted.repeat(2, 1)) for found in chosen)
    assert len(chosen) == 16


def test_branches_of_guidance_compute_the_same_tokens(monkeypatch):
    chosen: list[torch.Tensor] = []
    rows = TokenChoice.rows
    monkeypatch.setattr(TokenChoice, "rows", lambda *a: chosen.append(rows(*a)) or chosen[-1])
    pipe = tiny_wan_pipeline()
    units = torch.full((3, 3, 3), 2)
    units[0] = 4
    put(pipe, LevelPlan(units, 4, 0.0), Signals(by_module=True))
    wan(pipe, steps=3)
    calls = torch.stack(chosen).unflatten(0, (2, 2, 9))
    assert torch.equal(calls[:, 0], calls[:, 1])
    assert not torch.equal(calls[0, 0, 0], calls[0, 0, 1])


@pytest.mark.parametrize("model", MODELS)
def test_multiply_adds_are_those_that_a_counter_sees(model):
    make, call = MODELS[model]
    pipe = make()
    plan = random_plan(pipe, seed=1)

    def counted():
        with FlopCounterMode(display=False) as counter:
            call(pipe)
        return counter.get_total_flops()

    dense = counted()
    _, report = put(pipe, plan)
    sparse = counted()
    spent, whole = report.flops["attention and feed-forward of the blocks"]
    assert whole - spent == pytest.approx(dense - sparse, rel=1e-6)
    assert 0 < spent < whole < dense
    assert f"{plan.cost:.1%} asked" in report.events["cost of the blocks"]


@pytest.mark.parametrize("model", MODELS)
def test_second_call_other_calls_and_batches_need_no_reset(model):
    make, call = MODELS[model]
    pipe = make()
    put(pipe, lambda steps, layers: LevelPlan.of_steps(torch.tensor([4, *[2, 1, 4, 0, 3] * 2][:steps]), 4, layers))
    first = call(pipe, steps=5)
    name, values = ("prompt", ("a word", "another longer text")) if model == "wan" else ("labels", (3, 7))
    both = call(pipe, steps=5, **{name: list(values)})
    call(pipe, steps=7, guidance_scale=1.0)
    assert torch.equal(call(pipe, steps=5), first)
    second = call(pipe, steps=5, seed=1, **{name: values[1] if model == "wan" else values[1:]})
    assert torch.allclose(both[:1], first, atol=1e-4)
    assert torch.allclose(both[1:], second, atol=1e-4)


def test_a_raising_call_leaves_the_pipeline_usable_and_nothing_outlives_a_run():
    pipe, twin = tiny_wan_pipeline(), tiny_wan_pipeline()
    plan = random_plan(pipe, steps=5)
    patcher, _ = put(pipe, plan, order=1)
    first = wan(pipe, steps=5)
    held: list[Any] = []
    pipe.transformer.blocks[0].ffn.register_forward_hook(lambda _m, _a, output: held.append(weakref.ref(output)))

    def stop(_pipe, step, *_):
        if step == 2:
            raise RuntimeError("enough")
        return {}

    with pytest.raises(RuntimeError, match="enough"):
        wan(pipe, steps=5, callback_on_step_end=stop)
    assert torch.equal(wan(pipe, steps=5), first)
    gc.collect()
    assert not any(reference() is not None for reference in held)
    pipe.transformer.blocks[0].ffn._forward_hooks.clear()
    patcher.undo()
    assert torch.equal(wan(pipe), wan(twin))
    for (name, module), (_, other) in zip(
        pipe.transformer.named_modules(), twin.transformer.named_modules(), strict=True
    ):
        assert sorted(vars(module)) == sorted(vars(other)), name


def test_another_transformer_begins_whole():
    pipe = tiny_wan_pipeline()
    pipe.register_modules(transformer_2=tiny_wan_pipeline(seed=1).transformer)
    pipe.register_to_config(boundary_ratio=0.5)
    units = torch.zeros(6, 3, 3, dtype=torch.int64)
    units[0] = 4
    _, report = put(pipe, LevelPlan(units, 4, 0.0))
    wan(pipe, steps=6, guidance_scale=1.0)
    entry = report.tokens["cache", "mlp"]
    assert entry.tokens_out / entry.tokens_in == pytest.approx(2 / 6)


def test_what_cannot_be_cached_is_refused():
    pipe = class_to_image()
    put(pipe, random_plan(pipe))
    for block in pipe.transformer.transformer_blocks:
        block.set_chunk_feed_forward(64, 1)
    with pytest.raises(NotApplicableError, match="256 tokens were expected; switch feed-forward chunking"):
        dit(pipe)


def test_latents_that_are_not_finite_are_refused():
    pipe = tiny_wan_pipeline()
    put(pipe, random_plan(pipe))
    with pytest.raises(NonFiniteError, match="latents of the first step"):
        wan(pipe, latents=torch.full((1, 16, 3, 4, 6), torch.nan))


class Alone(Diffusion):
    """A transformer by itself, with a schedule of two steps that hardly differ."""

    scheduler: Any = type("Schedule", (), {"timesteps": torch.tensor([900.0, 899.9999]), "step_index": None})()


def _families():
    torch.manual_seed(0)
    text = torch.randn(1, 5, 16)
    yield (
        library.PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, sample_size=8,
            patch_size=1, cross_attention_dim=16, caption_channels=16,
        ),
        {
            "hidden_states": torch.randn(1, 4, 8, 8), "encoder_hidden_states": text,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        ["self-attention", "cross-attention", "mlp"],
    )  # fmt: skip
    yield (
        library.LTXVideoTransformer3DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
            num_layers=2, caption_channels=16,
        ),
        {
            "hidden_states": torch.randn(1, 32, 4), "encoder_hidden_states": text, "num_frames": 2, "height": 4,
            "width": 4, "encoder_attention_mask": torch.ones(1, 5),
        },
        ["self-attention", "cross-attention", "mlp"],
    )  # fmt: skip


@pytest.mark.parametrize("index", range(2), ids=["pixart", "ltx"])
@torch.no_grad()
def test_rows_of_other_families_find_their_places(index):
    """Where next to nothing has changed, computing some tokens again gives what computing all of them gives."""
    transformer, given, kinds = list(_families())[index]
    transformer.eval()
    for weight in transformer.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.15)
    site = Alone(transformer)
    modules = cached_modules(site, transformer)
    assert [module.kind for module in modules] == kinds * 2
    times = site.scheduler.timesteps

    def run():
        return [transformer(timestep=time[None], **given).sample for time in times]

    dense = run()
    units = torch.full((2, 2, 3), 2)
    units[0] = 4
    patcher, report = Patcher(), Report()
    plan = LevelPlan(units, 4, 0.75)
    TokenCache(site, report, "cache", lambda *_: plan, Signals(staleness=0.5)).install(patcher)
    found = run()
    patcher.undo()
    assert torch.equal(found[0], dense[0])
    assert torch.allclose(found[1], dense[1], atol=1e-4)
    assert not torch.equal(found[1], dense[1])
    assert {entry.tokens_out / entry.tokens_in for entry in report.tokens.values()} == {0.75}
