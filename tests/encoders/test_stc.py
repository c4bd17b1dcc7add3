"""STC against naive loops over frames, layers and rows; streams against the video that is given as a whole."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from checks import call, generate
from encoders.made import noise, scene, video

import mmaccel
from mmaccel.codecs import using_signals
from mmaccel.core.stream import Stream, following
from mmaccel.errors import ConflictError, MethodError, NonFiniteError, NotApplicableError
from mmaccel.tiny import video_qa
from mmaccel.tiny.families import FAMILIES

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
PICTURES = {"image_size": 32, "patch_size": 8}
BATCHED = ["llava-next-video", "llava-onevision"]
PACKED = ["qwen2-vl", "qwen2.5-vl", "qwen3-vl"]
CACHER = "stc:keep=1.0;"


def _siglip():
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL, **PICTURES))


def _clip():
    config = transformers.CLIPConfig(
        vision_config=SMALL | PICTURES, text_config=SMALL | {"num_hidden_layers": 1, "vocab_size": 16}
    )
    return transformers.CLIPModel(config)


def _internvit():
    return transformers.InternVLVisionModel(
        transformers.InternVLVisionConfig(
            **SMALL, image_size=[32, 32], patch_size=[8, 8], use_qk_norm=True, layer_scale_init_value=0.3
        )
    )


def _timm():
    import timm

    return timm.models.VisionTransformer(
        32, 8, embed_dim=32, depth=3, num_heads=2, init_values=0.3, qk_norm=True, reg_tokens=2
    )


def _open_clip():
    import open_clip

    return open_clip.CLIP(
        16,
        open_clip.CLIPVisionCfg(layers=3, width=32, head_width=16, patch_size=8, image_size=32, ls_init_value=0.3),
        open_clip.CLIPTextCfg(width=32, heads=2, layers=1),
    )


def blocks_of(net, name):
    if name == "internvit":
        return net.encoder.layer
    if name in ("timm", "open_clip"):
        return net.blocks if name == "timm" else net.visual.transformer.resblocks
    return getattr(net, "vision_model", net).encoder.layers


ALONE = {"siglip": _siglip, "clip": _clip, "internvit": _internvit, "timm": _timm, "open_clip": _open_clip}


@pytest.fixture(scope="module")
def tower():
    """tower(name) -> (the model, a function of frames [T, 3, 32, 32] to its features)."""
    built = {}

    def get(name):
        if name not in built:
            torch.manual_seed(0)
            net = ALONE[name]().eval()
            for parameter in net.parameters():
                parameter.data += 0.05 * torch.randn_like(parameter)
            built[name] = net
        net = built[name]
        runs = {"clip": lambda x: net.get_image_features(x), "open_clip": lambda x: net.encode_image(x)}
        return net, runs.get(name, net)

    return get


def tensor_of(output):
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state


@torch.no_grad()
def encode(run, frames):
    return tensor_of(run(frames)).clone()


def clip(T, seed=0, changed=0.4):
    """Frames [T, 3, 32, 32]; of each picture some patches of 8 x 8 differ from those of the frame before."""
    generator = torch.Generator().manual_seed(seed)
    frames = [torch.randn(3, 32, 32, generator=generator)]
    for _ in range(T - 1):
        moving = (torch.rand(4, 4, generator=generator) < changed).repeat_interleave(8, 0).repeat_interleave(8, 1)
        frames.append(torch.where(moving, torch.randn(3, 32, 32, generator=generator), frames[-1]))
    return torch.stack(frames)


def linear(layer, x, part=None):
    weight, bias = layer.weight, layer.bias
    if part is not None:
        width = len(weight) // 3
        weight, bias = weight[part * width : (part + 1) * width], bias[part * width : (part + 1) * width]
    return x @ weight.T + (0 if bias is None else bias)


class Siglip:
    def __init__(self, block):
        self.block, self.attention = block, block.self_attn
        self.norm1, self.norm2, self.heads = block.layer_norm1, block.layer_norm2, self.attention.num_heads

    def qkv(self, x):
        return [linear(layer, x) for layer in (self.attention.q_proj, self.attention.k_proj, self.attention.v_proj)]

    def out(self, x):
        return linear(self.attention.out_proj, x)

    def mlp(self, x):
        return self.block.mlp(x)


class InternVit(Siglip):
    def __init__(self, block):
        self.block, self.attention = block, block.attention
        self.norm1, self.norm2, self.heads = block.layernorm_before, block.layernorm_after, self.attention.num_heads

    def qkv(self, x):
        q, k, v = super().qkv(x)
        return self.attention.q_norm(q), self.attention.k_norm(k), v

    def out(self, x):
        return self.block.lambda_1 * linear(self.attention.projection_layer, x)

    def mlp(self, x):
        return self.block.lambda_2 * self.block.mlp(x)


class Qwen(Siglip):
    def __init__(self, block):
        self.block, self.attention = block, block.attn
        self.norm1, self.norm2, self.heads = block.norm1, block.norm2, self.attention.num_heads

    def qkv(self, x):
        return [linear(self.attention.qkv, x, part) for part in range(3)]

    def out(self, x):
        return linear(self.attention.proj, x)


def naive_of(block):
    if hasattr(block, "self_attn"):
        return Siglip(block)
    return InternVit(block) if hasattr(block, "lambda_1") else Qwen(block)


def turned(x, rotary, row, heads):
    """x [C] of one row turned to its place, head by head."""
    if rotary is None:
        return x
    cos, sin = rotary[0][row], rotary[1][row]
    out = []
    for head in x.view(heads, -1):
        half = len(head) // 2
        out.append(head * cos + torch.cat([-head[half:], head[:half]]) * sin)
    return torch.cat(out)


def naive_layer(parts, h, old, choose, rotary=None, windows=None):
    """One layer of one frame h [N, C], row by row; `old` is what it left for its reference, None for a whole frame."""
    N, heads = len(h), parts.heads
    q, k, v = parts.qkv(parts.norm1(h))
    rows = range(N) if old is None else choose(k, old["key"])
    left = {"key": k, "value": v.clone(), "attention": torch.zeros_like(h), "mlp": torch.zeros_like(h)}
    if old is not None:
        left |= {name: old[name].clone() for name in ("value", "attention", "mlp")}
        for row in rows:
            left["value"][row] = v[row]
    keys = torch.stack([turned(k[row], rotary, row, heads) for row in range(N)])
    width = k.shape[1] // heads
    for row in rows:
        query = turned(q[row], rotary, row, heads)
        seen = [other for other in range(N) if windows is None or windows[other] == windows[row]]
        made = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            logits = torch.stack([query[part] @ keys[other, part] for other in seen]) / math.sqrt(width)
            made.append(torch.softmax(logits, 0) @ left["value"][seen][:, part])
        left["attention"][row] = parts.out(torch.cat(made)[None])[0]
    between = h + left["attention"]
    for row in rows:
        left["mlp"][row] = parts.mlp(parts.norm2(between[row])[None])[0]
    return between + left["mlp"], left, len(rows)


def choosing(rule, value, unit=1):
    """The rows that are renewed, as a list: the lowest int(n * share) groups, or all that are not above a cosine."""

    def choose(key, old):
        return of([float(torch.cosine_similarity(a, b, dim=0)) for a, b in zip(key, old, strict=True)])

    def of(cosines):
        means = [sum(cosines[i : i + unit]) / unit for i in range(0, len(cosines), unit)]
        if rule == "fixed":
            # rows that have not changed at all are equally like, whatever rounding has left of that
            groups = sorted(range(len(means)), key=lambda i: (round(means[i] * 2**16), i))[
                : max(1, int(len(means) * value + 1e-9))
            ]
        else:
            groups = [i for i, mean in enumerate(means) if mean <= value]
        return [group * unit + i for group in sorted(groups) for i in range(unit)]

    choose.of = of
    return choose


@torch.no_grad()
def naive(blocks, frames, choose, interval, *, rotary=None, windows=None, cut=None, given=None):
    """(the last layer's output [T, N, C], whole frames, rows renewed) of one video, frame by frame.

    given: of each frame the changes of its rows since the frame before, in the place of cosines; None for a row that is
    no patch.
    """
    parts = [naive_of(block) for block in blocks]
    outputs, whole, renewed, reference, age = [], [], 0, None, 0
    for t, h in enumerate(frames):
        age += 1
        new = reference is None or (interval is not None and age >= interval)
        pick = choose
        if given is not None and not new:
            likes = [-1e6 if row[0] is None else 1 - sum(row) for row in zip(*given[t - age + 1 : t + 1], strict=True)]
            pick = lambda _key, _old, likes=likes: choose.of(likes)  # noqa: E731
            shown = [max(0.0, like) for like, row in zip(likes, given[t], strict=True) if row is not None]
            new = cut is not None and sum(shown) / len(shown) < cut
        elif not new and cut is not None:
            key = parts[0].qkv(parts[0].norm1(h))[1]
            new = float(torch.cosine_similarity(key, reference[0]["key"], dim=1).mean()) < cut
        lefts = []
        for layer, part in enumerate(parts):
            old = None if new else reference[layer]
            h, left, n = naive_layer(part, h, old, pick, rotary, None if windows is None else windows[layer])
            lefts.append(left)
            renewed += 0 if new else n
        if new:
            reference, age = lefts, 0
            whole.append(t)
        outputs.append(h)
    return torch.stack(outputs), whole, renewed


class Watch:
    """What went into the blocks of a vision encoder, and what came out of the last."""

    def __init__(self, blocks):
        self.blocks, self.given, self.output = blocks, [], None
        self.hooks = []
        for block in blocks:
            self.hooks.append(block.register_forward_pre_hook(self._before, with_kwargs=True))
            self.hooks.append(block.register_forward_hook(self._after))

    def _before(self, _module, args, kwargs):
        self.given.append((args[0] if args else kwargs.get("hidden_states"), kwargs))

    def _after(self, _module, _args, output):
        self.output = output[0] if isinstance(output, tuple) else output

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def compare(blocks, run, spec, frames_of, choose, interval, cut=None, given=()):
    """Run a model under STC and its blocks naively; frames_of(given) -> of each video its rows, rotary, windows."""
    with Watch(blocks) as watch, mmaccel.accelerate(run.model, spec) as handle:
        run()
    events = handle.report().events
    first = watch.given[0][0]
    flat, got = first.reshape(-1, first.shape[-1]), watch.output.reshape(-1, first.shape[-1])
    whole = frames = renewed = reusable = 0
    for number, (rows, rotary, windows) in enumerate(frames_of(watch.given)):
        mine = given[number] if given else None
        want, fresh, n = naive(
            blocks, flat[rows], choose, interval, rotary=rotary, windows=windows, cut=cut, given=mine
        )
        torch.testing.assert_close(got[rows], want, atol=1e-5, rtol=0)
        whole, frames, renewed = whole + len(fresh), frames + len(rows), renewed + n
        reusable += (len(rows) - len(fresh)) * rows.shape[1] * len(blocks)
    assert events["stc frames encoded whole"] == whole
    assert events["stc frames reusing another"] == frames - whole
    assert not reusable or events["stc rows computed in these"] == f"{renewed / reusable:.1%}"
    return whole, frames


class Run:
    def __init__(self, model, run):
        self.model, self.run = model, run

    @torch.no_grad()
    def __call__(self):
        return self.run()


def batched(videos):
    def frames_of(given):
        F, N = given[0][0].shape[:2]
        rows = torch.arange(F * N).view(videos, F // videos, N)
        return [(one, None, None) for one in rows]

    return frames_of


def packed(grids):
    def frames_of(given):
        found, start = [], 0
        for t, h, w in grids.tolist():
            rows = torch.arange(start, start + t * h * w).view(t, h * w)
            windows = []
            for _, kwargs in given:
                ends = kwargs["cu_seqlens"].tolist()[1:]
                windows.append([next(i for i, end in enumerate(ends) if row < end) for row in rows[0].tolist()])
            cos, sin = given[0][1]["position_embeddings"]
            found.append((rows, (cos[rows[0]], sin[rows[0]]), windows))
            start += t * h * w
        return found

    return frames_of


RULES = {
    "fixed": ("refresh=0.25;interval=2", "fixed", 0.25, 2, None),
    "fixed 3": ("refresh=0.4;interval=3", "fixed", 0.4, 3, None),
    "similarity": ("rule=similarity;similarity=0.9;interval=none", "similarity", 0.9, None, None),
    "cut": ("refresh=0.3;interval=4;scene_cut=0.7", "fixed", 0.3, 4, 0.7),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["siglip", "clip", "internvit"])
def test_a_vision_encoder_equals_naive_loops(tower, name, rule):
    net, run = tower(name)
    knobs, kind, value, interval, cut = RULES[rule]
    blocks = blocks_of(net, name)
    frames = torch.cat([clip(3), clip(3, seed=1)])
    whole, _ = compare(
        blocks, Run(net, lambda: run(frames)), f"stc:{knobs}", batched(1), choosing(kind, value), interval, cut
    )
    if rule == "fixed":
        assert whole == 3


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", BATCHED + PACKED)
def test_a_vision_language_model_equals_naive_loops(model, name, rule):
    family = FAMILIES[name]
    net, inputs = model(family), family.inputs("videos")
    knobs, kind, value, interval, cut = RULES[rule]
    if name in PACKED:
        blocks, frames_of, unit = net.model.visual.blocks, packed(inputs["video_grid_thw"]), 4
    else:
        tower = net.model.vision_tower
        blocks = getattr(tower, "vision_model", tower).encoder.layers
        frames_of, unit = batched(len(inputs["pixel_values_videos"])), 1
    run = Run(net, lambda: call(net, inputs))
    compare(blocks, run, CACHER + knobs, frames_of, choosing(kind, value, unit), interval, cut)


def placed(name, config, changes, shape):
    """Changes [T, rows, columns] as lists [T][N] of a tower's rows, from what is known of their order by hand."""
    t, h, w = shape
    size = len(changes) // t
    joined = [sum(changes[i] for i in range(k * size, (k + 1) * size)).clamp(max=1) for k in range(t)]
    found = []
    for one in joined:
        # the grid of the changes is cut into the patches of the tower
        fine = one.repeat_interleave(h // one.shape[0], 0).repeat_interleave(w // one.shape[1], 1).tolist()
        if name not in PACKED:
            found.append([value for row in fine for value in row])
            continue
        units = [(y, x) for y in range(h // 2) for x in range(w // 2)]
        if name == "qwen2.5-vl":
            side = config.window_size // 2 // config.patch_size
            units.sort(key=lambda unit: (unit[0] // side, unit[1] // side, *unit))
        found.append([fine[2 * y + dy][2 * x + dx] for y, x in units for dy in (0, 1) for dx in (0, 1)])
    return found


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", BATCHED + PACKED)
def test_the_codec_s_change_takes_the_place_of_the_cosine(model, name, rule):
    family = FAMILIES[name]
    net, inputs = model(family), family.inputs("videos")
    knobs, kind, value, interval, cut = RULES[rule]
    generator = torch.Generator().manual_seed(3)
    if name in PACKED:
        grids, config = inputs["video_grid_thw"], net.config.vision_config
        blocks, frames_of, unit = net.model.visual.blocks, packed(grids), 4
        shapes, size = grids.tolist(), 2
    else:
        tower, config = net.model.vision_tower, net.config.vision_config
        blocks = getattr(tower, "vision_model", tower).encoder.layers
        videos, frames = inputs["pixel_values_videos"].shape[:2]
        side = config.image_size // config.patch_size
        shapes, size, frames_of, unit = [(frames, side, side)] * videos, 1, batched(videos), 1
    # steps of 1 / 512, so that sums are exact
    given = [
        torch.randint(0, 512, (size * t, *(n // (2 - n % 2) for n in (h, w))), generator=generator) / 512
        for t, h, w in shapes
    ]
    want = [placed(name, config, changes, shape) for changes, shape in zip(given, shapes, strict=True)]
    if name == "llava-next-video":  # CLIP's class token
        want = [[[None, *row] for row in one] for one in want]
    run = Run(net, lambda: call(net, inputs))
    with using_signals(*given):
        compare(
            blocks, run, CACHER + "temporal=codec;" + knobs, frames_of, choosing(kind, value, unit), interval, cut, want
        )


@pytest.mark.parametrize("knobs", ["interval=3", "rule=similarity;interval=none", "scene_cut=0.4;interval=none"])
@pytest.mark.parametrize("name", ["siglip", "clip", "open_clip"])
def test_changes_add_up_over_the_calls_of_a_stream(tower, name, knobs):
    net, run = tower(name)
    frames = clip(7)
    given = torch.randint(0, 300, (7, 4, 4), generator=torch.Generator().manual_seed(0)) / 512
    spec = f"stc:temporal=codec;{knobs}"
    with mmaccel.accelerate(net, spec):
        with using_signals(given):
            whole = encode(run, frames)
        with using_signals(1 - given):
            other = encode(run, frames)
        for size in (1, 2, 3):
            with following(Stream()):
                parts = []
                for start in range(0, 7, size):
                    with using_signals(given[start : start + size]):
                        parts.append(encode(run, frames[start : start + size]))
            torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=0)
        with following(Stream()), pytest.raises(NotApplicableError, match="signals"):
            encode(run, frames)
    assert not torch.allclose(whole, other, atol=1e-3)


def test_signals_belong_to_a_call_and_are_asked_for_where_they_are_needed(tower):
    net, run = tower("siglip")
    dense = encode(run, clip(2))
    with mmaccel.accelerate(net, "stc:temporal=codec"):
        assert torch.equal(encode(run, clip(2)[:1]), dense[:1])  # nothing can be reused
        with pytest.raises(NotApplicableError, match=r"using_signals"):
            encode(run, clip(2))
        with using_signals(torch.zeros(1, 4, 4)), pytest.raises(NotApplicableError, match="of 1 frames"):
            encode(run, clip(2))
    with mmaccel.accelerate(net, "stc:temporal=codec;refresh=1.0"):
        assert torch.equal(encode(run, clip(2)), dense)
    assert torch.equal(encode(run, clip(2)), dense)


def test_a_model_s_stream_takes_changes_beside_each_frame():
    model, processor = video_qa()
    generator = torch.Generator().manual_seed(0)
    frames = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator) for _ in range(4)]
    told = []
    for change in (0.0, 1.0):
        changes = torch.zeros(1, 8, 8)
        changes[:, :4] = change
        with mmaccel.stream(model, "stc:keep=1.0;temporal=codec;rule=similarity", processor=processor) as session:
            for frame in frames:
                with using_signals(changes):
                    session.push(frame)
            told.append(session.report().events["stc rows computed in these"])
            session.ask("what is it ?", max_new_tokens=1)
    assert told == ["0.0%", "50.0%"]


@pytest.mark.parametrize("knobs", ["refresh=1.0", "interval=1", "refresh=1.0;rule=similarity"])
@pytest.mark.parametrize("name", ALONE)
def test_without_reuse_a_vision_encoder_is_the_unmodified_one(tower, name, knobs):
    net, run = tower(name)
    want = encode(run, clip(4))
    with mmaccel.accelerate(net, f"stc:{knobs}"), following(Stream()):
        assert torch.equal(encode(run, clip(4)), want)
        assert torch.equal(encode(run, clip(4)), want)
    assert torch.equal(encode(run, clip(4)), want)


@pytest.mark.parametrize("name", [*BATCHED, *PACKED])
def test_every_interval_of_one_frame_is_the_unmodified_model(model, name):
    family = FAMILIES[name]
    net, inputs = model(family), family.inputs("videos")
    want = call(net, inputs).logits
    with mmaccel.accelerate(net, CACHER + "interval=1"):
        assert torch.equal(call(net, inputs).logits, want)


@pytest.mark.parametrize("name", ALONE)
def test_whole_frames_are_bit_for_bit_those_of_a_batch_of_them(tower, name):
    net, run = tower(name)
    frames = clip(5)
    with Watch(blocks_of(net, name)) as watch:
        encode(run, frames[[0, 2, 4]])
        want = watch.output
        with mmaccel.accelerate(net, "stc:interval=2"):
            encode(run, frames)
    assert torch.equal(watch.output[[0, 2, 4]], want)


@pytest.mark.parametrize("name", ALONE)
def test_renewing_every_row_is_the_dense_encoder(tower, name):
    net, run = tower(name)
    frames = clip(6)
    want = encode(run, frames)
    with mmaccel.accelerate(net, "stc:rule=similarity;similarity=1.0;interval=3") as handle:
        torch.testing.assert_close(encode(run, frames), want, atol=1e-5, rtol=0)
    assert handle.report().events["stc rows computed in these"] == "100.0%"


@pytest.mark.parametrize("refresh", [0.01, 0.25, 0.9])
@pytest.mark.parametrize("name", ALONE)
def test_the_same_frame_again_gives_the_same_features(tower, name, refresh):
    net, run = tower(name)
    frames = clip(1).expand(4, -1, -1, -1)
    want = encode(run, frames[:1])
    with mmaccel.accelerate(net, f"stc:refresh={refresh};interval=none") as handle:
        got = encode(run, frames)
        with following(Stream()):
            apart = torch.cat([encode(run, frame[None]) for frame in frames])
    torch.testing.assert_close(got, want.expand_as(got), atol=1e-6, rtol=0)
    torch.testing.assert_close(apart, want.expand_as(got), atol=1e-6, rtol=0)
    assert handle.report().events["stc frames encoded whole"] == 2


@pytest.mark.parametrize(
    "knobs", ["interval=2", "interval=3;refresh=0.4", "interval=none;scene_cut=0.8", "rule=similarity"]
)
@pytest.mark.parametrize("name", ["siglip", "clip", "open_clip"])
def test_a_stream_in_chunks_is_the_video_as_a_whole(tower, name, knobs):
    net, run = tower(name)
    frames = torch.cat([clip(5), clip(4, seed=1)])
    with mmaccel.accelerate(net, f"stc:{knobs}"):
        want = encode(run, frames)
        for size in (1, 2, 4, 9):
            with following(Stream()):
                got = torch.cat([encode(run, chunk) for chunk in frames.split(size)])
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def features(net, name, frames):
    """The model's own features of the frames [T, ...] of one video, float32 [tokens, D]."""
    with torch.no_grad():
        if name in PACKED:
            pixels, grid = frames
            output = net.model.get_video_features(pixels, grid)
        elif name == "internvl":
            output = net.model.get_image_features(frames)
        else:
            output = net.model.get_video_features(frames[None])
    made = output.pooler_output
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in made])


def chunks(name, inputs, size):
    """One video of a prompt in pieces of `size` frames (temporal groups)."""
    if name in PACKED:
        t, h, w = inputs["video_grid_thw"][0].tolist()
        rows = inputs["pixel_values_videos"][: t * h * w].split(size * h * w)
        return [(part, torch.tensor([[len(part) // (h * w), h, w]])) for part in rows]
    if name == "internvl":
        return list(inputs["pixel_values"].split(size))
    return list(inputs["pixel_values_videos"][0].split(size))


@pytest.mark.parametrize("name", [*BATCHED, *PACKED, "internvl"])
def test_a_model_s_features_of_a_stream_are_those_of_the_whole_video(model, name):
    family = FAMILIES[name]
    net, inputs = model(family), family.inputs("video")
    with mmaccel.accelerate(net, CACHER + "interval=3;refresh=0.5") as handle:
        with following(Stream()):
            (whole,) = chunks(name, inputs, 100)
            want = features(net, name, whole)
        whole_frames = handle.report().events["stc frames encoded whole"]
        for size in (1, 3):
            with following(Stream()):
                got = [features(net, name, part) for part in chunks(name, inputs, size)]
            if name == "llava-onevision":  # a newline behind every call
                got, end = [part[:-1] for part in got[:-1]] + got[-1:], got[-1]
                assert len(end)
            torch.testing.assert_close(torch.cat(got), want, atol=1e-5, rtol=0)
        if name != "internvl":
            torch.testing.assert_close(features(net, name, whole), want, atol=0, rtol=0)
    assert 0 < whole_frames < handle.report().events["stc frames reusing another"]


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_two_streams_never_mix(model, keep):
    family = FAMILIES["llava-onevision"]
    net, inputs = model(family), family.inputs("videos")
    videos = inputs["pixel_values_videos"]
    with mmaccel.accelerate(net, f"stc:keep={keep};interval=4;refresh=0.3"):
        want = []
        for frames in videos:
            with following(Stream()):
                want.append([features(net, "llava-onevision", frame[None]) for frame in frames])
        streams = [Stream(), Stream()]
        for t in range(videos.shape[1]):
            for stream, frames, expected in zip(streams, videos, want, strict=True):
                with following(stream):
                    got = features(net, "llava-onevision", frames[t][None])
                assert torch.equal(got, expected[t])


def test_two_videos_of_a_call_are_two_sequences(model):
    family = FAMILIES["llava-onevision"]
    net, inputs = model(family), family.inputs("videos")
    pixels = inputs["pixel_values_videos"][:, :3].contiguous()
    with torch.no_grad(), mmaccel.accelerate(net, CACHER + "interval=none") as handle:
        both = net.model.get_video_features(pixels).pooler_output
        assert handle.report().events["stc frames encoded whole"] == 2
        for video, got in zip(pixels, both, strict=True):
            want = net.model.get_video_features(video[None]).pooler_output[0]
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_images_pass_the_cacher(model):
    family = FAMILIES["qwen2-vl"]
    net, inputs = model(family), family.inputs("images")
    want = call(net, inputs).logits
    with mmaccel.accelerate(net, CACHER + "refresh=0.1"):
        assert torch.equal(call(net, inputs).logits, want)
        with following(Stream()):
            assert torch.equal(call(net, inputs).logits, want)


def test_a_scene_cut_is_encoded_whole_and_starts_a_new_interval(tower):
    net, run = tower("siglip")
    frames = torch.cat([clip(1).expand(3, -1, -1, -1), clip(1, seed=5).expand(3, -1, -1, -1)])
    want = encode(run, frames)
    with mmaccel.accelerate(net, "stc:interval=none;scene_cut=0.9;refresh=0.1") as handle:
        got = encode(run, frames)
    assert handle.report().events["stc frames encoded whole"] == 2
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    with mmaccel.accelerate(net, "stc:interval=none;refresh=0.1") as handle:
        other = encode(run, frames)
    assert handle.report().events["stc frames encoded whole"] == 1
    assert float((other[3:] - want[3:]).abs().max()) > 1e-2


def test_the_similarity_rule_computes_nothing_of_a_still_clip_and_all_of_another(tower):
    net, run = tower("siglip")
    still = clip(1).expand(4, -1, -1, -1) + 1e-4 * noise(4, 3, 32, 32)
    spec = "stc:rule=similarity;similarity=0.99;interval=none"
    with mmaccel.accelerate(net, spec) as handle:
        got = encode(run, still)
    assert handle.report().events["stc rows computed in these"] == "0.0%"
    torch.testing.assert_close(got, encode(run, still), atol=1e-2, rtol=0)
    frames = torch.cat([clip(1), clip(1, seed=9)])
    with mmaccel.accelerate(net, spec) as handle:
        got = encode(run, frames)
    assert handle.report().events["stc rows computed in these"] == "100.0%"
    torch.testing.assert_close(got, encode(run, frames), atol=1e-5, rtol=0)


def test_another_resolution_or_dtype_starts_anew(model, tower):
    net, run = tower("siglip")

    def at(x):
        return run(x, interpolate_pos_encoding=True)

    small, tall = noise(1, 3, 24, 40), noise(1, 3, 40, 24, seed=1)
    want = [encode(at, x) for x in (small, tall, clip(1))]
    with mmaccel.accelerate(net, "stc:interval=none;refresh=0.1") as handle, following(Stream()):
        for x, expected in zip((small, tall, clip(1)), want, strict=True):
            assert torch.equal(encode(at, x), expected)
        encode(at, clip(2)[1:])
    assert handle.report().events["stc frames encoded whole"] == 3
    assert handle.report().events["stc frames reusing another"] == 1
    family = FAMILIES["qwen2.5-vl"]
    net, pixels = model(family), chunks("qwen2.5-vl", family.inputs("video"), 1)[0][0]
    grids = [torch.tensor([[1, 6, 10]]), torch.tensor([[1, 10, 6]])]
    want = [features(net, "qwen2.5-vl", (pixels, grid)) for grid in grids]
    with mmaccel.accelerate(net, CACHER + "interval=none;refresh=0.1"), following(Stream()):
        for grid, expected in zip(grids, want, strict=True):
            assert torch.equal(features(net, "qwen2.5-vl", (pixels, grid)), expected)


def test_frames_of_different_shapes_in_one_batch_do_not_reuse_each_other():
    torch.manual_seed(0)
    net = transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(**SMALL, patch_size=4, num_patches=16)
    ).eval()
    pixels, mask = torch.randn(4, 16, 48), torch.ones(4, 16, dtype=torch.long)
    shapes = torch.tensor([[4, 4], [4, 4], [2, 8], [2, 8]])
    mask[2:, 12:] = 0

    def run(x):
        return net(x, mask, shapes)

    want = encode(run, pixels)
    with mmaccel.accelerate(net, "stc:interval=none;rule=similarity;similarity=1.0") as handle:
        torch.testing.assert_close(encode(run, pixels), want, atol=1e-5, rtol=0)
    assert handle.report().events["stc frames encoded whole"] == 2


@pytest.mark.parametrize("sizes", [[[4, 4], [2, 8]], [[3, 4], [3, 4]]])
def test_changes_are_refused_where_the_patches_have_no_common_grid(sizes):
    torch.manual_seed(0)
    net = transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(**SMALL, patch_size=4, num_patches=16)
    ).eval()
    shapes, mask = torch.tensor(sizes), torch.ones(2, 16, dtype=torch.long)
    if sizes[0] == [3, 4]:
        mask[:, 12:] = 0

    def run(x):
        return net(x, mask, shapes)

    refused = pytest.raises(NotApplicableError, match="different shapes, or filled up")
    with mmaccel.accelerate(net, "stc:temporal=codec;interval=none"), using_signals(torch.rand(2, 4, 4)), refused:
        encode(run, torch.randn(2, 16, 48))


def test_a_call_that_raises_leaves_the_stream_as_it_was(tower):
    net, run = tower("siglip")
    frames = clip(4)

    class BoomError(Exception):
        pass

    def boom(*_):
        raise BoomError

    with mmaccel.accelerate(net, "stc:interval=2"):
        want = encode(run, frames)
        with following(Stream()):
            got = [encode(run, frames[:1]), encode(run, frames[1:2])]
            hook = net.encoder.layers[1].register_forward_hook(boom)
            with pytest.raises(BoomError):
                encode(run, clip(2, seed=3))
            hook.remove()
            got += [encode(run, frames[2:3]), encode(run, frames[3:])]
    torch.testing.assert_close(torch.cat(got), want, atol=1e-5, rtol=0)


def test_a_broken_frame_does_not_stay_in_the_stream(tower):
    net, run = tower("siglip")
    frames = clip(3)
    want = encode(run, frames[2:])
    with mmaccel.accelerate(net, "stc:interval=none;refresh=0.1"), following(Stream()):
        assert encode(run, torch.full_like(frames[:1], torch.nan)).isnan().all()
        assert torch.equal(encode(run, frames[2:]), want)


def test_gradients_are_those_of_the_unmodified_encoder(tower):
    net, run = tower("siglip")

    def gradient():
        net.zero_grad()
        tensor_of(run(clip(3))).square().sum().backward()
        return net.encoder.layers[0].mlp.fc1.weight.grad.clone()

    want = gradient()
    with mmaccel.accelerate(net, "stc:interval=2") as handle:
        assert torch.equal(gradient(), want)
    assert any("gradients" in line for line in handle.report().lines())
    net.zero_grad()


def test_a_stream_takes_one_video_a_call(tower, model):
    for name in ("llava-onevision", "qwen2-vl"):
        family = FAMILIES[name]
        net, inputs = model(family), family.inputs("videos")
        refused = pytest.raises(NotApplicableError, match="a stream is one video")
        with mmaccel.accelerate(net, CACHER + "interval=2"), following(Stream()), refused:
            call(net, inputs)


def test_what_the_stream_holds_is_reported_in_bytes(tower):
    net, run = tower("siglip")
    with mmaccel.accelerate(net, "stc:interval=2") as handle:
        encode(run, clip(2))
        assert "stc bytes held by the stream" not in handle.report().events
        with following(Stream()):
            for frame in clip(5):
                encode(run, frame[None])
                # keys, values and two branches of 16 tokens x 32 channels in 3 blocks, float32
                assert handle.report().events["stc bytes held by the stream"] == 4 * 16 * 32 * 3 * 4


def test_half_precision_stays_near(tower):
    net, run = tower("siglip")
    frames = clip(4).bfloat16()
    net.bfloat16()
    try:
        want = encode(run, frames)
        with mmaccel.accelerate(net, "stc:rule=similarity;similarity=1.0;interval=2"):
            got = encode(run, frames)
    finally:
        net.float()
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want.float(), atol=0.05, rtol=0)


def test_attention_that_another_method_reads_is_that_of_all_frames(model):
    family = FAMILIES["llava-onevision"]
    net, inputs = model(family), family.inputs("video")
    tower = net.model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    heard = []
    from mmaccel.core import encoding

    original = encoding.attention_received

    def listen(q, k, **more):
        heard.append((q, k))
        return original(q, k, **more)

    encoding.attention_received = listen
    try:
        with Watch([layers[-1]]) as watch, mmaccel.accelerate(net, CACHER + "interval=4+visionzip:keep=0.4") as handle:
            call(net, inputs)
    finally:
        encoding.attention_received = original
    hidden = watch.given[0][0]
    attention = layers[-1].self_attn
    want = attention.k_proj(layers[-1].layer_norm1(hidden))
    (query, key) = heard[0]
    assert query.shape == key.shape
    torch.testing.assert_close(key.transpose(1, 2).flatten(2), want, atol=1e-6, rtol=0)
    entry = handle.report().as_dict()["tokens"]
    assert [e["method"] for e in entry if e["kept"] != 1.0] == ["visionzip"]
    assert handle.report().events["stc frames reusing another"] == 6


def test_parts_that_are_off_leave_their_place_to_others(model):
    family = FAMILIES["llava-onevision"]
    net, inputs = model(family), family.inputs("video")
    with pytest.raises(ConflictError, match="random and stc exclude each other"):
        mmaccel.accelerate(net, "stc:keep=0.5+random:keep=0.5")
    with mmaccel.accelerate(net, "stc:keep=1.0+random:keep=0.5") as handle:
        call(net, inputs)
        assert handle.report().events["stc frames reusing another"] == 4
    with mmaccel.accelerate(net, "stc:keep=0.5;refresh=1.0") as handle:
        call(net, inputs)
        assert not handle.report().events


@pytest.mark.parametrize(
    "knobs",
    ["refresh=0.0", "refresh=1.5", "interval=0", "rule=both", "similarity=2", "scene_cut=-2", "channels=0.0", "keep=0"],
)
def test_knobs_out_of_range_are_refused(knobs):
    with pytest.raises(MethodError, match="stc"):
        mmaccel.method.parse(f"stc:{knobs}")


def test_fewer_frames_and_the_cacher_work_together(model):
    family = FAMILIES["qwen2.5-vl"]
    net, inputs = model(family), family.inputs("videos")
    with mmaccel.accelerate(net, "fewer-frames:keep=0.5+" + CACHER + "interval=2") as handle:
        generate(net, inputs, steps=1)
    frames = sum(max(1, round(t * 0.5)) for t, _, _ in inputs["video_grid_thw"].tolist())
    events = handle.report().events
    assert events["stc frames encoded whole"] + events["stc frames reusing another"] == frames


def naive_pruner(x, keep, channels=0.5, past=()):
    """The kept places of a video x [T, S, D] by loops; `past` are mean vectors of frames before it."""
    T, S, D = x.shape
    whole, rest = divmod(keep, T)
    past, kept = list(past), []
    for t in range(T):
        frame = x[t].double()
        past.append(frame.mean(0))
        variance = [(float(frame[:, d].var(unbiased=False)), d) for d in range(D)]
        used = sorted(d for _, d in sorted(variance)[: int(D * channels)])
        tokens = [row[used] / row[used].norm() for row in frame]
        anchor_frame = torch.stack(tokens).mean(0)
        history = torch.stack(past).mean(0)[used]
        history = history / history.norm()
        scores = []
        for s, token in enumerate(tokens):
            score = 0.0
            for anchor in (anchor_frame, history):
                for a in (1 / 8, 1 / 4, 1 / 2, 1, 2):
                    score += math.exp(-float((token - anchor).square().sum()) / (2 * a))
            scores.append((score, s))
        kept += sorted(t * S + s for _, s in sorted(scores)[: whole + (t < rest)])
    return kept, past


@pytest.mark.parametrize(("keep", "channels"), [(0.3, 0.5), (13, 0.25), (0.5, 1.0), (2, 0.5)])
def test_the_pruner_equals_naive_loops(keep, channels):
    x = scene(5, 12, D=16, still=0.6, seed=3) + 1.0
    count = keep if isinstance(keep, int) else round(keep * 60)
    want, _ = naive_pruner(x, count, channels)
    got = mmaccel.STC(keep=keep, channels=channels).reduce(video(x))
    assert got.mix is None
    assert got.index.tolist() == want


def test_the_pruner_goes_on_with_a_stream():
    x = scene(6, 10, D=16, still=0.3, seed=1)
    method = mmaccel.STC(keep=0.4)
    want, _ = naive_pruner(x, 24)
    assert method.reduce(video(x)).index.tolist() == want
    for size in (1, 2, 3):
        got = []
        with following(Stream()):
            for start in range(0, 6, size):
                got += [start * 10 + i for i in method.reduce(video(x[start : start + size])).index.tolist()]
                method.reduce(video(noise(1, 10, 16), kind="image"))  # a picture in between is none of its frames
        assert got == want
    apart = [t * 10 + i for t in range(6) for i in method.reduce(video(x[t : t + 1])).index.tolist()]
    assert apart != want


def test_the_pruner_keeps_all_of_what_it_is_told_to_keep():
    x = scene(3, 8)
    assert mmaccel.STC(keep=24).reduce(video(x)).index.tolist() == list(range(24))
    assert len(mmaccel.STC(keep=1).reduce(video(x)).index) == 1


def test_a_broken_frame_is_an_error_and_no_part_of_the_history():
    x = scene(3, 8)
    method = mmaccel.STC(keep=0.5)
    with following(Stream()):
        method.reduce(video(x[:1]))
        with pytest.raises(NonFiniteError):
            method.reduce(video(torch.full_like(x[:1], torch.nan)))
        got = method.reduce(video(x[1:]))
    want, _ = naive_pruner(x[1:], 8, past=[x[0].double().mean(0)])
    assert got.index.tolist() == want
