from __future__ import annotations

import math

import pytest
import torch
from harness import DEVICE, DTYPES, covering, describe, gpu_only, strided

from mmaccel import kernels
from mmaccel.errors import MethodError, NotApplicableError
from mmaccel.kernels.greedy_diverse import cpu, greedy_diverse, reference
from mmaccel.kernels.greedy_diverse import triton as on_gpu

RULES = ["mmr", "dpp", "farthest"]


def features(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def qualities(*shape, seed=1, dtype=torch.float64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) + 0.1


def some(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > 0.4


def cosine(u, v):
    return sum(x * y for x, y in zip(u, v, strict=True)) / (math.hypot(*u) * math.hypot(*v))


def determinant(matrix):
    """By elimination, on lists."""
    matrix, product = [list(row) for row in matrix], 1.0
    for i in range(len(matrix)):
        at = max(range(i, len(matrix)), key=lambda r: abs(matrix[r][i]))
        if matrix[at][i] == 0:
            return 0.0
        if at != i:
            matrix[i], matrix[at], product = matrix[at], matrix[i], -product
        product *= matrix[i][i]
        for r in range(i + 1, len(matrix)):
            share = matrix[r][i] / matrix[i][i]
            matrix[r] = [x - share * y for x, y in zip(matrix[r], matrix[i], strict=True)]
    return product


def naive(x, k, method, scores, eligible, balance):
    """The picks of one item, in order, with Python numbers only."""
    x, picked = x.tolist(), []
    scores = [1.0] * len(x) if scores is None else scores.tolist()

    def worth(token):
        if method == "dpp":
            both = [*picked, token]
            # a token is as like itself as any other, to the last bit
            like = [[1.0 if p == q else cosine(x[p], x[q]) for q in both] for p in both]
            return determinant(
                [[scores[p] * scores[q] * like[i][j] for j, q in enumerate(both)] for i, p in enumerate(both)]
            )
        if method == "mmr":
            if not picked:
                return scores[token]
            return balance * scores[token] - (1 - balance) * max(cosine(x[token], x[j]) for j in picked)
        return -max((cosine(x[token], x[j]) for j in picked or eligible if j != token), default=-math.inf)

    for _ in range(min(k, len(eligible))):
        rest = [i for i in eligible if i not in picked]
        values = [worth(i) for i in rest]
        picked.append(rest[values.index(max(values))])
    return picked


def lists(picks, counts):
    assert picks.dtype == counts.dtype == torch.int64
    rows = []
    for row, count in zip(picks.tolist(), counts.tolist(), strict=True):
        assert row[count:] == [-1] * (len(row) - count)
        rows.append(row[:count])
    return rows


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("block", [1, 1 << 24])
@pytest.mark.parametrize(("B", "N", "D"), [(1, 1, 1), (2, 8, 9), (3, 7, 12)])
def test_equals_the_loops(monkeypatch, method, block, B, N, D):
    monkeypatch.setattr(reference, "_BLOCK", block)
    x, quality = features(B, N, D), qualities(B, N)
    counts = torch.tensor([5, 3, 0])[:B]
    given = {"farthest": (None,), "mmr": (quality,), "dpp": (None, quality)}[method]
    for mask in (None, some(B, N)):
        for scores in given:
            for k in (4, counts):
                for balance in (0.0, 0.3, 1.0) if method == "mmr" else (0.5,):
                    got = lists(*greedy_diverse(x, k, method=method, scores=scores, mask=mask, balance=balance))
                    for b in range(B):
                        eligible = [i for i in range(N) if mask is None or mask[b, i]]
                        own = None if scores is None else scores[b]
                        wanted = k if isinstance(k, int) else int(k[b])
                        # a distance that the first two share has no winner but by rounding
                        if method == "farthest" and len(eligible) > 1:
                            want = naive_from(x[b], got[b], min(wanted, len(eligible)), eligible)
                        else:
                            want = naive(x[b], wanted, method, own, eligible, balance)
                        assert got[b] == want


def naive_from(x, got, k, eligible):
    """The picks of farthest, after the first one of `got` was found to be one of the two that are most alone."""
    if k == 0:
        return []
    rows = x.tolist()
    alone = {i: -max(cosine(rows[i], rows[j]) for j in eligible if j != i) for i in eligible}
    assert alone[got[0]] == pytest.approx(max(alone.values()), abs=1e-6)
    picked = [got[0]]
    while len(picked) < k:
        rest = [i for i in eligible if i not in picked]
        picked.append(max(rest, key=lambda i: -max(cosine(rows[i], rows[j]) for j in picked)))
    return picked


@pytest.mark.parametrize("method", ["mmr", "farthest"])
@pytest.mark.parametrize(("held", "ahead", "block"), [(1 << 24, 64, 1 << 22), (0, 64, 1), (300, 3, 100), (1, 1, 7)])
def test_similarities_computed_ahead_change_no_choice(monkeypatch, method, held, ahead, block):
    monkeypatch.setattr(cpu, "_HELD", held)
    monkeypatch.setattr(cpu, "_AHEAD", ahead)
    monkeypatch.setattr(cpu, "_BLOCK", block)
    few = features(2, 9, 6)
    shots = few[:, torch.arange(60) % 9] + 0.05 * features(2, 60, 6, seed=3)  # few kinds of tokens: guesses miss
    for x, mask in ((features(2, 60, 6), None), (shots, some(2, 60)), (shots[:, :1], None), (shots[:, :2], None)):
        scores = qualities(*x.shape[:2])
        free = [[i for i in range(x.shape[1]) if mask is None or mask[b, i]] for b in range(len(x))]
        k = torch.tensor([len(free[0]), 5])
        got = lists(*greedy_diverse(x, k, method=method, scores=scores if method == "mmr" else None, mask=mask))
        for b, wanted in enumerate(k.tolist()):
            n = min(wanted, len(free[b]))
            if method == "farthest" and len(free[b]) > 1:
                assert got[b] == naive_from(x[b], got[b], n, free[b])
            else:
                assert got[b] == naive(x[b], n, method, scores[b], free[b], 0.5)


def test_two_that_are_most_alone_begin_with_the_lower():
    x = features(1, 400, 8, dtype=torch.float32)
    x[0, 250], x[0, 70] = 0, 0
    x[0, 250, 0], x[0, 70, 0], x[0, 70, 1] = 1, 1, 0.2
    x[0, torch.arange(400)[None].ne(torch.tensor([[70], [250]])).all(0), :2] = 0
    x[0, 300] = x[0, 301]
    alone = cpu.alone(x, torch.ones(1, 400, dtype=torch.bool))
    assert alone[0, 70] == alone[0, 250]
    unit = torch.nn.functional.normalize(x[0].double(), dim=-1)
    want = -(unit @ unit.mT).fill_diagonal_(-torch.inf).amax(1)
    torch.testing.assert_close(alone[0].double(), want, atol=1e-6, rtol=0)


SHAPES = covering(
    N=[1, 7, 65, 129, 300],
    D=[8, 72],
    k=[1, 5, "each", "all"],
    method=RULES,
    scored=[False, True],
    mask=[None, "holes", "nan"],
    dtype=DTYPES,
    layout=["plain", "strided"],
)
SHAPES = [c for c in SHAPES if not (c["method"] == "farthest" and c["scored"])]


def follows_the_rule(x, picks, counts, method, scores, mask, balance, slack):
    """Every pick is, in float64, as good as the best that was left, up to `slack`, given those before it."""
    x, (B, N) = x.cpu().double(), x.shape[:2]
    scores = torch.ones(B, N, dtype=torch.float64) if scores is None else scores.cpu().double()
    for b, row in enumerate(lists(picks, counts)):
        free = torch.ones(N, dtype=torch.bool) if mask is None else mask[b].cpu().clone()
        assert len(set(row)) == len(row)
        unit = torch.nn.functional.normalize(x[b].masked_fill(~free[:, None], 0), dim=-1)
        gram = unit @ unit.mT
        alone = gram.masked_fill(~free | torch.eye(N, dtype=torch.bool), -torch.inf).amax(1)
        for place, pick in enumerate(row):
            before = row[:place]
            if method == "dpp":
                own = scores[b] ** 2
                kernel = gram * scores[b] * scores[b][:, None]
                cross = kernel[before]
                left = own - (cross * (torch.linalg.pinv(kernel[before][:, before]) @ cross)).sum(0)
                # what is left of a token below 1e-5 of its own square counts as nothing
                worth = left.where(left > 3e-5 * own, 0)
            elif before:
                nearest = gram[:, before].amax(1)
                worth = -nearest if method == "farthest" else balance * scores[b] - (1 - balance) * nearest
            else:
                worth = scores[b] if method == "mmr" else -alone
            worth = worth.masked_fill(~free, -torch.inf)
            assert free[pick]
            assert worth[pick] == worth.max() or worth.max() - worth[pick] <= slack
            free[pick] = False


@pytest.mark.parametrize("case", SHAPES, ids=describe)
def test_triton_follows_the_rule(on_triton, case):
    N, method, dtype = case["N"], case["method"], case["dtype"]
    B = 3 if N < 100 else 1
    x = features(B, N, case["D"], dtype=dtype).to(DEVICE)
    scores = qualities(B, N, dtype=dtype).to(DEVICE) if case["scored"] or method == "mmr" else None
    mask = None if case["mask"] is None else some(B, N).to(DEVICE)
    if case["layout"] == "strided":
        x = strided(x)
    if case["mask"] == "nan":
        x = x.masked_fill(~mask[..., None], torch.nan)
    k = {"each": torch.arange(B) * min(2, N), "all": min(N, 40)}.get(case["k"], case["k"])
    got = greedy_diverse(x, k, method=method, scores=scores, mask=mask, balance=0.4)
    available = torch.full((B,), N) if mask is None else mask.sum(1).cpu()
    assert torch.equal(got[1].cpu(), torch.minimum(torch.as_tensor(k), available))
    follows_the_rule(x, *got, method, scores, mask, 0.4, slack=3e-5 if method == "dpp" else 3e-6)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("method", RULES)
def test_ties_go_to_the_lower_position(nan_filled, backend, method):
    x = torch.eye(4, device=DEVICE)[torch.tensor([0, 1, 0, 2, 1, 3, 3, 2])][None].expand(2, -1, -1)
    scores = None if method == "farthest" else torch.ones(2, 8, device=DEVICE)
    with kernels.use(backend):
        got = greedy_diverse(x, torch.tensor([8, 5]), method=method, scores=scores)
        assert lists(*got) == [[0, 1, 3, 5, 2, 4, 6, 7], [0, 1, 3, 5, 2]]
        zeros = torch.zeros(1, 3, 4, device=DEVICE)
        given = None if scores is None else scores[:1, :3]
        assert lists(*greedy_diverse(zeros, 3, method=method, scores=given)) == [[0, 1, 2]]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_dpp_weighs_quality_and_goes_by_position_beyond_the_rank(nan_filled, backend):
    x = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 3.0]]], device=DEVICE)
    with kernels.use(backend):
        assert lists(*greedy_diverse(x, 5, method="dpp")) == [[0, 2, 1, 3, 4]]
        scores = torch.tensor([[0.0, 0.5, 1.0, -torch.inf, 2.0]], device=DEVICE)
        assert lists(*greedy_diverse(x, 5, method="dpp", scores=scores)) == [[4, 1, 0, 2]]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("method", RULES)
def test_an_item_that_is_not_finite_gets_no_picks(nan_filled, backend, method):
    x, scores = features(4, 6, 3, dtype=torch.float32).to(DEVICE), qualities(4, 6, dtype=torch.float32).to(DEVICE)
    mask = torch.ones(4, 6, dtype=torch.bool, device=DEVICE)
    mask[2, 0] = False
    scores = None if method == "farthest" else scores
    with kernels.use(backend):
        clean = greedy_diverse(x, 3, method=method, scores=scores, mask=mask)
        x[1, 2, 0], x[2, 0] = torch.inf, torch.nan
        picks, counts = greedy_diverse(x, 3, method=method, scores=scores, mask=mask)
        assert counts.tolist() == [3, 0, 3, 3]
        assert picks[1].eq(-1).all()
        keep = [0, 2, 3]
        assert torch.equal(picks[keep], clean[0][keep])
        if scores is not None:
            scores[0, 0], scores[3, 1] = torch.nan, torch.inf
            assert greedy_diverse(x, 3, method=method, scores=scores, mask=mask)[1].tolist() == [0, 0, 3, 0]
            scores[2, 1] = -1
            counts = greedy_diverse(x, 3, method=method, scores=scores, mask=mask)[1]
            assert counts[2] == (0 if method == "dpp" else 3)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("method", RULES)
def test_nothing_to_choose(nan_filled, backend, method):
    with kernels.use(backend):
        for B, N, k in ((0, 3, 2), (2, 0, 2), (2, 3, 0), (2, 3, torch.tensor([0, 0]))):
            x = torch.ones(B, N, 4, device=DEVICE)
            scores = None if method == "farthest" else torch.ones(B, N, device=DEVICE)
            picks, counts = greedy_diverse(x, k, method=method, scores=scores)
            assert picks.numel() == 0
            assert counts.tolist() == [0] * B
        x = torch.ones(2, 3, 4, device=DEVICE)
        mask = torch.tensor([[False] * 3, [False, True, False]], device=DEVICE)
        scores = None if method == "farthest" else torch.ones(2, 3, device=DEVICE)
        assert lists(*greedy_diverse(x, 2, method=method, scores=scores, mask=mask)) == [[], [1]]


def test_a_limit_saves_the_look_at_k():
    x, k = features(3, 6, 4), torch.tensor([1, 5, 3])
    assert greedy_diverse(x, k, method="farthest")[0].shape == (3, 5)
    whole = greedy_diverse(x, k, method="farthest", limit=9)
    assert whole[0].shape == (3, 6)
    assert whole[1].tolist() == [1, 5, 3]
    picks, counts = greedy_diverse(x, k, method="farthest", limit=2)
    assert torch.equal(picks[1:], whole[0][1:, :2])
    assert counts.tolist() == [1, 2, 2]
    assert greedy_diverse(x, 99, method="farthest")[0].shape == (3, 6)


def test_triton_in_groups_of_items(on_triton):
    x, scores = features(5, 9, 12, dtype=torch.float32).to(DEVICE), qualities(5, 9, dtype=torch.float32).to(DEVICE)
    counts, eligible = torch.tensor([4, 0, 9, 1, 5], device=DEVICE), torch.ones(5, 9, dtype=torch.bool, device=DEVICE)
    for method in RULES:
        given = x, scores, eligible, counts, 9, method, 0.5
        once = on_gpu.greedy_diverse(*given, 1 << 20)
        assert torch.equal(on_gpu.greedy_diverse(*given, 2 * 81), once)
        assert torch.equal(reference.greedy_diverse(*given, 1), once)


def test_mmr_in_one_round_is_the_order_of_scores():
    x, scores = features(2, 9, 4), qualities(2, 9)
    got, counts = greedy_diverse(x, 5, scores=scores, per_round=7, balance=0.0)
    assert torch.equal(got, scores.argsort(1, descending=True)[:, :5])
    assert counts.tolist() == [5, 5]
    first = greedy_diverse(x, 4, scores=scores, per_round=2)[0]
    assert torch.equal(first[:, :2], got[:, :2])


def test_opcheck():
    x, scores = features(2, 5, 4, dtype=torch.float32), qualities(2, 5, dtype=torch.float32)
    for method in RULES:
        arguments = x, scores, some(2, 5), torch.tensor([2, 1]), 3, method, 0.5, 1
        torch.library.opcheck(torch.ops.mmaccel.greedy_diverse.default, arguments)


@pytest.mark.parametrize("method", RULES)
def test_compiles_to_one_graph(method):
    torch.compiler.reset()
    x, scores = features(2, 9, 4, dtype=torch.float32), qualities(2, 9, dtype=torch.float32)

    def call(x, k):
        picks, counts = greedy_diverse(x, k, method=method, scores=None if method == "farthest" else scores)
        return picks, counts + 0

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for mine, want in zip(compiled(x, 4), call(x, 4), strict=True):
        assert torch.equal(mine, want)
    k = torch.tensor([3, 2])
    picks, counts = compiled(x, k)
    assert picks.shape == (2, 9)
    assert lists(picks, counts) == lists(*call(x, k))


def test_wrong_arguments():
    x, scores = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    wrong = [
        {"method": "random"},
        {"method": "mmr"},
        {"method": "farthest", "scores": scores},
        {"scores": scores[:1]},
        {"scores": scores.int()},
        {"scores": scores, "balance": 1.5},
        {"scores": scores, "per_round": 0},
        {"method": "dpp", "per_round": 2},
        {"method": "dpp", "mask": torch.ones(2, 3)},
        {"method": "dpp", "mask": torch.ones(2, 4, dtype=torch.bool)},
        {"method": "dpp", "limit": -1},
    ]
    for arguments in wrong:
        with pytest.raises(MethodError):
            greedy_diverse(x, 1, **arguments)
    for k in (-1, 1.5, True, torch.tensor(1), torch.tensor([1, 1, 1]), torch.tensor([1.0, 1.0])):
        with pytest.raises(MethodError):
            greedy_diverse(x, k, method="dpp")
    for bad in (x[0], x.int()):
        with pytest.raises(MethodError):
            greedy_diverse(bad, 1, method="dpp")


def test_the_record_names_the_path_and_the_reason(on_triton, monkeypatch):
    x, scores = torch.zeros(1, 4, 2, device=DEVICE), torch.zeros(1, 4, device=DEVICE)
    with kernels.recording() as events:
        greedy_diverse(x, 2, scores=scores)
        with kernels.use("torch"):
            greedy_diverse(x, 2, method="farthest")
    paths = [(e.op, e.backend) for e in events]
    nearest = [] if x.device.type == "cpu" else [("pairwise_match", "torch")]
    assert paths == [("greedy_diverse", "triton"), *nearest, ("greedy_diverse", "torch")]
    with pytest.raises(NotApplicableError, match="per_round=2"):
        greedy_diverse(x, 2, scores=scores, per_round=2)
    with pytest.raises(NotApplicableError, match="float64"):
        greedy_diverse(x, 2, scores=scores.double())
    monkeypatch.setattr("mmaccel.kernels.greedy_diverse._LARGEST", 15)
    with pytest.raises(NotApplicableError, match="4 tokens"):
        greedy_diverse(x, 2, scores=scores)


@pytest.mark.gpu
@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize(("B", "N", "D", "k"), [(32, 729, 1152, 128), (1, 6272, 896, 600), (2, 3000, 64, 300)])
def test_full_shapes_on_a_gpu(on_triton, method, B, N, D, k):
    gpu_only()
    x = features(B, N, D, dtype=torch.bfloat16).to(DEVICE)
    scores = None if method == "farthest" else qualities(B, N, dtype=torch.bfloat16).to(DEVICE)
    mask = some(B, N).to(DEVICE)
    picks, counts = greedy_diverse(x, k, method=method, scores=scores, mask=mask)
    assert counts.eq(k).all()
    # the check solves for every pick anew
    few = picks[:1, :40], counts[:1].clamp(max=40)
    follows_the_rule(x[:1], *few, method, None if scores is None else scores[:1], mask[:1], 0.5, slack=1e-4)
