from __future__ import annotations

import math
import shutil

import pytest
import torch
from harness import DEVICE, DTYPES, covering, describe, gpu_only, strided

from mmaccel import kernels
from mmaccel.errors import MethodError, NotApplicableError
from mmaccel.kernels.pairwise_match import cpu, pairwise_match, reference

METRICS = ["cosine", "euclidean"]
BACKENDS = {"reference": reference.pairwise_match, "blocked": cpu.pairwise_match}


def rows(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def some(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > 0.4


def alike(u, v, metric):
    if metric == "euclidean":
        return -math.dist(u, v)
    return sum(x * y for x, y in zip(u, v, strict=True)) / (math.hypot(*u) * math.hypot(*v))


def naive(a, b, mask, metric, exclude_self):
    """Python numbers only: lists [B][N] of the first best row and its similarity."""
    index, value = [], []
    for i, item in enumerate(a.tolist()):
        index.append([]), value.append([])
        for n, row in enumerate(item):
            best, place = -math.inf, -1
            for m, other in enumerate(b[i].tolist()):
                if (mask is None or mask[i, m]) and not (exclude_self and m == n) and alike(row, other, metric) > best:
                    best, place = alike(row, other, metric), m
            index[-1].append(place), value[-1].append(best)
    return torch.tensor(index).reshape(a.shape[:2]), torch.tensor(value).reshape(a.shape[:2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("B", "N", "M", "D"), [(1, 1, 1, 1), (2, 5, 7, 3), (3, 9, 4, 6), (1, 3, 80, 2)])
def test_equals_the_loops(backend, metric, B, N, M, D):
    a, b = rows(B, N, D) + 1, rows(B, M, D, seed=1) + 1
    for mask in (None, some(B, M)):
        for exclude_self in (False, True):
            index, value = BACKENDS[backend](a, b, mask, metric == "euclidean", exclude_self)
            want_index, want_value = naive(a, b, mask, metric, exclude_self)
            assert torch.equal(index, want_index)
            torch.testing.assert_close(value, want_value.float())


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("block", "columns", "chunk"), [(9, 3, 2), (64, 16, 4), (300, 40, 8), (1 << 20, 2048, 64)])
def test_every_block_size_gives_the_reference(monkeypatch, metric, block, columns, chunk):
    for name, size in (("_BLOCK", block), ("_COLUMNS", columns), ("_CHUNK", chunk)):
        monkeypatch.setattr(cpu, name, size)
    for a, b, mask in exact_cases(metric):
        for exclude_self in (False, True):
            got = cpu.pairwise_match(a, b, mask, metric == "euclidean", exclude_self)
            want = reference.pairwise_match(a.double(), b.double(), mask, metric == "euclidean", exclude_self)
            assert torch.equal(got[0], want[0])
            torch.testing.assert_close(got[1], want[1])


def exact_cases(metric):
    """Inputs and masks full of ties, in which no sum is rounded: centres are means of 64 or 128 small whole numbers."""
    a, b = rows(3, 37, 4, dtype=torch.float32).mul(2).round(), rows(3, 128, 4, seed=1, dtype=torch.float32)
    b = b.mul(2).round()
    if metric == "cosine":  # of length 2 or 0
        a, b = a.sign().where(a != 0, 1), b.sign().where(b != 0, -1)
        a[0, 3] = b[0, 5] = 0
    half, none = torch.arange(128).expand(3, -1) % 4 > 1, torch.zeros(3, 128, dtype=torch.bool)
    return [
        (x.to(DEVICE), y.to(DEVICE), None if mask is None else mask.to(DEVICE))
        for x, y in ((a, b), (a[:1], b[:1]), (b, b))
        for mask in (None, half[: len(x)], none[: len(x)])
    ]


def check(a, b, mask, metric, exclude_self, got, want, slack):
    """The index is that of a row that may be chosen, as similar as the best one up to `slack`."""
    index, value = (x.cpu() for x in got)
    assert index.dtype == torch.int64
    assert value.dtype == torch.float32
    assert torch.equal(index < 0, want[0].cpu() < 0)
    assert value[index < 0].eq(-torch.inf).all()
    a, b = a.cpu().double(), b.cpu().double()
    mask = None if mask is None else mask.cpu()
    for i, n in (index >= 0).nonzero().tolist():
        m = int(index[i, n])
        assert mask is None or mask[i, m]
        assert not (exclude_self and m == n)
    chosen = b.gather(1, index.clamp_min(0)[..., None].expand(-1, -1, b.shape[-1]))
    if metric == "euclidean":
        exact = -torch.linalg.vector_norm(a - chosen, dim=-1)
    else:
        exact = torch.nn.functional.cosine_similarity(a, chosen, dim=-1, eps=1e-12)
    best = want[1].cpu().double()
    shown = index >= 0
    assert (exact - best)[shown].abs().max().item() <= slack + 1e-6 if shown.any() else True
    assert (value.double() - exact)[shown].abs().max().item() <= slack + 1e-6 if shown.any() else True


SHAPES = covering(
    N=[1, 7, 65, 129],
    M=[1, 7, 65, 129, 1100],
    D=[1, 24, 64, 72],
    metric=METRICS,
    mask=[False, True],
    exclude_self=[False, True],
    dtype=DTYPES,
    layout=["plain", "strided"],
)


@pytest.mark.parametrize("case", SHAPES, ids=describe)
def test_triton_finds_the_best_of_float64(on_triton, case):
    N, M, D, dtype = case["N"], case["M"], case["D"], case["dtype"]
    B = 1 if N * M > 5000 else 2
    a, b = (rows(B, N, D, dtype=dtype) + 0.5).to(DEVICE), (rows(B, M, D, seed=1, dtype=dtype) + 0.5).to(DEVICE)
    if case["layout"] == "strided":
        a, b = strided(a), strided(b)
    mask = some(B, M).to(DEVICE) if case["mask"] else None
    if mask is not None:
        mask[-1, : M // 3] = False
        b = b.masked_fill(~mask[..., None], torch.nan)
    got = pairwise_match(a, b, mask=mask, metric=case["metric"], exclude_self=case["exclude_self"])
    arguments = mask, case["metric"] == "euclidean", case["exclude_self"]
    want = reference.pairwise_match(a.double(), b.double(), *arguments)
    # sums of float32: the inputs are not rounded, whatever their dtype
    check(a, b, mask, case["metric"], case["exclude_self"], got, want, slack=4e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_triton_takes_the_first_of_exact_ties(on_triton, metric):
    for a, b, mask in exact_cases(metric):
        for exclude_self in (False, True):
            got = pairwise_match(a, b, mask=mask, metric=metric, exclude_self=exclude_self)
            want = reference.pairwise_match(a.double(), b.double(), mask, metric == "euclidean", exclude_self)
            assert torch.equal(got[0], want[0])
            torch.testing.assert_close(got[1], want[1])
    # the rows of b are divided among programs here
    b = torch.eye(4, device=DEVICE)[torch.arange(2048) % 4][None]
    assert pairwise_match(b[:, :9], b, metric=metric)[0].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 0]]
    index, _ = pairwise_match(b[:, :5], b, metric=metric, exclude_self=True)
    assert index.tolist() == [[4, 5, 6, 7, 0]]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("metric", METRICS)
def test_small_differences_of_large_numbers(nan_filled, backend, metric):
    far = torch.tensor([[[10000.0, 20000.0]]], device=DEVICE)
    a = far + torch.tensor([[0.25, 0.0], [0.0, 0.5]], device=DEVICE)
    b = far + torch.tensor([[0.5, 0.5], [0.0, 0.5], [0.25, 0.0]], device=DEVICE)
    with kernels.use(backend):
        index, value = pairwise_match(a, b, metric=metric)
    if metric == "euclidean":
        assert index.tolist() == [[2, 1]]
        assert value.eq(0).all()
    else:
        torch.testing.assert_close(value, torch.ones_like(value))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("metric", METRICS)
def test_nan_shows_unless_it_is_masked(nan_filled, backend, metric):
    a, b = rows(3, 5, 4, dtype=torch.float32).to(DEVICE), rows(3, 6, 4, seed=1, dtype=torch.float32).to(DEVICE)
    mask = torch.ones(3, 6, dtype=torch.bool, device=DEVICE)
    mask[:, 0] = mask[2] = False
    with kernels.use(backend):
        clean = pairwise_match(a, b, mask=mask, metric=metric)
        b[:, 0] = torch.nan
        a[2, 1] = torch.nan
        for got, want in zip(pairwise_match(a, b, mask=mask, metric=metric), clean, strict=True):
            torch.testing.assert_close(got, want)
        a[0, 2, 1], b[1, 3, 2], b[1, 5, 0] = torch.nan, torch.nan, torch.nan
        index, value = pairwise_match(a, b, mask=mask, metric=metric)
    assert value[0].isnan().tolist() == [False, False, True, False, False]
    assert index[0, 2] == 1
    assert torch.equal(index[0, [0, 1, 3, 4]], clean[0][0, [0, 1, 3, 4]])
    assert value[1].isnan().all()
    assert index[1].eq(3).all()
    assert value[2].eq(-torch.inf).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("metric", METRICS)
def test_nothing_to_choose(nan_filled, backend, metric):
    with kernels.use(backend):
        for B, N, M, D in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 1, 1, 4)):
            a, b = torch.zeros(B, N, D, device=DEVICE), torch.zeros(B, M, D, device=DEVICE)
            index, value = pairwise_match(a, b, metric=metric, exclude_self=N == 1)
            assert index.shape == value.shape == (B, N)
            assert index.eq(-1).all()
            assert value.eq(-torch.inf).all()
        zeros = torch.zeros(1, 2, 4, device=DEVICE)
        assert [x.tolist() for x in pairwise_match(zeros, zeros, metric=metric)] == [[[0, 0]], [[0.0, 0.0]]]


def test_memory_beyond_inputs_is_small():
    from test_attention_received import PeakMemory

    a, b = torch.zeros(1, 6000, 8), torch.zeros(1, 6000, 8)  # the matrix takes 144 MB
    mask = torch.arange(6000)[None] % 3 > 0
    for metric in METRICS:
        for given in (None, mask):
            with PeakMemory() as memory:
                pairwise_match(a, b, mask=given, metric=metric)
            assert 0 < memory.peak <= 10 * 2**20


def test_opcheck():
    a, b, mask = rows(2, 3, 4, dtype=torch.float32), rows(2, 5, 4, seed=1, dtype=torch.float32), some(2, 5)
    for given in (None, mask):
        for euclidean in (False, True):
            torch.library.opcheck(torch.ops.mmaccel.pairwise_match.default, (a, b, given, euclidean, not euclidean))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_to_one_graph(compiler):
    if compiler == "inductor" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("inductor needs a C++ compiler")
    torch.compiler.reset()
    a, b, mask = rows(2, 9, 4, dtype=torch.float32), rows(2, 5, 4, seed=1, dtype=torch.float32), some(2, 5)

    def call(a, b):
        index, value = pairwise_match(a * 2, b, mask=mask, metric="euclidean")
        return index + 1, value * 2

    got = torch.compile(call, fullgraph=True, backend=compiler)(a, b)
    for mine, want in zip(got, call(a, b), strict=True):
        torch.testing.assert_close(mine, want)


def test_wrong_arguments():
    a, b = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)
    for wrong in ((a[0], b), (a, b[:1]), (a, b[..., :3]), (a, b.double()), (a.int(), b.int())):
        with pytest.raises(MethodError):
            pairwise_match(*wrong)
    for wrong in ({"metric": "manhattan"}, {"mask": torch.ones(2, 5)}, {"mask": torch.ones(2, 3, dtype=torch.bool)}):
        with pytest.raises(MethodError):
            pairwise_match(a, b, **wrong)


def test_the_record_names_the_path(on_triton):
    a = torch.zeros(1, 2, 4, device=DEVICE)
    with kernels.recording() as events:
        pairwise_match(a, a)
        with kernels.use("torch"):
            pairwise_match(a, a)
    assert [(e.op, e.backend) for e in events] == [("pairwise_match", "triton"), ("pairwise_match", "torch")]
    with pytest.raises(NotApplicableError, match="float64"):
        pairwise_match(a.double(), a.double())


@pytest.mark.gpu
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("N", "M", "D"), [(729, 729, 1152), (6272, 6272, 896), (200, 50000, 64), (64, 300, 4096)])
def test_full_shapes_on_a_gpu(on_triton, metric, N, M, D):
    gpu_only()
    a, b = rows(2, N, D, dtype=torch.bfloat16).to(DEVICE), rows(2, M, D, seed=1, dtype=torch.bfloat16).to(DEVICE)
    index, value = pairwise_match(a, b, metric=metric)
    # the matrix of distances would not fit as differences
    exact = -torch.cdist(a.double(), b.double()) if metric == "euclidean" else None
    if exact is None:
        exact = torch.nn.functional.normalize(a.double(), dim=-1) @ torch.nn.functional.normalize(b.double(), dim=-1).mT
    best = exact.amax(-1)
    chosen = exact.gather(2, index[..., None])[..., 0]
    scale = 1 if metric == "cosine" else float(best.abs().max())
    assert (best - chosen).max() <= 2e-5 * scale
    assert (value - chosen).abs().max() <= 2e-5 * scale
