"""FLOPs: torch's counter against closed forms, and these against formulas written out."""

from __future__ import annotations

import pytest
import torch

from mmaccel import accelerate
from mmaccel.adapters import video_lm
from mmaccel.errors import MMAccelError
from mmaccel.measure import count_flops, encoder_flops, paper_prefill_macs, prefill_flops, record_shapes
from mmaccel.measure.stages import first_token
from mmaccel.tiny.families import FAMILIES, REAL

VIDEO = [(name, "video" if "video" in family.kinds else "image") for name, family in FAMILIES.items()]


def shapes_of(model, inputs):
    with record_shapes(model) as shapes:
        first_token(model, inputs)
    return shapes


def test_the_papers_formula_gives_the_papers_numbers():
    dense = paper_prefill_macs([6272] * 28, 3584, 18944)
    assert dense == pytest.approx(40.8e12, rel=0.002)
    kept = round(0.10 * 6272)
    holitom = paper_prefill_macs([kept] * 18 + [kept / 2] * 10, 3584, 18944)
    assert holitom == pytest.approx(2.8e12, rel=0.02)
    assert paper_prefill_macs([3, 5], 2, 7) == (4 * 3 * 4 + 2 * 9 * 2 + 2 * 3 * 14) + (
        4 * 5 * 4 + 2 * 25 * 2 + 2 * 5 * 14
    )


@pytest.mark.parametrize(("name", "kind"), VIDEO)
def test_closed_forms_are_what_torch_counts(model, name, kind):
    family = FAMILIES[name]
    tiny = model(family)
    inputs = family.inputs(kind)
    counted, shapes = count_flops(tiny, inputs), shapes_of(tiny, inputs)
    assert counted["prefill"] == prefill_flops(tiny, shapes.prefill)
    site = video_lm(tiny)
    patches = [m for m in site.vision_tower.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Conv3d))]
    tokens = sum(shapes.vision[0]) - (len(shapes.vision[0]) if site.has_class_token else 0)
    embedding = 2 * tokens * sum(conv.weight.numel() for conv in patches)
    # Qwen3-VL merges the features of three more layers inside of its tower
    mergers = getattr(site.vision_tower, "deepstack_merger_list", [])
    extra = sum(
        2 * tokens // 4 * m.weight.numel() for m in torch.nn.ModuleList(mergers).modules() if hasattr(m, "out_features")
    )
    assert counted["encode"] == encoder_flops(tiny, shapes.vision) + embedding + extra
    head = 2 * tiny.lm_head.weight.numel()
    assert counted["rest"] == head
    assert counted["total"] == sum(counted[stage] for stage in ("encode", "project", "prefill", "rest"))
    assert counted["overhead"] == 0


def test_the_scoring_op_is_counted_as_overhead(model):
    family = FAMILIES["llava-onevision"]
    tiny = model(family)
    inputs = family.inputs("video")
    dense, n = count_flops(tiny, inputs), inputs["input_ids"].shape[1]
    with accelerate(tiny, "fastv:keep=0.5"):
        counted = count_flops(tiny, inputs)
    config = tiny.config.text_config
    one_row = 2 * config.num_attention_heads * n * config.hidden_size // config.num_attention_heads
    assert counted["overhead"] == one_row
    assert counted["encode"] == dense["encode"]
    assert counted["prefill"] < dense["prefill"]


def test_reduced_layers_are_seen_and_priced(model):
    family = FAMILIES["llava-onevision"]
    tiny = model(family)
    inputs = family.inputs("video")
    with accelerate(tiny, "fastv:keep=10;layer=2"):
        shapes, counted = shapes_of(tiny, inputs), count_flops(tiny, inputs)
    n = inputs["input_ids"].shape[1]
    visual = int((inputs["input_ids"] == tiny.config.video_token_id).sum())
    grid = visual - 1  # the newline token behind the video is structure
    assert shapes.prefill == [n, n, n - grid + 10, n - grid + 10]
    assert counted["prefill"] - counted["overhead"] == prefill_flops(tiny, shapes.prefill)


def test_packed_towers_attend_inside_their_borders(model):
    family = FAMILIES["qwen2.5-vl"]
    tiny = model(family)
    inputs = family.inputs("video")
    t, h, w = inputs["video_grid_thw"][0].tolist()
    shapes = shapes_of(tiny, inputs)
    full = tiny.config.vision_config.fullatt_block_indexes
    for index, lengths in enumerate(shapes.vision):
        assert sum(lengths) == t * h * w
        if index in full:
            assert lengths == [h * w] * t
        else:
            assert max(lengths) < h * w


def test_grouped_keys_and_gated_mlps_of_a_real_config():
    from accelerate import init_empty_weights
    from transformers import LlavaOnevisionForConditionalGeneration

    real = REAL["llava-onevision-7b"]
    with init_empty_weights():
        model = LlavaOnevisionForConditionalGeneration(real.config(vision_layers=1))
    d, m, kv, layers = 3584, 18944, 4 * 128, 28
    n = 6272
    linear = n * (2 * d * d + 2 * d * kv + 3 * d * m)
    assert prefill_flops(model, [n] * layers) == 2 * layers * (linear + 2 * n * n * d)
    assert prefill_flops(model, [n] * layers, causal=True) == 2 * layers * (linear + n * (n + 1) * d)
    sequences = [[729] * 32]
    D, M = 1152, 4304
    assert encoder_flops(model, sequences) == 2 * 32 * (729 * (4 * D * D + 2 * D * M) + 2 * 729**2 * D)


def test_wrong_lengths(model):
    tiny = model(FAMILIES["llava-onevision"])
    with pytest.raises(MMAccelError, match="4 decoder layers"):
        prefill_flops(tiny, [10])
    with pytest.raises(MMAccelError, match="4 layers"):
        encoder_flops(tiny, [[10]])


def test_rows_that_are_reused_cost_nothing(model):
    family = FAMILIES["llava-onevision"]
    tiny = model(family)
    inputs = family.inputs("video")
    counted, shapes = count_flops(tiny, inputs), shapes_of(tiny, inputs)
    with accelerate(tiny, "stc:keep=1.0;refresh=0.25;interval=2"):
        reduced = count_flops(tiny, inputs)
    config = tiny.config.vision_config
    T, N, C, m = len(shapes.vision[0]), shapes.vision[0][0], config.hidden_size, config.intermediate_size
    rows = int(N * 0.25)
    whole = 2 * (4 * N * C * C + 2 * N * N * C + 2 * N * C * m)
    cached = 2 * (N * C * C + 3 * rows * C * C + 2 * rows * N * C + 2 * rows * C * m)
    assert counted["encode"] - reduced["encode"] == T // 2 * config.num_hidden_layers * (whole - cached)
