"""ToMe against the dense library: merged by hand on the whole grid, where merged patches are equal copies."""

from __future__ import annotations

import contextlib
import threading

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from checks import ALL, VIDEO, call, generate, ids, mixture, snapshot
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mmaccel
from mmaccel import HoliTom, ToMe
from mmaccel.errors import ConflictError, MethodError, MMAccelError, NonFiniteError, NotApplicableError
from mmaccel.tiny.families import FAMILIES

SMALL = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
PICTURES = {"image_size": 32, "patch_size": 4}
N = 64
BATCHED = [family for family in ALL if not family.name.startswith("qwen")]


def images(n=2, seed=0):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def clip():
    text = SMALL | {"num_hidden_layers": 1}
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=SMALL | PICTURES, text_config=text))


def siglip():
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL, **PICTURES))


def siglip2():
    return transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**SMALL, patch_size=4, num_patches=N))


def internvit():
    config = {"image_size": [32, 32], "patch_size": [4, 4], "use_qk_norm": True, "layer_scale_init_value": 0.3}
    return transformers.InternVLVisionModel(transformers.InternVLVisionConfig(**SMALL, **config))


def vit(**more):
    more = {"embed_dim": 32, "depth": 4, "num_heads": 2, "init_values": 0.3, "qk_norm": True} | more
    return timm.models.VisionTransformer(32, 4, **more)


def openclip():
    vision = {"layers": 4, "width": 32, "head_width": 16, "patch_size": 4, "image_size": 32, "ls_init_value": 0.3}
    return open_clip.CLIP(16, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(width=32, heads=2, layers=1))


def padded(B=2, sizes=((8, 8), (4, 6))):
    """Arguments of a SigLIP2 tower: pictures of different sizes, in patches."""
    pixels = torch.randn(B, N, 48, generator=torch.Generator().manual_seed(1))
    mask = torch.stack([(torch.arange(N) < h * w).long() for h, w in sizes])
    return pixels, mask, torch.tensor(sizes)


# name: model, its blocks, tokens ahead of the patches, what a call gives
TOWERS = {
    "clip": (clip, lambda m: m.vision_model.encoder.layers, 1, lambda m, x: m.get_image_features(x).pooler_output),
    "siglip": (siglip, lambda m: m.encoder.layers, 0, lambda m, x: m(x).pooler_output),
    "siglip2": (siglip2, lambda m: m.encoder.layers, 0, lambda m, x: m(*padded()).pooler_output),
    "internvit": (internvit, lambda m: m.encoder.layer, 1, lambda m, x: m(x).last_hidden_state),
    "timm": (lambda: vit(reg_tokens=2), lambda m: m.blocks, 3, lambda m, x: m(x)),
    "timm without prefix": (
        lambda: vit(class_token=False, global_pool="avg"), lambda m: m.blocks, 0, lambda m, x: m(x),
    ),
    "open_clip": (openclip, lambda m: m.visual.transformer.resblocks, 1, lambda m, x: m.encode_image(x)),
}  # fmt: skip


@pytest.fixture(scope="module", params=TOWERS)
def tower(request):
    torch.manual_seed(0)
    make, blocks, prefix, run = TOWERS[request.param]
    net = make().eval()
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return net, blocks(net), prefix, lambda x: run(net, x)


def match_by_hand(alive, keys, prefix, r):
    """The r best (source, destination) of the tokens `alive`, by loops."""
    free = [(place, token) for place, token in enumerate(alive) if token >= prefix]
    sources = [token for place, token in free if place % 2 == 0]
    receivers = [token for place, token in free if place % 2 == 1]
    pairs = []
    for a in sources:
        similar = [float(F.cosine_similarity(keys[a], keys[b], dim=0)) for b in receivers]
        if similar:
            best = max(range(len(similar)), key=lambda i: (similar[i], -i))
            pairs.append((-similar[best], a, receivers[best]))
    return [(a, b) for _, a, b in sorted(pairs)[:r]]


class ByHand:
    """The dense model, whose blocks are told to go on with equal copies in place of what merges.

    counts: for each block and image how many tokens merge. Nothing is shorter here and nothing has a bias: that copies
    count as often as they are there is what proportional attention stands for.
    """

    def __init__(self, blocks, prefix, counts, valid=None):
        self.prefix, self.valid, self.counts = prefix, valid, counts
        self.keys, self.hooks = {}, []
        for number, block in enumerate(list(blocks)[: len(counts)]):
            self.watch_keys(block)
            norm = next(
                getattr(block, n) for n in ("layer_norm2", "layernorm_after", "norm2", "ln_2") if hasattr(block, n)
            )
            self.hooks.append(norm.register_forward_pre_hook(lambda _m, args, n=number: self.merge(n, args[0])))

    def watch_keys(self, block):
        attention = next(getattr(block, n) for n in ("self_attn", "attn", "attention") if hasattr(block, n))
        heads = attention.num_heads

        def note(_module, args, out):
            if isinstance(attention, torch.nn.MultiheadAttention):
                width = out.shape[-1]
                rows = slice(width, 2 * width)
                out = F.linear(out, attention.in_proj_weight[rows], attention.in_proj_bias[rows])
            out = out.transpose(1, 2) if out.ndim == 4 else out.unflatten(-1, (heads, -1))
            self.keys = out.detach().mean(2)

        if hasattr(attention, "k_norm"):
            where = attention.k_norm
        elif hasattr(attention, "k_proj"):
            where = attention.k_proj
        else:
            where = block.ln_1
        self.hooks.append(where.register_forward_hook(note))

    def merge(self, number, x):
        B, n = x.shape[:2]
        if number == 0:
            valid = torch.ones(B, n, dtype=torch.bool) if self.valid is None else self.valid
            self.groups = [{token: [token] for token in range(n) if valid[b, token]} for b in range(B)]
        new = x.clone()
        for b, groups in enumerate(self.groups):
            count = self.counts[number]
            pairs = match_by_hand(
                list(groups), self.keys[b], self.prefix, count if isinstance(count, int) else count[b]
            )
            joined = {}
            for source, destination in pairs:
                joined.setdefault(destination, []).append(source)
            for destination, sources in joined.items():
                members = groups[destination] + [m for s in sources for m in groups.pop(s)]
                groups[destination] = members
                new[b, members] = x[b, members].mean(0)
        x.copy_(new)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


class PackedByHand(ByHand):
    """The same for a tower that packs the patches of all frames: groups merge, and a copy has the place of its group.

    Attention is computed by its definition: who sees whom is said by the windows of the groups that patches went into.
    """

    def __init__(self, visual, counts, unit=4):
        self.counts, self.unit, self.hooks = counts, unit, []
        self.hooks.append(visual.register_forward_pre_hook(self.begin, with_kwargs=True))
        self.blocks = list(visual.blocks)
        for number, block in enumerate(self.blocks):
            block.attn.forward = lambda h, block=block, **kwargs: self.attend(block.attn, h, **kwargs)
            hook = block.norm2.register_forward_pre_hook(lambda _m, args, n=number: self.merge(n, args[0]))
            self.hooks.append(hook)

    def __exit__(self, *_):
        super().__exit__()
        for block in self.blocks:
            del block.attn.forward

    def begin(self, _module, args, kwargs):
        grid = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)
        frames = [h * w // self.unit for t, h, w in grid.tolist() for _ in range(t)]
        starts = [sum(frames[:i]) for i in range(len(frames))]
        self.frames = [
            {g: [g] for g in range(start, start + n)} for start, n in zip(starts, frames, strict=True)
        ]  # fmt: skip
        self.place = torch.arange(sum(frames))

    def attend(self, attention, h, cu_seqlens, position_embeddings, **_):
        P, H = len(h), attention.num_heads
        q, k, v = attention.qkv(h).view(P, 3, H, -1).unbind(1)
        self.keys = k.detach().mean(1).reshape(P // self.unit, -1)
        at = (self.place[:, None] * self.unit + torch.arange(self.unit)).flatten()
        cos, sin = (t[at][:, None] for t in position_embeddings)

        def turned(x):
            a, b = x.chunk(2, -1)
            return x * cos + torch.cat([-b, a], -1) * sin

        window = torch.zeros(P, dtype=torch.long)
        for cut in cu_seqlens.tolist()[1:-1]:
            window[cut:] += 1
        window = window[at]
        shown = [t.transpose(0, 1)[None].split(cu_seqlens.diff().tolist(), 2) for t in (turned(q), turned(k), v)]
        for part in zip(*shown, strict=True):  # whoever reads attention reads it here, as in the library's own forward
            ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation](
                attention, *part, None, scaling=attention.scaling
            )
        scores = torch.einsum("ihd,jhd->hij", turned(q), turned(k)) * attention.scaling
        scores = scores.masked_fill(window[:, None] != window, -torch.inf)
        return attention.proj(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(P, -1))

    def merge(self, number, x):
        rows = x.view(len(x) // self.unit, -1)
        new = rows.clone()
        for groups in self.frames:
            joined = {}
            for source, destination in match_by_hand(
                list(groups), self.keys, 0, min(self.counts[number], len(groups) // 2)
            ):
                joined.setdefault(destination, []).append(source)
            for destination, sources in joined.items():
                members = groups[destination] + [m for s in sources for m in groups.pop(s)]
                groups[destination] = members
                self.place[members] = destination
                new[members] = rows[members].mean(0)
        rows.copy_(new)


@contextlib.contextmanager
def lengths(blocks):
    """How many tokens each block's MLP sees."""
    seen = []
    hooks = [b.mlp.register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape[1])) for b in blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def biases(monkeypatch):
    """The masks that attention gets, in order."""
    seen, real = [], F.scaled_dot_product_attention

    def look(q, k, v, attn_mask=None, **more):
        seen.append(attn_mask)
        return real(q, k, v, attn_mask=attn_mask, **more)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", look)
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
        yield seen


def close(got, want):
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("r", [3, 9])
def test_equals_merging_by_hand_on_the_whole_grid(tower, r):
    net, blocks, prefix, run = tower
    valid = padded()[1].bool() if isinstance(net, transformers.Siglip2VisionModel) else None
    # 24 patches of the padded picture: 9, 7 (of 15), 4 (of 8), 2 (of 4)
    counts = [[9, 9], [9, 7], [9, 4], [9, 2]] if valid is not None and r == 9 else [r] * 4
    with torch.no_grad():
        dense = run(images())
        with ByHand(blocks, prefix, counts, valid) as hand:
            want = run(images())
        with mmaccel.accelerate(net, ToMe(r=r)) as handle:
            got = run(images())
    close(got, want)
    assert (want - dense).abs().max() > 1e-3
    entry = handle.report().as_dict()["tokens"][0]
    sizes = [[len(members) for token, members in groups.items() if token >= prefix] for groups in hand.groups]
    assert entry["tokens_in"] == sum(map(sum, sizes)) == (2 * N if valid is None else N + 24)
    assert entry["tokens_out"] == sum(map(len, sizes))


@pytest.mark.parametrize("knobs", [{"keep": 1.0}, {"r": 0}, {"r": 0, "schedule": "decreasing"}])
def test_neutral_knobs_are_the_model_bit_for_bit(tower, knobs):
    net, _, _, run = tower
    with torch.no_grad():
        want = run(images())
        with mmaccel.accelerate(net, ToMe(**knobs)) as handle:
            assert torch.equal(run(images()), want)
        assert handle.methods[0].neutral
        # all patches as a number: nothing to merge in this call, and so no block is computed anew
        if not isinstance(net, transformers.Siglip2VisionModel):
            with mmaccel.accelerate(net, ToMe(keep=N)):
                assert torch.equal(run(images()), want)


def test_batches_repeats_and_undo(tower):
    net, _, _, run = tower
    with torch.no_grad():
        want = run(images())
        before = snapshot(net)
        handle = mmaccel.accelerate(net, ToMe(keep=0.4))
        first = run(images())
        assert torch.equal(run(images()), first)
        if not isinstance(net, transformers.Siglip2VisionModel):
            for row in range(2):
                close(run(images()[row : row + 1]), first[row : row + 1])
        with handle.paused():
            assert torch.equal(run(images()), want)
        assert torch.equal(run(images()), first)
        handle.remove()
        assert torch.equal(run(images()), want)
    assert snapshot(net) == before


@pytest.mark.parametrize(
    ("knobs", "left"),
    [
        ({"r": 5}, [59, 54, 49, 44]),
        ({"r": 5, "schedule": "decreasing"}, [54, 47, 44, 44]),
        ({"r": 20}, [44, 24, 12, 6]),
        ({"r": 14}, [50, 36, 22, 11]),
        ({"r": 20, "schedule": "decreasing"}, [32, 16, 8, 8]),
        ({"r": (9, 0, 4)}, [55, 55, 51, 51]),
        ({"r": "30/1/99/2"}, [34, 33, 17, 15]),
        ({"keep": 0.5}, [56, 48, 40, 32]),
        ({"keep": 0.5, "schedule": "decreasing"}, [48, 37, 32, 32]),
        ({"keep": 30}, [55, 46, 38, 30]),
        ({"keep": 10}, [50, 36, 20, 10]),
        ({"keep": 0.01}, [32, 16, 8, 4]),
    ],
)
def test_tokens_behind_each_block(knobs, left):
    net = vit().eval()
    with torch.no_grad(), mmaccel.accelerate(net, ToMe(**knobs)) as handle, lengths(net.blocks) as seen:
        net(images())
    assert seen == [n + 1 for n in left]
    entry = handle.report().as_dict()["tokens"][0]
    assert (entry["tokens_in"], entry["tokens_out"]) == (2 * N, 2 * left[-1])
    asked = [note for note in handle.report().notes if "asks for 1 of 64" in note]
    assert len(asked) == (knobs == {"keep": 0.01})


@pytest.mark.parametrize(
    ("r", "asked", "made"), [(30, 120, 59), ("40/8", 48, 40), (16, 64, 56), (8, 32, None), ("8/8", 16, None)]
)
def test_merges_that_halving_forbids_are_noted(r, asked, made):
    """Four blocks of 64 patches, each of which merges at most half of what is left."""
    net = vit().eval()
    with torch.no_grad(), mmaccel.accelerate(net, ToMe(r=r)) as handle:
        net(images())
    notes = [note for note in handle.report().notes if "merges of 64 patches" in note]
    assert len(notes) == (made is not None)
    if made is not None:
        assert f"r={r} asks for {asked} merges" in notes[0]
        assert notes[0].endswith(f"make {made}")


def test_sizes_sum_to_the_patches_and_the_class_token_stays_alone(monkeypatch):
    net = vit(reg_tokens=2).eval()
    with torch.no_grad(), mmaccel.accelerate(net, ToMe(r=14)), biases(monkeypatch) as seen:
        net(images())
    assert seen[0] is None
    assert [bias.shape[-1] for bias in seen[1:]] == [67 - 14, 67 - 28, 67 - 42]
    for bias in seen[1:]:
        sizes = bias.exp()
        close(sizes.sum(-1), torch.full_like(sizes.sum(-1), N + 3))
        assert torch.equal(bias[..., :3], torch.zeros_like(bias[..., :3]))
        close(sizes, sizes.round())


def test_equal_patches_merge_first_and_without_a_trace():
    net = vit(pos_embed="none").eval()
    one = torch.randn(1, 3, 4, 4)
    constant = one.repeat(1, 1, 8, 8)
    with torch.no_grad():
        want = net.forward_features(constant)
        with mmaccel.accelerate(net, ToMe(keep=4)) as handle:
            close(net.forward_features(constant), want)
        assert handle.report().as_dict()["tokens"][0]["tokens_out"] == 4
        # half of the patches are copies of one another, the others are all different: the copies go first
        mixed = torch.where(torch.arange(32)[:, None] < 16, constant, images(1))
        want = net.forward_features(mixed)
        with mmaccel.accelerate(net, ToMe(r=4)):
            close(net.forward_features(mixed), want)


def unmerged(x):
    """(different rows, how often each is there) of the patches [N, C] of one image."""
    rows, counts = x.unique(dim=0, return_counts=True)
    return rows, counts


def test_average_pooling_sees_the_sizes():
    net = vit(class_token=False, global_pool="avg", fc_norm=False).eval()
    with torch.no_grad(), mmaccel.accelerate(net, ToMe(keep=10)):
        features, pooled = net.forward_features(images()), net(images())
    for row in range(2):
        tokens, sizes = unmerged(features[row])
        assert len(tokens) == 10
        assert sizes.sum() == N
        close(net.head((sizes[:, None] * tokens).sum(0) / N), pooled[row])


def test_attention_pooling_is_proportional():
    net = siglip().eval()
    with torch.no_grad(), mmaccel.accelerate(net, ToMe(keep=10)):
        out = net(images())
    for row in range(2):
        tokens, sizes = unmerged(out.last_hidden_state[row])
        assert len(tokens) == 10
        head = net.head
        seen = head.attention(head.probe, tokens[None], tokens[None], attn_mask=sizes.float().log()[None])[0]
        close((seen + head.mlp(head.layernorm(seen)))[0, 0], out.pooler_output[row])


def test_padding_takes_no_part(monkeypatch):
    net = siglip2().eval()
    pixels, mask, shapes = padded()
    with torch.no_grad(), mmaccel.accelerate(net, ToMe(keep=0.5)):
        with biases(monkeypatch) as seen:
            both = net(pixels, mask, shapes)
        for bias in seen[:4]:
            close(bias[:, 0, 0].exp().sum(-1), torch.tensor([64.0, 24.0]))
        pixels[1, 24:] = 1e4
        other = net(pixels, mask, shapes)
        alone = net(pixels[1:, :24], mask[1:, :24], shapes[1:])
    assert torch.equal(other.last_hidden_state[0], both.last_hidden_state[0])
    close(other.last_hidden_state[1], both.last_hidden_state[1])
    close(both.last_hidden_state[1, :24], alone.last_hidden_state[0])
    close(both.pooler_output[1], alone.pooler_output[0])
    assert len(unmerged(both.last_hidden_state[1, :24])[0]) == 12


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_masks_of_each_attention_implementation(implementation):
    net = siglip2().eval()
    with torch.no_grad():
        with mmaccel.accelerate(net, ToMe(keep=0.5)):
            want = net(*padded()).pooler_output
        net.set_attn_implementation(implementation)
        with mmaccel.accelerate(net, ToMe(keep=0.5)):
            close(net(*padded()).pooler_output, want)


def fold(family):
    """(blocks up to the one whose features are taken, prefix) of a tiny vision-language model."""

    def get(net):
        inner = net.model.vision_tower
        blocks = inner.encoder.layer if family.name == "internvl" else inner.encoder.layers
        # LLaVA takes the features of the last block but one
        used = len(blocks) - (family.name in ("llava", "llava-next-video"))
        return list(blocks)[:used], int(family.name != "llava-onevision")

    return get


@pytest.mark.parametrize("more", [[], ["holitom:keep=0.4;tau=0.3"], ["visionzip:keep=0.4"], ["fastv:keep=0.4"]],
                         ids=["alone", "holitom", "visionzip", "fastv"])  # fmt: skip
@pytest.mark.parametrize("family", BATCHED, ids=ids(BATCHED))
def test_vision_language_models_and_stacks(model, family, more):
    net = model(family)
    inputs = family.inputs(mixture(family)[0])
    blocks, prefix = fold(family)(net)
    with contextlib.ExitStack() as stack:
        if more:
            stack.enter_context(mmaccel.accelerate(net, *more))
        dense = call(net, inputs).logits
        with ByHand(blocks, prefix, [4] * len(blocks)):
            want = call(net, inputs).logits
    for order in (["tome:r=4", *more], [*more, "tome:r=4"]):
        with mmaccel.accelerate(net, *order) as handle:
            got = call(net, inputs).logits
        close(got, want)
    assert dense.shape != want.shape or (dense - want).abs().max() > 1e-4
    assert "inside the vision encoder" in str(handle.report())


PACKED = [family for family in ALL if family not in BATCHED]


@pytest.mark.parametrize("more", [[], ["holitom:keep=0.4;tau=0.3"], ["visionzip:keep=0.4"], ["fewer-pixels:keep=0.6"]],
                         ids=["alone", "holitom", "visionzip", "fewer-pixels"])  # fmt: skip
@pytest.mark.parametrize("family", PACKED, ids=ids(PACKED))
def test_packed_encoders_merge_whole_groups(model, family, more):
    net = model(family)
    if family.name == "qwen2.5-vl" and more and not more[0].startswith("fewer"):
        pytest.skip("its last block has windows, in which scores stay where the patch was")
    for kind in ("video", "images"):
        inputs = family.inputs([kind])
        blocks = len(net.model.visual.blocks)
        with contextlib.ExitStack() as stack:
            if more:
                stack.enter_context(mmaccel.accelerate(net, *more))
            dense = call(net, inputs).logits
            with PackedByHand(net.model.visual, [0] * blocks):
                close(call(net, inputs).logits, dense)
            with PackedByHand(net.model.visual, [2] * blocks) as hand:
                want = call(net, inputs).logits
        with mmaccel.accelerate(net, "tome:r=2", *more) as handle:
            got = call(net, inputs).logits
        close(got, want)
        assert dense.shape != want.shape or (dense - want).abs().max() > 1e-4
        entry = handle.report().as_dict()["tokens"][0]
        assert entry["tokens_in"] == 4 * sum(len(m) for groups in hand.frames for m in groups.values())
        assert entry["tokens_out"] == 4 * sum(len(groups) for groups in hand.frames)


def test_gradients_pass_through_packed_encoders():
    family = FAMILIES["qwen3-vl"]
    net, inputs, grads = family.build(), family.inputs(["image"]), []
    first = net.model.visual.blocks[0].attn.qkv.weight
    for context in (lambda: PackedByHand(net.model.visual, [2] * 4), lambda: mmaccel.accelerate(net, "tome:r=2")):
        with context():
            loss = net(**inputs).logits.square().sum()
        net.zero_grad()
        loss.backward()
        grads.append(first.grad.clone())
    torch.testing.assert_close(*grads, atol=1e-5 * float(grads[0].abs().max()), rtol=1e-3)
    assert grads[0].abs().max() > 0


def test_packed_frames_of_different_sizes_merge_by_themselves():
    """Two pictures in one call are what each is alone, at a budget that is a fraction of each."""
    visual = FAMILIES["qwen2.5-vl"].build().model.visual
    grids = torch.tensor([[1, 6, 10], [2, 4, 4]])
    pixels = torch.randn(60 + 32, visual.patch_embed.proj.weight[0].numel())
    vision = {"keep": 0.4, "schedule": "decreasing"}
    with torch.no_grad(), mmaccel.accelerate(visual, ToMe(**vision)) as handle:
        both = visual(pixels, grid_thw=grids).last_hidden_state
        entry = handle.report().as_dict()["tokens"][0]
        alone = [visual(pixels[:60], grid_thw=grids[:1]), visual(pixels[60:], grid_thw=grids[1:])]
    close(both, torch.cat([a.last_hidden_state for a in alone]))
    # 15 groups to 6; twice 4 groups to 2
    assert (entry["tokens_in"], entry["tokens_out"]) == (92, 4 * (6 + 2 + 2))
    assert len(unmerged(both[:60])[0]) == 24


def test_fewer_pixels_and_fewer_frames_work_in_front(model):
    family = FAMILIES["llava-onevision"]
    net, inputs = model(family), family.inputs("video")
    blocks, prefix = fold(family)(net)
    for spec in ("fewer-pixels:keep=0.5", "fewer-frames:keep=0.5"):
        with mmaccel.accelerate(net, spec), ByHand(blocks, prefix, [2] * 4):
            want = call(net, inputs).logits
        with mmaccel.accelerate(net, spec, "tome:r=2"):
            close(call(net, inputs).logits, want)


def test_a_tower_and_the_model_around_it_merge_once():
    net = FAMILIES["llava"].build()
    for outer, inner in ((net, net.model.vision_tower), (net.model.vision_tower, net)):
        with mmaccel.accelerate(outer, "tome") as handle:
            with pytest.raises(ConflictError, match="already, by a method"):
                mmaccel.accelerate(inner, "tome")
            with pytest.raises(ConflictError, match="tome is on this model already"):
                mmaccel.accelerate(outer, "tome:r=2")
            with handle.paused(), mmaccel.accelerate(inner, "tome"):
                pass


def test_a_call_for_features_of_another_layer_is_refused():
    family = FAMILIES["llava"]
    net, inputs = family.build(), family.inputs("image")
    with torch.no_grad(), mmaccel.accelerate(net, "tome"):
        net.model.get_image_features(inputs["pixel_values"], vision_feature_layer=-2)
        with pytest.raises(NotApplicableError, match=r"vision layer 3.*layer 2"):
            net.model.get_image_features(inputs["pixel_values"], vision_feature_layer=-1)
        with pytest.raises(NotApplicableError, match=r"several vision layers \(-2, -1\)"):
            net.model.get_image_features(inputs["pixel_values"], vision_feature_layer=[-2, -1])
    net.config.vision_feature_layer = [-2, -1]
    with pytest.raises(NotApplicableError, match="several vision layers"):
        mmaccel.accelerate(net, "tome")


def test_gradients_are_those_of_merging_by_hand():
    net = vit().train()
    weights = torch.randn(2, 65, 32)
    grads = []
    for context in (lambda: ByHand(net.blocks, 1, [7] * 4), lambda: mmaccel.accelerate(net, ToMe(r=7))):
        pixels = images().requires_grad_()
        with context():
            loss = (net.forward_features(pixels) * weights).sum()
        net.zero_grad()
        loss.backward()
        grads.append((pixels.grad, net.blocks[0].attn.qkv.weight.grad.clone(), net.cls_token.grad.clone()))
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)
        assert want.abs().max() > 1e-3


@pytest.mark.parametrize("make", [vit, siglip], ids=["timm", "siglip"])
def test_checkpointing_is_refused(make):
    net = make().train()
    net.set_grad_checkpointing() if make is vit else net.gradient_checkpointing_enable()
    with mmaccel.accelerate(net, "tome"):
        with pytest.raises(NotApplicableError, match="gradient checkpointing"):
            net(images())
        with torch.no_grad():
            net(images())


def test_features_and_intermediates_of_timm():
    net = vit().eval()
    with torch.no_grad():
        dense = net.forward_intermediates(images(), indices=[1, 3])
        with mmaccel.accelerate(net, ToMe(keep=0.3)) as handle:
            whole = net(images())
            features = net.forward_features(images())
            assert torch.equal(net.forward_head(features), whole)
            assert not handle.report().notes
            got = net.forward_intermediates(images(), indices=[1, 3])
            assert any("outside of the encoder's forward" in note for note in handle.report().notes)
    for a, b in zip((got[0], *got[1]), (dense[0], *dense[1]), strict=True):
        assert torch.equal(a, b)


def test_masks_of_pairs_and_causal_calls_are_refused():
    net = vit().eval()
    pairs = torch.ones(65, 65, dtype=torch.bool).tril()
    with torch.no_grad(), mmaccel.accelerate(net, "tome"):
        want = net(images())
        with pytest.raises(NotApplicableError, match=r"hide padding.*\(65, 65\)"):
            net(images(), attn_mask=pairs)
        with pytest.raises(NotApplicableError, match="is_causal"):
            net(images(), is_causal=True)
        assert torch.equal(net(images()), want)


def test_what_shortens_between_blocks_is_named():
    net = vit().eval()
    hook = net.blocks[1].register_forward_hook(lambda _m, _a, out: out[:, :-3])
    with (
        torch.no_grad(), mmaccel.accelerate(net, "tome"),
        pytest.raises(MMAccelError, match=r"between the blocks.*changes the number of tokens"),
    ):  # fmt: skip
        net(images())
    hook.remove()


def test_features_that_are_not_finite_are_named():
    net = vit().eval()
    with torch.no_grad(), mmaccel.accelerate(net, "tome"):
        want = net(images())
        with pytest.raises(NonFiniteError, match="to merge by hold NaN"):
            net(images() * torch.nan)
        assert torch.equal(net(images()), want)


def test_a_call_without_images_passes():
    net = vit().eval()
    with torch.no_grad():
        want = net(images(0))
        with mmaccel.accelerate(net, "tome"):
            assert torch.equal(net(images(0)), want)


def test_half_precision_stays_half():
    net = vit().eval().bfloat16()
    with torch.no_grad(), mmaccel.accelerate(net, "tome"):
        out = net.forward_features(images().bfloat16())
    assert out.dtype == torch.bfloat16
    assert len(unmerged(out[0, 1:])[0]) == 32


def test_a_compiled_encoder_gives_the_same():
    net = vit(depth=2).eval()
    with torch.no_grad(), mmaccel.accelerate(net, "tome"):
        want = net(images())
        compiled = torch.compile(net, backend="eager")
        for _ in range(2):
            close(compiled(images()), want)
    torch._dynamo.reset()


def test_threads_and_encoders_do_not_meet():
    nets = [vit().eval(), siglip().eval()]
    with contextlib.ExitStack() as stack:
        for net, keep in zip(nets, (0.3, 0.6), strict=True):
            stack.enter_context(mmaccel.accelerate(net, ToMe(keep=keep)))
        jobs = [(net, images(seed=seed)) for net in nets for seed in range(3)]

        def run(net, x):
            with torch.no_grad():
                out = net(x)
            return out if isinstance(out, torch.Tensor) else out.pooler_output

        want = [run(*job) for job in jobs]
        got: list = [None] * len(jobs)
        start = threading.Barrier(len(jobs))

        def work(i):
            start.wait()
            for _ in range(4):
                got[i] = run(*jobs[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("family", [VIDEO[1], FAMILIES["internvl"], FAMILIES["qwen3-vl"]], ids=lambda f: f.name)
def test_nothing_is_left_on_a_vision_language_model(family):
    net, twin = family.build(), family.build()
    inputs = family.inputs(mixture(family))
    with mmaccel.accelerate(net, "tome:keep=0.3"):
        call(net, inputs)
        generate(net, inputs, steps=1)
    call(twin, inputs)
    generate(twin, inputs, steps=1)
    assert snapshot(net) == snapshot(twin)
    assert torch.equal(call(net, inputs).logits, call(twin, inputs).logits)


@pytest.mark.parametrize("how", [RuntimeError, KeyboardInterrupt])
def test_a_call_that_raises_leaves_no_state(how):
    net = vit().eval()

    def stop(*_):
        raise how

    with torch.no_grad(), mmaccel.accelerate(net, "tome"):
        want = net(images())
        hook = net.blocks[2].register_forward_pre_hook(stop)
        with pytest.raises(how):
            net(images())
        hook.remove()
        assert torch.equal(net(images()), want)


def test_flops_are_those_of_the_lengths():
    net = vit().eval()
    with torch.no_grad(), mmaccel.accelerate(net, ToMe(r=5)) as handle:
        net(images(1))
    flops = handle.report().as_dict()["flops"]["vision encoder"]
    weights = 4 * 32 * 32, 8 * 32 * 32

    def cost(before, behind):
        return 2 * before * weights[0] + 4 * before**2 * 32 + 2 * behind * weights[1]

    assert flops["dense"] == 4 * cost(65, 65)
    assert flops["spent"] == cost(65, 60) + cost(60, 55) + cost(55, 50) + cost(50, 45)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"r": -1}, "r=-1 is outside"),
        ({"r": 2.5}, "r must be"),
        ({"keep": 0}, "keeps nothing"),
        ({"keep": 1.5}, "outside"),
        ({"r": (3, -1)}, "outside"),
        ({"r": "3/a"}, "outside"),
        ({"r": ""}, "outside"),
        ({"r": (3, 1), "schedule": "decreasing"}, "no schedule"),
        ({"schedule": "linear"}, "none of 'constant', 'decreasing'"),
        ({"keep": 0.3, "r": 8}, "give one of them"),
    ],
)
def test_wrong_knobs(knobs, message):
    with pytest.raises(MethodError, match=message):
        ToMe(**knobs)


def test_more_patches_than_there_are_names_the_nearest():
    net = vit().eval()
    with mmaccel.accelerate(net, ToMe(keep=65)), pytest.raises(MethodError, match=r"\b64\b"):
        net(images())


def test_specs_and_targets():
    assert ToMe.preset("vit-large 384") == ToMe(r=23)
    assert ToMe(r=[8, 4]).spec == "tome:r=8/4"
    assert ToMe(r=[0, 0]).neutral
    assert ToMe(r=8, schedule="decreasing").spec == "tome:r=8;schedule=decreasing"
    with pytest.raises(NotApplicableError, match=r"holitom works on video-lm.*methods that fit:.*\btome\b"):
        mmaccel.accelerate(vit(), HoliTom())
