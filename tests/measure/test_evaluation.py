"""Evaluation in shared batches against what a user would do: one question at a time, through generate."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mmaccel import accelerate
from mmaccel.errors import MMAccelError
from mmaccel.measure import (
    Case,
    Evaluation,
    bootstrap_difference,
    count_flops,
    encoder_flops,
    evaluate,
    prefill_flops,
    record_shapes,
)
from mmaccel.measure.outcome import merge, pack, unpack
from mmaccel.tiny import video_qa
from mmaccel.tiny.scoring import answers
from mmaccel.tiny.world import render, sample_clip, sample_questions

FIRST = 700_000
SPECS = ("holitom:keep=0.15", "visionzip:keep=0.1", "fastv:keep=0.25", "evs:keep=0.2", "random:keep=0.1",
         "fewer-frames:keep=0.5", "fewer-pixels:keep=0.25+fastv:keep=0.5")  # fmt: skip


@pytest.fixture(scope="module")
def loaded():
    return video_qa()


@pytest.fixture(scope="module")
def cases():
    clips = [sample_clip(FIRST + number) for number in range(3)]
    asked = [[(q.text, q.answer, q.kind) for q in sample_questions(clip)] for clip in clips]
    asked = [asked[0][:3], asked[1][3:5], asked[2][-2:]]  # clips with different numbers of questions
    return [Case(render(clip), questions) for clip, questions in zip(clips, asked, strict=True)]


@pytest.fixture(scope="module")
def found(loaded, cases):
    return evaluate(*loaded, cases, SPECS, batch=2)


@pytest.mark.parametrize("spec", ["dense", *SPECS])
def test_answers_are_those_of_generate_one_at_a_time(loaded, cases, found, spec):
    model, processor = loaded
    outcome = found.outcomes[spec]
    name = spec
    told = []
    for number, case in enumerate(cases):
        if spec.startswith("random"):  # each clip has a draw of its own
            name = f"random:keep=0.1;seed={number}"
        for text, _, _ in case.questions:
            if spec == "dense":
                told += answers(model, processor, case.frames, [text])
            else:
                with accelerate(model, name):
                    told += answers(model, processor, case.frames, [text])
    assert outcome.answers == [reply.split()[0] for reply in told]
    right = [answer for case in cases for _, answer, _ in case.questions]
    assert outcome.hits.tolist() == [a == b for a, b in zip(outcome.answers, right, strict=True)]
    assert outcome.same.tolist() == [
        a == b for a, b in zip(outcome.answers, found.outcomes["dense"].answers, strict=True)
    ]


def test_sharing_the_encoder_changes_nothing(loaded, cases, found):
    alone = evaluate(*loaded, cases, SPECS, batch=2, share_encoder=False)
    for spec, outcome in found.outcomes.items():
        other = alone.outcomes[spec]
        assert outcome.answers == other.answers
        np.testing.assert_allclose(outcome.kl, other.kl, atol=1e-6)
        for name, value in vars(outcome.cost).items():
            np.testing.assert_array_equal(value, getattr(other.cost, name))


def test_the_encoder_runs_once_for_settings_that_treat_it_alike(loaded, cases):
    model, _ = loaded
    calls = []
    handle = model.model.vision_tower.register_forward_pre_hook(lambda _m, args: calls.append(len(args[0])))
    evaluate(*loaded, cases[:2], ["evs:keep=0.2", "random:keep=0.2", "holitom:keep=0.2", "visionzip:keep=0.2",
                                  "fewer-frames:keep=0.5"])  # fmt: skip
    handle.remove()
    # dense; no scores; with scores; half of the frames; and each clip by itself for Random
    assert calls == [16, 16, 16, 16, 8, 8]


def test_costs_are_those_of_a_call(loaded, cases, found):
    model, processor = loaded
    text = cases[0].questions[0][0]
    for spec in SPECS:
        with record_shapes(model) as shapes, accelerate(model, spec):
            answers(model, processor, cases[0].frames, [text])
        alone = evaluate(*loaded, [Case(cases[0].frames, cases[0].questions[:1])], [spec]).outcomes[spec].cost
        assert alone.tokens_per_layer.tolist() == shapes.prefill
        assert alone.tokens_in == 513
        assert alone.tokens_in - alone.tokens_out == len_of(processor, text) - shapes.prefill[0]
        assert alone.tokens_in - alone.tokens_last == len_of(processor, text) - shapes.prefill[-1]
        assert alone.prefill_flops == prefill_flops(model, shapes.prefill)
        assert alone.encoder_flops == encoder_flops(model, shapes.vision)
        with accelerate(model, spec):
            counted = count_flops(model, inputs_of(model, processor, cases[0].frames, text))
        assert alone.flops_own == counted["overhead"]
        assert (alone.flops_own > 0) == spec.startswith(("holitom", "visionzip", "fastv", "fewer-pixels"))


def test_a_method_that_computes_a_part_of_a_block_is_charged_for_that_part(loaded, cases):
    spec = "stc:keep=0.5;interval=4;refresh=0.25"
    vision = loaded[0].config.vision_config
    N, C, inner = (vision.image_size // vision.patch_size) ** 2, vision.hidden_size, vision.intermediate_size
    m, T = N // 4, 8
    whole = 2 * N * (4 * C * C + 2 * C * inner) + 4 * N * N * C
    reusing = 2 * N * C * C + 2 * m * (3 * C * C + 2 * C * inner) + 4 * m * N * C
    cost = evaluate(*loaded, cases[:1], [spec]).outcomes[spec].cost
    assert cost.encoder_flops == vision.num_hidden_layers * (2 * whole + (T - 2) * reusing)


def test_what_works_inside_the_encoder_alone_shortens_no_prompt(loaded, cases):
    found = evaluate(*loaded, cases[:1], ["tome:keep=0.5"])
    dense, tome = found.outcomes["dense"].cost, found.outcomes["tome:keep=0.5"].cost
    assert tome.encoder_flops < dense.encoder_flops
    assert tome.tokens_per_layer.tolist() == dense.tokens_per_layer.tolist()


def test_costs_of_a_batch_are_those_of_its_questions_one_by_one(loaded, cases, found):
    # clips have 3, 2 and 2 questions of different lengths, so the batch holds padding and one that is asked twice
    for spec in ("dense", *SPECS):
        alone = [
            evaluate(*loaded, [Case(case.frames, [question])], [] if spec == "dense" else [spec], first_clip=number)
            for number, case in enumerate(cases)
            for question in case.questions
        ]
        costs = [one.outcomes[spec].cost for one in alone]
        for name, value in vars(found.outcomes[spec].cost).items():
            # what is counted in the batch has the padding of the batch
            tolerance = 0.02 if name == "flops_own" else 1e-12
            np.testing.assert_allclose(
                value, np.mean([getattr(c, name) for c in costs], 0), rtol=tolerance, err_msg=name
            )


def test_own_work_in_a_shared_encoder_is_charged_to_all_who_use_it(loaded, cases):
    specs = ["holitom:keep=0.2", "visionzip:keep=0.2", "visionzip:keep=0.1"]
    own = [one.cost.flops_own for one in evaluate(*loaded, cases[:2], specs).outcomes.values()]
    assert own[0] == 0 < min(own[1:])
    row = evaluate(*loaded, cases[:1], specs[:1]).rows(samples=50)[1]
    assert row["flops"] == row["encoder_flops"] + row["prefill_flops"] + row["flops_own"]


def test_every_clip_has_a_draw_of_its_own(loaded, cases):
    text = cases[0].questions[:1]
    same = [Case(cases[0].frames, text)] * 6
    found = evaluate(*loaded, same, ["random:keep=0.05", "uniform:keep=0.05"], batch=6)
    assert len(set(found.outcomes["random:keep=0.05"].kl.round(9).tolist())) == 6
    assert np.ptp(found.outcomes["uniform:keep=0.05"].kl) < 1e-5
    # neither the batch nor the clips beside it change it, only its number does
    other = evaluate(*loaded, same[:4], ["random:keep=0.05"], batch=3, first_clip=2)
    np.testing.assert_allclose(
        other.outcomes["random:keep=0.05"].kl, found.outcomes["random:keep=0.05"].kl[2:], atol=1e-5
    )
    assert other.clips.tolist() == [2, 3, 4, 5]


def inputs_of(model, processor, frames, text):
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}]
    words = processor.apply_chat_template(chat, add_generation_prompt=True)
    video = torch.as_tensor(np.asarray(frames)).permute(0, 3, 1, 2)
    return processor(text=[words], videos=[video], return_tensors="pt").to(model.device)


def len_of(processor, text):
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": text}]}]
    words = processor.apply_chat_template(chat, add_generation_prompt=True)
    return len(processor.tokenizer(words)["input_ids"]) + 512


def test_rows_say_what_happened(found):
    rows = found.rows(samples=200)
    assert [row["spec"] for row in rows] == ["dense", *SPECS]
    dense, holitom = rows[0], rows[1]
    assert (dense["n"], dense["clips"]) == (7, 3)
    assert dense["agreement"] == 1
    assert dense["kl"] == 0
    assert dense["ratio"]["value"] == 1
    hits = found.outcomes["holitom:keep=0.15"].hits
    expected = bootstrap_difference(hits, found.outcomes["dense"].hits, found.clips, samples=200)
    assert holitom["difference"] == expected.as_dict()
    assert holitom["kl"] > 0
    assert holitom["flops"] < dense["flops"]
    kinds = np.array(found.kinds)
    assert holitom["by_kind"] == {kind: hits[kinds == kind].mean() for kind in set(found.kinds)}
    json.dumps(rows, allow_nan=False)


def test_a_dense_model_that_is_never_right_has_no_ratio(loaded, cases):
    text, answer, kind = cases[0].questions[0]
    wrong = "red" if answer != "red" else "blue"
    assert evaluate(*loaded, [Case(cases[0].frames, [(text, wrong, kind)])], []).rows()[0]["ratio"] is None


def test_dumps_come_back(found):
    again = Evaluation.load(json.loads(json.dumps(found.dump())))
    for spec, outcome in found.outcomes.items():
        other = again.outcomes[spec]
        assert outcome.hits.tolist() == other.hits.tolist()
        assert outcome.same.tolist() == other.same.tolist()
        assert outcome.answers == other.answers
        np.testing.assert_allclose(outcome.kl, other.kl, rtol=1e-5)
        assert outcome.cost.tokens_per_layer.tolist() == other.cost.tokens_per_layer.tolist()
    assert (again.clips == found.clips).all()
    assert again.kinds == found.kinds


def test_merging_weighs_by_questions(loaded, cases, found):
    parts = [evaluate(*loaded, cases[:1], SPECS[:1]), evaluate(*loaded, cases[1:2], SPECS[:1])]
    both = merge(parts).outcomes[SPECS[0]]
    n, m = (len(part.clips) for part in parts)
    costs = [part.outcomes[SPECS[0]].cost.tokens_last for part in parts]
    assert both.cost.tokens_last == pytest.approx((n * costs[0] + m * costs[1]) / (n + m))
    assert both.hits.tolist() == [hit for part in parts for hit in part.outcomes[SPECS[0]].hits.tolist()]
    with pytest.raises(MMAccelError, match="different specs"):
        merge([parts[0], found])


def test_flags_pack():
    flags = torch.rand(37).numpy() < 0.4
    assert unpack(pack(flags), 37).tolist() == flags.tolist()
    assert len(pack(flags)) == 10


def test_wrong_input(loaded, cases):
    frames = cases[0].frames
    with pytest.raises(MMAccelError, match="no clip"):
        evaluate(*loaded, [Case(frames, [])], [])
    with pytest.raises(MMAccelError, match="one token"):
        evaluate(*loaded, [Case(frames, [("what color is the ring ?", "light red", "color")])], [])
    with pytest.raises(MMAccelError, match="one token"):
        evaluate(*loaded, [Case(frames, [("what color is the ring ?", "mauve", "color")])], [])
    with pytest.raises(MMAccelError, match="batch"):
        evaluate(*loaded, cases, [], batch=0)
    with pytest.raises(MMAccelError, match="no method"):
        evaluate(*loaded, cases, ["nothing:keep=0.5"])
