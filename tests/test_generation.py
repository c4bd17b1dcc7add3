"""Everything behind the prefill: chat turns on one cache, hand-written loops, sampling, beams, assisted decoding."""

from __future__ import annotations

import copy

import pytest
import torch
from checks import (
    ALL,
    cache_of,
    cached,
    call,
    close,
    closed_up,
    dropped,
    fresh,
    generate,
    ids,
    masked,
    mixture,
    seen_by_language_model,
)

import mmaccel
from mmaccel.errors import NotApplicableError
from mmaccel.tiny.families import FAMILIES

SPECS = {
    "random": "random:keep=0.3;positions=original",
    "visionzip": "visionzip:keep=0.3;contextual=0.0;positions=original",
    "fastv": "fastv:keep=0.4;layer=2",
    "prunevid": "prunevid:spatial=1.0;tau=1.0;inner_layer=2",
}
SOME = [FAMILIES[name] for name in ("llava", "llava-onevision", "qwen3-vl", "internvl")]
each_family = pytest.mark.parametrize("family", ALL, ids=ids(ALL))
some_families = pytest.mark.parametrize("family", SOME, ids=ids(SOME))
each_spec = pytest.mark.parametrize("method", SPECS)
drop_or_fastv = pytest.mark.parametrize("method", ["random", "fastv"])


def layer_of(method):
    return 2 if method in ("fastv", "prunevid") else 0


def both(net, inputs, method, run):
    """run(net) under the method, and with the tokens that it drops masked out."""
    with mmaccel.accelerate(net, SPECS[method]) as handle:
        call(net, inputs)
        gone = dropped(handle.report().kept(method), inputs)
        got = run(net)
    assert gone.any()
    with masked(net, gone, layer_of(method)):
        return got, run(net)


def same(got, want):
    assert torch.equal(got[0], want[0])
    for one, other in zip(got[1], want[1], strict=True):
        close(one, other)


def second_turn(net, family, inputs, *, whole):
    """A greedy first turn, then a second one with new text on its cache; given the ids of all or of what is new."""
    first = net.generate(**fresh(inputs), max_new_tokens=3, return_dict_in_generate=True)
    new = family.inputs("turn", batch=len(first.sequences))["input_ids"]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(new), 3 + new.shape[1], dtype=torch.int64)], 1)
    tokens = torch.cat([first.sequences, new], 1)
    # the last token of the answer was written, but not read
    tokens = tokens if whole else tokens[:, -new.shape[1] - 1 :]
    more = {"attention_mask": mask, **cached(cache_of(first))}
    return generate(net, {"input_ids": tokens, **more}, steps=3)


@pytest.mark.parametrize("whole", [True, False], ids=["all ids", "new ids"])
@each_spec
@each_family
def test_second_turn_on_the_cache(model, family, method, whole):
    net, inputs = model(family), family.inputs(mixture(family))
    same(*both(net, inputs, method, lambda net: second_turn(net, family, inputs, whole=whole)))


@pytest.mark.parametrize("with_mask", [True, False], ids=["mask", "no mask"])
@drop_or_fastv
@each_family
def test_hand_written_loop_without_positions(model, family, method, with_mask):
    net, inputs = model(family), family.inputs(mixture(family)[0])
    if with_mask and hasattr(net.model, "rope_deltas"):
        pytest.skip("the library itself makes position ids for the whole mask here and fails")

    def loop(net):
        out = call(net, inputs, use_cache=True)
        mask, logits, tokens = inputs["attention_mask"], [], []
        for _ in range(5):
            logits.append(out.logits[:, -1])
            tokens.append(logits[-1].argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            more = {"attention_mask": mask} if with_mask else {}
            out = call(net, {"input_ids": tokens[-1], **more}, **cached(cache_of(out)))
        return torch.cat(tokens, 1), logits

    same(*both(net, inputs, method, loop))


def plain_call(net, inputs):
    """What the language model gets from a dense `generate`: embeddings, and positions that count padding out."""
    seen = seen_by_language_model(net, lambda: generate(net, inputs, steps=0))
    position = seen["position_ids"]
    return seen["inputs_embeds"], position[None] if position.dim() == 2 else position[-3:]


def chat(net, prompts, positions, read=lambda turn: None, answer=3):
    """Prompts on one cache, each answered by a hand-written loop with positions and mask; ids and logits.

    positions: [P, B, S] of each prompt by itself. read(turn) is called behind each prefill.
    """
    cache, tokens, logits = None, [], []
    mask, start = prompts[0]["attention_mask"][:, :0], torch.zeros_like(positions[0][..., :1])
    for turn, (inputs, position) in enumerate(zip(prompts, positions, strict=True)):
        mask = torch.cat([mask, inputs["attention_mask"]], 1)
        position = position + start
        step = {**inputs, "attention_mask": mask}
        for count in range(answer + 1):
            given = position if len(position) > 1 else position[0]
            out = call(net, step, **cached(cache), position_ids=given, use_cache=True)
            if count == 0:
                read(turn)
            cache, position = cache_of(out), position[..., -1:] + 1
            if count == answer:
                break
            logits.append(out.logits[:, -1])
            tokens.append(logits[-1].argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            step = {"input_ids": tokens[-1], "attention_mask": mask}
        start = position
    return torch.cat(tokens, 1), logits


def turns_of(family, kinds):
    """Prompts of a chat and their plain positions. The later ones hold padding in the middle of the sequence."""
    return [family.inputs(each, seed=number) for number, each in enumerate(kinds)]


CHATS = {
    "pictures twice": lambda family: [mixture(family), [*mixture(family)[1:], mixture(family)[0]]],
    "text first": lambda family: [["text"] * 3, mixture(family)],
}


@pytest.mark.parametrize("kinds", CHATS)
@each_spec
@each_family
def test_chat_with_pictures_in_a_later_turn(model, family, method, kinds):
    net, prompts = model(family), turns_of(family, CHATS[kinds](family))
    positions = [plain_call(net, inputs)[1] for inputs in prompts]
    gone = []
    with mmaccel.accelerate(net, SPECS[method]) as handle:

        def read(turn):
            if turn == 1 or kinds != "text first":
                gone.append(dropped(handle.report().kept(method), prompts[turn]))
            else:
                gone.append(torch.zeros_like(prompts[0]["attention_mask"], dtype=torch.bool))

        got = chat(net, prompts, positions, read)
    answer = torch.zeros(3, 3, dtype=torch.bool)
    with masked(net, torch.cat([gone[0], answer, gone[1]], 1), layer_of(method)):
        same(got, chat(net, prompts, positions))


@pytest.mark.parametrize(
    "spec", ["holitom:keep=0.4;tau=0.3;contextual=0.3", "visionzip:keep=0.3", "random:keep=0.3", "prunevid:keep=0.3"]
)
@each_family
def test_chat_of_a_padded_batch_equals_single_chats(model, family, spec):
    net, kinds = model(family), CHATS["pictures twice"](family)
    prompts = turns_of(family, kinds)
    positions = [plain_call(net, inputs)[1] for inputs in prompts]
    with mmaccel.accelerate(net, spec):
        tokens, logits = chat(net, prompts, positions)
        for row in range(3):
            alone = [family.inputs(each, seed=number, row=row) for number, each in enumerate(kinds)]
            starts = [int((inputs["attention_mask"][row] == 0).sum()) for inputs in prompts]
            cut = [position[:, row : row + 1, start:] for position, start in zip(positions, starts, strict=True)]
            one, want = chat(net, alone, cut)
            assert torch.equal(tokens[row], one[0])
            for got, expected in zip(logits, want, strict=True):
                close(got[row], expected[0])


@pytest.mark.parametrize("family", [FAMILIES["llava-onevision"], FAMILIES["qwen2.5-vl"]], ids=lambda f: f.name)
def test_chat_with_compacted_positions_equals_one_short_prompt(model, family):
    net = model(family)
    kinds = CHATS["pictures twice"](family)
    prompts = turns_of(family, kinds)
    plain = [plain_call(net, inputs) for inputs in prompts]
    kept = []
    with mmaccel.accelerate(net, "random:keep=0.3") as handle:
        tokens, logits = chat(
            net, prompts, [position for _, position in plain], lambda _: kept.append(handle.report().kept("random"))
        )
    embed = net.get_input_embeddings()
    for row in range(3):
        embeds, positions, places, alive, ends = [], [], [], [], []
        start = torch.zeros(len(plain[0][1]), 1, dtype=torch.int64)
        for turn, (prompt, position) in enumerate(plain):
            alive += [len(places) + place for place in kept[turn][row]]
            ends += [len(alive) - 1 + step for step in range(3)]
            answer = tokens[row, 3 * turn : 3 * turn + 3]
            position = position[:, row] + start
            after = position[:, -1:] + 1 + torch.arange(3)
            embeds += [prompt[row], embed(answer)]
            positions += [position, after]
            places += [*family.places(kinds[turn])[row], None, None, None]
            alive += range(len(places) - 3, len(places))
            start = after[:, -1:] + 1
        want = closed_up(torch.cat(positions, 1), places, alive)
        with torch.no_grad():
            out = net.model.language_model(
                inputs_embeds=torch.cat(embeds)[alive][None],
                position_ids=want[:, None] if len(want) > 1 else want,
                attention_mask=torch.ones(1, len(alive), dtype=torch.int64),
            )
        close(torch.stack(logits)[:, row], net.lm_head(out.last_hidden_state[0, ends]))


def test_the_method_may_change_between_turns(model):
    family = FAMILIES["llava-onevision"]
    net, prompts = model(family), turns_of(family, [mixture(family), mixture(family)])
    positions = [plain_call(net, inputs)[1] for inputs in prompts]
    specs = ["fastv:keep=0.5;layer=1", "fastv:keep=0.4;layer=3"]
    names, gone, handles = ["fastv", "fastv"], [], [mmaccel.accelerate(net, specs[0])]

    def read(turn):
        gone.append(dropped(handles[0].report().kept(names[turn]), prompts[turn]))
        if turn == 0:
            handles.pop().remove()
            handles.append(mmaccel.accelerate(net, specs[1]))

    got = chat(net, prompts, positions, read)
    handles.pop().remove()
    # what the first turn dropped before layer 1 is hidden from there on, what the second dropped from layer 3 on
    first = torch.cat([gone[0], torch.zeros(3, 3 + gone[1].shape[1], dtype=torch.bool)], 1)
    both_gone = torch.cat([gone[0], torch.zeros(3, 3, dtype=torch.bool), gone[1]], 1)
    with masked(net, first, 1), masked(net, both_gone, 3):
        same(got, chat(net, prompts, positions))


@each_spec
@some_families
def test_removed_in_mid_chat(model, family, method):
    net, inputs = model(family), family.inputs(mixture(family)[0])

    def loop(net, removes=lambda: None):
        out = call(net, inputs, use_cache=True)
        removes()
        logits, tokens = [], []
        for _ in range(4):
            logits.append(out.logits[:, -1])
            tokens.append(logits[-1].argmax(-1, keepdim=True))
            out = call(net, {"input_ids": tokens[-1]}, **cached(cache_of(out)))
        return torch.cat(tokens, 1), logits

    with mmaccel.accelerate(net, SPECS[method]) as handle:
        call(net, inputs)
        gone = dropped(handle.report().kept(method), inputs)
        got = loop(net, handle.remove)
    with masked(net, gone, layer_of(method)):
        same(got, loop(net))


@pytest.mark.parametrize(
    ("spec", "kinds", "new"),
    [
        ("random:keep=0.3;positions=compact", ["video"], 1),
        ("fastv:keep=0.3", ["video"], 4),
        ("random:keep=0.3;positions=original", ["video", "text", "images"], 1),
    ],
    ids=["compacted", "several tokens behind fastv", "padded"],
)
def test_removed_in_mid_chat_where_the_library_alone_would_be_wrong(model, spec, kinds, new):
    family = FAMILIES["llava-onevision"]
    net, inputs = model(family), family.inputs(kinds)
    with mmaccel.accelerate(net, spec) as handle:
        out = call(net, inputs, use_cache=True)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(kinds), new, dtype=torch.int64)], 1)
        step = {"input_ids": inputs["input_ids"][:, -new:], "attention_mask": mask}
        with handle.paused(), pytest.raises(NotApplicableError, match="removed or paused"):
            call(net, step, **cached(copy.deepcopy(cache_of(out))))
        call(net, step, **cached(cache_of(out)))


@drop_or_fastv
@some_families
def test_sampling(model, family, method):
    net, inputs = model(family), family.inputs(mixture(family))

    def sample(net):
        torch.manual_seed(7)
        return generate(net, inputs, steps=7, do_sample=True, temperature=1.3, top_k=50, num_return_sequences=2)

    same(*both(net, inputs, method, sample))


@each_spec
@each_family
def test_beam_search(model, family, method):
    net, inputs = model(family), family.inputs(mixture(family)[::2])

    def search(net):
        out = net.generate(**fresh(inputs), max_new_tokens=6, num_beams=3, num_return_sequences=2,
                           output_scores=True, return_dict_in_generate=True)  # fmt: skip
        return out.sequences, [out.sequences_scores, *(score.clamp_min(-50) for score in out.scores)]

    same(*both(net, inputs, method, search))


@pytest.mark.parametrize("spec", ["holitom:keep=0.3;tau=0.3;contextual=0.3", "visionzip:keep=0.3", "prunevid:keep=0.3"])
@each_family
def test_beams_of_a_merge_are_repeats_of_their_prompt(model, family, spec):
    net, inputs = model(family), family.inputs(mixture(family))
    with mmaccel.accelerate(net, spec) as handle:
        _, alone = generate(net, inputs, steps=0)
        kept = handle.report().kept(spec.split(":")[0])
        _, beams = generate(net, inputs, steps=0, num_beams=3)
        assert handle.report().kept(spec.split(":")[0]) == [row for row in kept for _ in range(3)]
    close(beams[0], alone[0].repeat_interleave(3, 0))


@pytest.mark.parametrize("spec", ["holitom:keep=0.4;tau=0.3;contextual=0.3", "random:keep=0.3+fastv:keep=0.5"])
@each_family
def test_beams_of_a_padded_batch_equal_beams_of_single_prompts(model, family, spec):
    net, kinds = model(family), mixture(family)
    more = {"max_new_tokens": 6, "num_beams": 3, "output_scores": True, "return_dict_in_generate": True}
    with mmaccel.accelerate(net, spec):
        batch = net.generate(**family.inputs(kinds), **more)
        for row in range(3):
            alone = net.generate(**family.inputs(kinds, row=row), **more)
            assert torch.equal(batch.sequences[row, -6:], alone.sequences[0, -6:])
            close(batch.sequences_scores[row], alone.sequences_scores[0])


@drop_or_fastv
@some_families
def test_prompt_lookup_decoding(model, family, method):
    net, inputs = model(family), family.inputs(mixture(family)[0])
    # a prompt that repeats itself, so that something is found in it
    extra = torch.tensor([[97, 98, 99, 100] * 4])
    inputs = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], extra], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(extra)], 1),
    }
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(extra)], 1)

    def guess(net):
        return generate(net, inputs, steps=9, prompt_lookup_num_tokens=3)

    got, want = both(net, inputs, method, guess)
    same(got, want)
    with mmaccel.accelerate(net, SPECS[method]) as handle:
        guess(net)
        assert handle.report().kept(method)
        assert handle.report().as_dict()["notes"] == []


@pytest.mark.parametrize("spec", ["random:keep=0.3", "fastv:keep=0.3", "holitom:keep=0.3"])
def test_static_cache_is_refused_before_anything_is_written(model, spec):
    family = FAMILIES["llava-onevision"]
    net, inputs = model(family), family.inputs("video")
    dense = generate(net, inputs, steps=2)
    static = generate(net, inputs, steps=2, cache_implementation="static")
    with mmaccel.accelerate(net, spec):
        want = generate(net, inputs, steps=2)
        with pytest.raises(NotApplicableError, match="StaticLayer"):
            generate(net, inputs, steps=2, cache_implementation="static")
        same(generate(net, inputs, steps=2), want)
    assert torch.equal(generate(net, inputs, steps=2)[0], dense[0])
    same(generate(net, inputs, steps=2, cache_implementation="static"), static)
    name = spec.split(":")[0]
    with mmaccel.accelerate(net, f"{name}:keep=1.0"):
        same(generate(net, inputs, steps=2, cache_implementation="static"), static)


@pytest.mark.parametrize("size", [3, 40, 66, 90, 1000])
@drop_or_fastv
@each_family
def test_chunked_prefill_is_refused(model, family, method, size):
    net, inputs = model(family), family.inputs(mixture(family)[0])
    with mmaccel.accelerate(net, SPECS[method]), pytest.raises(NotApplicableError, match="prefill_chunk_size"):
        generate(net, inputs, steps=2, prefill_chunk_size=size)


@pytest.mark.parametrize("spec", ["random:keep=1.0+fastv:keep=1.0", "holitom:keep=1.0", "fewer-pixels:keep=1.0"])
@each_family
def test_a_neutral_method_does_not_stand_in_the_way_of_chunks(model, family, spec):
    net, inputs = model(family), family.inputs(mixture(family)[0])
    want = generate(net, inputs, steps=2, prefill_chunk_size=40)
    with mmaccel.accelerate(net, spec):
        got = generate(net, inputs, steps=2, prefill_chunk_size=40)
    assert torch.equal(got[0], want[0])
    assert all(map(torch.equal, got[1], want[1]))


def test_a_reduced_prompt_cannot_be_cropped_in_part(model):
    family = FAMILIES["llava-onevision"]
    net, inputs = model(family), family.inputs("video")
    with mmaccel.accelerate(net, "random:keep=0.3"):
        cache = cache_of(call(net, inputs, use_cache=True))
        seen = cache.get_seq_length()
        assert seen == inputs["input_ids"].shape[1]
        call(net, {"input_ids": inputs["input_ids"][:, -3:]}, **cached(cache))
        cache.crop(-5)
        assert cache.get_seq_length() == seen - 2
        text = next(i for i, place in enumerate(reversed(family.places("video")[0])) if place is not None)
        with pytest.raises(NotApplicableError, match="reduced as a whole"):
            cache.crop(-text + 1)
        cache.crop(-text + 2)
        assert cache.get_seq_length() == seen - text
        assert {layer.held for layer in cache.layers} == {cache.layers[0].held}
        cache.reset()
        assert cache.get_seq_length() == 0
