"""Placements against naive loops over tokens."""

from __future__ import annotations

import pytest
import torch

from mmaccel import kernels
from mmaccel.tokens.place import Mix, Placement, Reduction, TokenMap, compact_positions, place


def token_map(layouts, position=None):
    """A map from strings, one a row: '.' padding, 't' text, 'n' a newline of item 0, digits a cell of that item."""
    B, S = len(layouts), len(layouts[0])
    item = torch.tensor([[int(c) if c.isdigit() else 0 if c == "n" else -1 for c in row] for row in layouts])
    cell = torch.full((B, S), -1)
    for b, row in enumerate(layouts):
        seen = {}
        for s, c in enumerate(row):
            if c.isdigit():
                cell[b, s] = seen[c] = seen.get(c, -1) + 1
    valid = torch.tensor([[c != "." for c in row] for row in layouts])
    if position is None:
        position = (valid.long().cumsum(1) - 1).masked_fill(~valid, 0)
    grid = torch.where(item >= 0, 0, -1)
    source = torch.arange(S).expand(B, S)
    return TokenMap(item, grid, cell, position, torch.ones(B, S), valid, source)


def cells(layout, digit):
    return torch.tensor([s for s, c in enumerate(layout) if c == str(digit)])


LEFT = ["..tt0000t11t", "tttttttttttt"]


def test_dropped_tokens_leave_and_useless_padding_goes():
    tokens = token_map(LEFT[:1])
    found = [
        (0, cells(LEFT[0], 0), Reduction(torch.tensor([1, 3]))),
        (0, cells(LEFT[0], 1), Reduction(torch.tensor([0]))),
    ]
    placement = place(tokens, found)
    assert placement.index.tolist() == [[2, 3, 5, 7, 8, 9, 11]]
    assert placement.valid.all()
    assert not placement.identity
    after = tokens.at(placement)
    assert after.source.tolist() == placement.index.tolist()
    assert after.cell.tolist() == [[-1, -1, 1, 3, -1, 0, -1]]
    assert after.cells(0, 0, 0).tolist() == [2, 3]


@pytest.mark.parametrize("left", [True, False])
def test_shorter_rows_are_filled_up_on_their_side(left):
    layouts = LEFT if left else ["tt0000t11t..", "tttttttttttt"]
    tokens = token_map(layouts)
    found = [(0, cells(layouts[0], 0), Reduction(torch.tensor([0])))]
    placement = place(tokens, found, pad_left=left)
    kept = [s for s, c in enumerate(layouts[0]) if c != "." and s not in cells(layouts[0], 0)[1:].tolist()]
    n = len(kept)
    row = placement.index[0, -n:] if left else placement.index[0, :n]
    assert row.tolist() == kept
    assert placement.valid.sum(1).tolist() == [n, 12]
    assert placement.valid[0, -1 if left else 0]
    assert placement.index[1].tolist() == list(range(12))


def test_a_reduction_may_reorder_and_takes_the_places_of_its_survivors():
    layout = "t00000t"
    placement = place(token_map([layout]), [(0, cells(layout, 0), Reduction(torch.tensor([4, 0, 2])))])
    assert placement.index.tolist() == [[0, 5, 1, 3, 6]]


def test_without_reductions_it_is_the_identity():
    tokens = token_map(["tt000t", "t0000t"])
    placement = place(tokens, [])
    x = torch.randn(2, 6, 3)
    assert placement.identity
    assert torch.equal(placement.values(x), x)


def test_merged_values_sizes_and_shapes():
    layout = ".t0000t"
    tokens = token_map([layout, "tttt00t"])
    mix = Mix(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 3]), torch.tensor([0.25, 0.75, 0.5, 0.5]))
    found = [(0, cells(layout, 0), Reduction(torch.tensor([1, 2]), mix))]
    placement = place(tokens, found)
    x = torch.randn(2, 7, 3, dtype=torch.bfloat16)
    out, wide = placement.values(x), x.float()
    # row 0 keeps four tokens of seven and is filled up on the left
    assert placement.valid[0].tolist() == [False, False, False, True, True, True, True]
    assert torch.equal(out[0, 3], x[0, 1])
    torch.testing.assert_close(out[0, 4], (0.25 * wide[0, 2] + 0.75 * wide[0, 3]).bfloat16())
    torch.testing.assert_close(out[0, 5], (0.5 * wide[0, 4] + 0.5 * wide[0, 5]).bfloat16())
    assert torch.equal(out[1], x[1])
    assert tokens.at(placement).size[0, 3:].tolist() == [1, 2, 2, 1]


def random_case(seed, B=3, S=17, left=True):
    generator = torch.Generator().manual_seed(seed)
    layouts, found = [], []
    for row in range(B):
        n = int(torch.randint(8, S + 1, (), generator=generator))
        body = "t" + "0" * (n // 3) + "t" + "1" * (n - n // 3 - 3) + "t"
        layouts.append("." * (S - n) + body if left else body + "." * (S - n))
        for item in (0, 1):
            where = cells(layouts[-1], item)
            keep = torch.rand(len(where), generator=generator) < 0.5
            found.append((row, where, Reduction(keep.nonzero().squeeze(1))))
    return token_map(layouts), found


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("held", [0, 4])
def test_masks_rows_and_columns(held, kind, left):
    for seed in range(5):
        tokens, found = random_case(seed, left=left)
        placement = place(tokens, found, pad_left=left)
        B, S = tokens.valid.shape
        mask = torch.rand(B, 1, S, held + S) < 0.7
        given = mask if kind == "bool" else torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        out = placement.mask(given, held)
        seen = out if kind == "bool" else out > -1
        for b in range(B):
            for i, old_row in enumerate(placement.index[b].tolist()):
                for j in range(held):
                    assert seen[b, 0, i, j] == mask[b, 0, old_row, j]
                for j, old_column in enumerate(placement.index[b].tolist()):
                    want = bool(placement.valid[b, j]) and bool(mask[b, 0, old_row, held + old_column])
                    assert seen[b, 0, i, held + j] == want


def test_gathers_along_every_dimension():
    tokens, found = random_case(1)
    placement = place(tokens, found)
    B, S = tokens.valid.shape
    positions, cos, shared = torch.randn(3, B, S), torch.randn(B, S, 4), torch.randn(1, S, 4)
    for b in range(B):
        row = placement.index[b]
        assert torch.equal(placement.along(positions, -1)[:, b], positions[:, b, row])
        assert torch.equal(placement.along(cos, 1)[b], cos[b, row])
        assert torch.equal(placement.along(shared, 1)[b], shared[0, row])


def test_several_tensors_move_at_once():
    tokens, found = random_case(2)
    placement = place(tokens, found)
    B, S = tokens.valid.shape
    x, table, positions = torch.randn(B, S, 3, 2), torch.randn(1, S, 4), torch.randn(3, B, S)
    with kernels.recording() as ran:
        moved = placement.together(rows=[x, table], columns=[positions])
    assert [event.op for event in ran] == ["gather_compact"]
    singly = placement.along(x, 1), placement.along(table, 1), placement.along(positions, -1)
    for got, one in zip(moved, singly, strict=True):
        assert torch.equal(got, one)
    assert placement.together() == ()


def test_the_map_and_the_values_move_at_once_and_every_item_is_mixed():
    layouts = [".t0000t", "tt11111", "ttttttt"]
    tokens = token_map(layouts)
    mixes = [
        Mix(torch.tensor([1, 1, 0]), torch.tensor([3, 0, 2]), torch.tensor([0.25, 0.75, 2.0])),
        # a token may go to several others
        Mix(torch.tensor([1, 0, 1]), torch.tensor([4, 4, 0]), torch.tensor([0.5, 1.0, 0.5])),
    ]
    kept = [torch.tensor([1, 2]), torch.tensor([0, 4])]
    found = [(b, cells(layouts[b], b), Reduction(kept[b], mixes[b])) for b in (0, 1)]
    placement = place(tokens, found)
    x = torch.randn(3, 7, 5)
    with kernels.recording() as ran:
        after, (values,) = placement.carry(tokens, x)
    assert [event.op for event in ran] == ["gather_compact", "scatter_merge"]
    for b in range(3):
        expected = [x[b, i] for i in placement.index[b].tolist()]
        if b < 2:
            slots = sorted(cells(layouts[b], b)[kept[b]].tolist())
            places = [placement.index[b].tolist().index(slot) for slot in slots]
            for m in range(2):
                mix, columns = mixes[b], cells(layouts[b], b)
                chosen = [i for i in range(3) if mix.rows[i] == m]
                expected[places[m]] = sum(mix.weights[i] * x[b, columns[mix.cols[i]]] for i in chosen)
        torch.testing.assert_close(values[b], torch.stack(expected))
    assert torch.equal(values, placement.values(x))
    alone = tokens.at(placement)
    for name, value in vars(after).items():
        assert torch.equal(value, getattr(alone, name))
    assert after.size[0, -3:].tolist() == [1, 2, 1]


def test_consecutive_positions_and_their_shift():
    for seed in range(8):
        tokens, found = random_case(seed, left=seed % 2 == 0)
        moved = TokenMap(**{**vars(tokens), "position": tokens.position + 5})
        placement = place(tokens, found, pad_left=seed % 2 == 0)
        positions, shift = compact_positions(moved, placement)
        for b in range(len(shift)):
            n = int(placement.valid[b].sum())
            assert positions[b, placement.valid[b]].tolist() == list(range(5, 5 + n))
            assert int(shift[b]) == int(tokens.valid[b].sum()) - n


def mrope(layout, frames, H, W):
    """Ids [3, S] of one row as the library makes them: text counts up, a run of H x W x frames takes max(H, W)."""
    ids, at, s = torch.zeros(3, len(layout), dtype=torch.int64), 0, 0
    while s < len(layout):
        if layout[s] == ".":
            s += 1
        elif layout[s] == "t":
            ids[:, s] = at
            at, s = at + 1, s + 1
        else:
            for k in range(frames * H * W):
                ids[:, s + k] = torch.tensor([at + 2 * (k // (H * W)), at + k // W % H, at + k % W])
            at, s = at + max(H, W), s + frames * H * W
    return ids


@pytest.mark.parametrize("four", [False, True])
@pytest.mark.parametrize(
    ("kept", "behind", "shift"),
    [
        (range(24), 6, 0),
        ([0, 1, 12, 13], 4, 2),  # x shrinks from 4 to 2, y from 3 to 1: the run takes 2 positions
        ([20], 5, 1),  # cell (2, 0): its largest axis is y = 2, so three positions are left of four
        ([], 2, 4),
        ([3], 6, 0),
    ],
)
def test_multi_axis_positions_move_up_behind_a_run(kept, behind, shift, four):
    one = "tt" + "0" * 24 + "t" + "1" * 24 + "t"
    layouts = [one, "..." + "t" * (len(one) - 3)]
    ids = torch.stack([mrope(row, 2, 3, 4) for row in layouts], 1)
    if four:
        ids = torch.cat([torch.arange(len(one)).expand(1, 2, -1), ids])
    tokens = token_map(layouts, ids)
    kept = torch.tensor(list(kept), dtype=torch.int64)
    placement = place(tokens, [(0, cells(one, 0), Reduction(kept))])
    positions, shifts = compact_positions(tokens, placement)
    after = tokens.at(placement)
    # the second item keeps its 4 positions, so the text behind it comes 4 later than the text before it
    text = positions[-3:, 0, (after.item[0] == -1) & after.valid[0]]
    want = [0, 1, behind, behind + 5]
    assert text.tolist() == [want] * 3
    assert shifts.tolist() == [shift, 0]
    item = positions[-3:, 0, after.cells(0, 0, 0)]
    assert item.tolist() == ids[-3:, 0, cells(one, 0)[kept]].tolist()
    second = positions[-3:, 0, after.cells(0, 1, 0)] - behind - 1
    assert second.tolist() == (ids[-3:, 0, cells(one, 1)] - 7).tolist()
    assert torch.equal(positions[-3:, 1, placement.valid[1]], ids[-3:, 1, tokens.valid[1]])


def test_every_frame_between_time_stamps_is_a_run():
    layout = "t0000tt0000tt0000t"
    ids = mrope(layout, 1, 2, 2)[:, None]
    tokens = token_map([layout], ids)
    where = cells(layout, 0)
    # all of the first frame, one corner of the second, nothing of the third
    placement = place(tokens, [(0, where, Reduction(torch.tensor([0, 1, 2, 3, 4])))])
    positions, shift = compact_positions(tokens, placement)
    assert positions[0, 0].tolist() == [0, 1, 1, 1, 1, 3, 4, 5, 6, 7, 8]
    assert positions[2, 0].tolist() == [0, 1, 2, 1, 2, 3, 4, 5, 6, 7, 8]
    assert shift.tolist() == [1 + 2]


def test_a_visual_token_at_the_very_start_counts_as_alive():
    layout = "0000t"
    ids = mrope(layout, 1, 2, 2)[:, None]
    tokens = token_map([layout, "ttttt"], ids.expand(3, 2, 5))
    placement = place(tokens, [(0, cells(layout, 0), Reduction(torch.tensor([0])))])
    assert placement.valid[0].tolist() == [False, False, False, True, True]
    positions, shift = compact_positions(tokens, placement)
    assert positions[:, 0, -1].tolist() == [1, 1, 1]
    assert shift.tolist() == [1, 0]


def test_an_empty_mix_changes_nothing():
    none = Mix(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    x = torch.randn(4, 2)
    assert torch.equal(Reduction(torch.tensor([2, 0]), none).apply(x), x[[2, 0]])
    assert Placement(torch.arange(4)[None], torch.ones(1, 4, dtype=torch.bool), {}, 4).identity
