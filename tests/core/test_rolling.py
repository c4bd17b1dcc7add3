"""Blocks that come and go, against one forward over what is left, at positions that are written out."""

from __future__ import annotations

import pytest
import torch

from mmaccel.core.rolling import Block, RollingPrefill
from mmaccel.tiny.families import FAMILIES


def block(generator, n, *, text=0, gap=None, axes=1, compact=True):
    offset = torch.arange(n + text).expand(axes, -1).clone()
    if axes == 3:
        offset[0, text:] = text
        offset[1, text:] = text + torch.arange(n) // 2
        offset[2, text:] = text + torch.arange(n) % 2
    visual = torch.arange(n + text) >= text
    advance = int(offset.max()) + 1
    embeds = torch.randn(n + text, 64, generator=generator) * 0.1
    return Block(embeds, offset, advance, visual, torch.zeros(n + text), (), gap, compact)


def dense(model, embeds, position):
    ids = position if len(position) == 1 else position[:, None]
    with torch.no_grad():
        return model(inputs_embeds=embeds[None], position_ids=ids,
                     attention_mask=torch.ones(1, len(embeds), dtype=torch.int64)).last_hidden_state  # fmt: skip


def held(name, rebuild=True):
    model = FAMILIES[name].build().model.language_model
    return model, RollingPrefill(model, 3 if "qwen" in name else 1, rebuild=rebuild)


def test_in_pieces_as_in_one():
    model, rolling = held("llava-onevision")
    generator = torch.Generator().manual_seed(0)
    blocks = [block(generator, 4, text=2) for _ in range(3)]
    got = torch.cat([rolling.extend(blocks[:2]), rolling.extend(blocks[2:])], 1)
    every = torch.cat([b.embeds for b in blocks])
    torch.testing.assert_close(got, dense(model, every, torch.arange(18)[None]), atol=1e-5, rtol=0)
    assert rolling.tokens == 12
    assert rolling.next == rolling.end == 18


@pytest.mark.parametrize("chunk", [1, 5, 7, 100])
def test_long_inputs_are_computed_in_chunks(chunk, monkeypatch):
    monkeypatch.setattr("mmaccel.core.rolling._CHUNK", chunk)
    model, rolling = held("qwen3-vl")
    generator = torch.Generator().manual_seed(0)
    blocks = [block(generator, 4, text=2, axes=3) for _ in range(3)]
    deep = [torch.randn(4, 64, generator=generator) for _ in range(6)]
    blocks = [
        Block(b.embeds, b.offset, b.advance, b.visual, b.salience, (deep[2 * i], deep[2 * i + 1]))
        for i, b in enumerate(blocks)
    ]
    got = rolling.extend(blocks)
    position = torch.cat([b.offset + 4 * i for i, b in enumerate(blocks)], 1)
    with torch.no_grad():
        want = model(
            inputs_embeds=torch.cat([b.embeds for b in blocks])[None], position_ids=position[:, None],
            attention_mask=torch.ones(1, 18, dtype=torch.int64),
            visual_pos_masks=torch.cat([b.visual for b in blocks])[None],
            deepstack_visual_embeds=[torch.cat(deep[0::2]), torch.cat(deep[1::2])],
        ).last_hidden_state  # fmt: skip
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_one_axis_closes_up_inside_and_between():
    model, rolling = held("llava-onevision")
    generator = torch.Generator().manual_seed(0)
    blocks = [block(generator, 3), *(block(generator, 4) for _ in range(4))]
    rolling.extend(blocks)
    some = torch.tensor([True, False, True, False])
    rolling.keep([None, torch.zeros(4, dtype=torch.bool), some, None, ~some])
    assert rolling.positions.tolist() == [list(range(3 + 2 + 4 + 2))]
    left = torch.cat([blocks[0].embeds, blocks[2].embeds[some], blocks[3].embeds, blocks[4].embeds[~some]])
    tail = block(generator, 2)
    got = rolling.extend([tail])
    want = dense(model, torch.cat([left, tail.embeds]), torch.arange(13)[None])[:, -2:]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


def test_a_block_that_does_not_close_up_keeps_its_holes_but_goes_as_a_whole():
    _, rolling = held("llava-onevision")
    generator = torch.Generator().manual_seed(0)
    rolling.extend([block(generator, 4, compact=False) for _ in range(3)])
    some = torch.tensor([False, True, False, True])
    rolling.keep([torch.zeros(4, dtype=torch.bool), some, None])
    assert rolling.positions.tolist() == [[1, 3, 4, 5, 6, 7]]


def test_frames_with_one_origin_close_up_in_time():
    _, rolling = held("qwen2-vl")
    generator = torch.Generator().manual_seed(0)
    head = Block(torch.zeros(3, 64), torch.arange(3).expand(3, 3), 3, torch.zeros(3, dtype=torch.bool), torch.zeros(3))
    rolling.extend([head, *(block(generator, 4, axes=3, gap=gap) for gap in (0, 2, 5, 1))])
    assert rolling.positions[0, 3::4].tolist() == [3, 5, 10, 11]
    assert rolling.positions[1:, 3:].amin() == 3
    assert rolling.positions[1:, 3:].amax() == 4
    assert (rolling.next, rolling.end) == (5, 12)
    gone = torch.zeros(4, dtype=torch.bool)
    rolling.keep([None, gone, None, gone, None])
    # the second is first now, and the fourth follows it by its own step
    assert rolling.positions[0, 3::4].tolist() == [3, 4]
    rolling.extend([block(generator, 4, axes=3, gap=2)])
    assert rolling.positions[0, 3::4].tolist() == [3, 4, 6]


def test_a_stamp_goes_with_the_last_token_of_its_frame():
    _, rolling = held("qwen3-vl")
    generator = torch.Generator().manual_seed(0)
    rolling.extend([block(generator, 4, text=5, axes=3) for _ in range(2)])
    one = torch.tensor([True] * 5 + [False, False, False, True])
    rolling.keep([one, None])
    assert rolling.positions.shape == (3, 15)
    assert rolling.positions[:, 5].tolist() == [5, 6, 6]  # in its row and column
    none = torch.tensor([True] * 5 + [False])
    rolling.keep([none, None])
    assert rolling.positions.shape == (3, 9)
    assert rolling.positions[:, :5].tolist() == [list(range(5))] * 3


@pytest.mark.parametrize("rebuild", [True, False])
def test_aside_and_whole_put_everything_back(rebuild):
    _, rolling = held("qwen2-vl", rebuild)
    generator = torch.Generator().manual_seed(0)
    with rolling.aside():  # also when there was nothing
        rolling.extend([block(generator, 4, axes=3)])
    assert rolling.positions.shape == (3, 0)
    assert rolling.cache.get_seq_length() == 0
    rolling.extend([block(generator, 4, axes=3, gap=0), block(generator, 4, axes=3, gap=1)])

    def state():
        tensors = [t.clone() for layer in rolling.cache.layers for t in (layer.keys, layer.values)]
        return [rolling.positions.clone(), *tensors], (rolling.next, rolling.end, len(rolling.blocks), rolling.nbytes())

    before, numbers = state()

    def change():
        rolling.extend([block(generator, 3, axes=3)])
        rolling.keep([torch.zeros(4, dtype=torch.bool), None, None])

    with rolling.aside():
        change()
        assert len(rolling.blocks) == 2
        assert rolling.positions.shape == (3, 7)

    def fail():
        with rolling.whole():
            change()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    after, left = state()
    assert left == numbers
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    with rolling.whole():
        change()
    assert len(rolling.blocks) == 2
