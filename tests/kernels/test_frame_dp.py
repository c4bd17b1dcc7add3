from __future__ import annotations

import itertools

import pytest
import torch
from harness import DEVICE, covering, describe, gpu_only

from mmaccel import kernels
from mmaccel.errors import MethodError, NotApplicableError
from mmaccel.kernels.frame_dp import cpu, frame_dp, reference, windows

BACKENDS = {"reference": reference.frame_dp, "vectorised": cpu.frame_dp}


def make(B, T, S, share=0.8, seed=0):
    """Positions that stand still for a while: each one at its own rate, so that runs of all lengths occur."""
    g = torch.Generator().manual_seed(seed)
    rate = (share + 0.3 * (torch.rand(B, 1, S, generator=g) - 0.5)).clamp(0, 1)
    return torch.rand(B, T - 1, S, generator=g) < rate


def saving(static, start, stop):
    """Tokens saved in frames start..stop-1 of static (T - 1, S), a nested list."""
    positions = len(static[0]) if static else 0
    still = sum(all(static[t][p] for t in range(start, stop - 1)) for p in range(positions))
    return (stop - 1 - start) * still


def naive(static, T, longest):
    """The program with windows of 2, 3, ... frames tried after "no window": starts and saved, Python numbers only."""
    best, starts = [], []
    for j in range(T):
        top, first = (best[j - 1] if j else 0), j
        for w in range(2, min(j + 1, longest) + 1):
            i = j - w + 1
            total = (best[i - 1] if i else 0) + saving(static, i, j + 1)
            if total > top:
                top, first = total, i
        best.append(top)
        starts.append(first)
    return starts, best[-1]


def by_force(static, T, longest):
    best = 0
    for cuts in itertools.product([False, True], repeat=T - 1):
        edges = [0, *(t + 1 for t, cut in enumerate(cuts) if cut), T]
        spans = list(itertools.pairwise(edges))
        if all(stop - start <= longest for start, stop in spans):
            best = max(best, sum(saving(static, start, stop) for start, stop in spans))
    return best


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("longest", [1, 2, 3, 10])
def test_equals_the_loops_and_every_partition(backend, longest):
    for T, seed in itertools.product((1, 2, 3, 6, 9), range(3)):
        static = make(2, T, 5, 0.5 + 0.2 * seed, seed)
        starts, saved, window = BACKENDS[backend](static, longest)
        for b in range(2):
            want, most = naive(static[b].tolist(), T, longest)
            assert starts[b].tolist() == want
            assert int(saved[b]) == most == by_force(static[b].tolist(), T, longest)
            found = windows(starts)[b]
            assert [t for start, stop in found for t in range(start, stop)] == list(range(T))
            assert all(stop - start <= longest for start, stop in found)
            assert sum(saving(static[b].tolist(), *span) for span in found) == most
            numbers = [n for n, (start, stop) in enumerate(found) for _ in range(start, stop)]
            assert window[b].tolist() == numbers


def test_of_equal_windows_the_shortest_is_taken():
    # either pair of frames saves one token, and all three together none
    static = torch.tensor([[[True, False], [False, True]]])
    got = frame_dp(static)
    assert got.starts.tolist() == [[0, 0, 2]]
    assert got.saved.tolist() == [1]
    assert got.window.tolist() == [[0, 0, 1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_video_that_stands_still_or_never_does(backend):
    for longest, starts, saved in ((9, [0] * 6, 35), (2, [0, 0, 2, 2, 4, 4], 21), (1, [0, 1, 2, 3, 4, 5], 0)):
        got = BACKENDS[backend](torch.ones(1, 5, 7, dtype=torch.bool), longest)
        assert int(got[1]) == saved
        if longest != 2:
            assert got[0].tolist() == [starts]
        else:
            assert windows(got[0]) == [[(0, 2), (2, 4), (4, 6)]]
    got = BACKENDS[backend](torch.zeros(1, 5, 7, dtype=torch.bool), 9)
    assert got[0].tolist() == got[2].tolist() == [list(range(6))]
    assert int(got[1]) == 0


@pytest.mark.parametrize("T", [32, 70])
def test_vectorised_equals_the_reference_on_longer_videos(T):
    for share, longest in itertools.product((0.3, 0.9, 0.99), (7, T - 1, 1024)):
        static = make(2, T, 23, share)
        for got, want in zip(cpu.frame_dp(static, longest), reference.frame_dp(static, longest), strict=True):
            assert torch.equal(got, want)


def test_a_batch_equals_single_items_and_padding_changes_nothing():
    lengths = (4, 9, 6)
    items = [make(1, T, 8, 0.7, seed=T) for T in lengths]
    for side in ("left", "right"):
        static = torch.ones(3, 8, 8, dtype=torch.bool)
        mask = torch.zeros(3, 9, 8, dtype=torch.bool)
        for b, (T, item) in enumerate(zip(lengths, items, strict=True)):
            first = 9 - T if side == "left" else 0
            static[b, first : first + T - 1], mask[b, first : first + T] = item[0], True
        got = frame_dp(static, mask=mask)
        for b, (T, item) in enumerate(zip(lengths, items, strict=True)):
            first = 9 - T if side == "left" else 0
            alone = frame_dp(item)
            assert torch.equal(got.starts[b, first : first + T] - first, alone.starts[0])
            assert torch.equal(got.window[b, first : first + T] - first, alone.window[0])
            assert got.saved[b] == alone.saved[0]


def check(static, longest):
    got = torch.ops.mmaccel.frame_dp(static.to(DEVICE), longest)
    for have, want in zip(got, cpu.frame_dp(static, longest), strict=True):
        assert torch.equal(have.cpu(), want)


SHAPES = covering(
    T=[1, 2, 7, 33, 65], S=[0, 1, 7, 65, 129], B=[1, 2], longest=[1, 2, 8, 1024], share=[0.5, 0.9, 1.3], layout=[0, 1]
)


@pytest.mark.parametrize("case", SHAPES, ids=describe)
def test_triton_equals_torch(on_triton, case):
    static = make(case["B"], case["T"], case["S"], case["share"])
    if case["layout"]:
        wide = torch.ones(case["B"], case["S"], 2 * (case["T"] - 1), dtype=torch.bool)
        wide[..., ::2] = static.mT
        static = wide[..., ::2].mT
    check(static, min(case["longest"], case["T"]))


def test_triton_on_many_frames_and_none(on_triton):
    check(make(1, 140, 2, 0.97), 140)
    check(torch.zeros(0, 3, 5, dtype=torch.bool), 4)
    check(torch.zeros(2, 0, 5, dtype=torch.bool), 1)


def test_triton_counts_in_64_bits_where_32_are_not_enough(on_triton):
    from mmaccel.kernels.frame_dp import triton

    counts = torch.full((1, 3, 3), 2**30, dtype=torch.int32, device=DEVICE)
    starts, saved, window = (torch.empty(shape, dtype=torch.int64, device=DEVICE) for shape in ((1, 4), (1,), (1, 4)))
    triton._program_kernel[(1,)](counts, starts, saved, window, 4, 3, WIDE=True, BJ=16)
    assert saved.tolist() == [3 * 2**30]


def test_wrong_arguments():
    static = make(2, 4, 3)
    for given in (static[0], static.float(), static.int()):
        with pytest.raises(MethodError, match="static must be bool"):
            frame_dp(given)
    with pytest.raises(MethodError, match="longest=0"):
        frame_dp(static, 0)
    for mask in (torch.ones(2, 3, 3, dtype=torch.bool), torch.ones(2, 4, 3)):
        with pytest.raises(MethodError, match="mask must be bool"):
            frame_dp(static, mask=mask)
    with pytest.raises(MethodError, match="starts must be"):
        windows(torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize(("B", "T", "S"), [(2, 5, 3), (1, 1, 3), (1, 4, 0)])
def test_opcheck(B, T, S):
    torch.library.opcheck(torch.ops.mmaccel.frame_dp.default, (make(B, T, S), 3))


def test_compiles_to_one_graph():
    static, mask = make(2, 6, 4), torch.ones(2, 6, 4, dtype=torch.bool)

    def cut(static, mask):
        got = frame_dp(static, 4, mask)
        return got.starts + got.window + got.saved[:, None]

    compiled = torch.compile(cut, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(static, mask), cut(static, mask))


def test_the_record_and_the_limit_of_the_kernel(on_triton):
    from mmaccel.kernels import frame_dp as module

    with kernels.recording() as events:
        frame_dp(make(1, 3, 2).to(DEVICE))
        with kernels.use("torch"):
            frame_dp(make(1, 3, 2))
    assert [event.backend for event in events] == ["triton", "torch"]
    with pytest.raises(NotApplicableError, match="is above 8192"):
        frame_dp(torch.zeros(1, module._MAX_FRAMES, 0, dtype=torch.bool, device=DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize(("B", "T", "S"), [(4, 32, 196), (2, 256, 196), (1, 1024, 729), (1, 5000, 16)])
def test_full_shapes_on_a_gpu(on_triton, B, T, S):
    gpu_only()
    for share, longest in ((0.8, T), (0.99, T), (0.95, 16)):
        check(make(B, T, S, share), longest)
