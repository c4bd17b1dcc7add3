from __future__ import annotations

import itertools
import math
import weakref

import pytest
import torch
from harness import DEVICE, DTYPES, as_good_as, covering, describe, gpu_only, strided
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmaccel import kernels
from mmaccel.errors import MethodError, NotApplicableError
from mmaccel.kernels.frame_change import cpu, frame_change, reference
from mmaccel.kernels.frame_change.reference import measured

BACKENDS = {"reference": reference.frame_change, "blocked": cpu.frame_change}
MEASURES = ["cosine", "similarity", "l1", "l2"]


def make(B, T, S, D, dtype=torch.float64, seed=0):
    """Frames that drift, of which every third one stands still."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, S, D, generator=g, dtype=torch.float64)
    x = (x[:, :1] + 0.3 * x.cumsum(1)).to(dtype)
    x[:, 2::3] = x[:, 1::3][:, : x[:, 2::3].shape[1]]
    return x


def given(B, S, D, dtype=torch.float64, seed=5):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(B, S, D, generator=g, dtype=torch.float64).to(dtype), torch.rand(B, S, generator=g) > 0.4


def masked(B, T, S, seed=6):
    return torch.rand(B, T, S, generator=torch.Generator().manual_seed(seed)) > 0.3


def distance(now, before, measure):
    """Two lists of Python numbers."""
    if measure in ("cosine", "similarity"):
        norms = math.sqrt(sum(a * a for a in now)) * math.sqrt(sum(b * b for b in before))
        cosine = sum(a * b for a, b in zip(now, before, strict=True)) / norms if norms else 0.0
        return cosine if measure == "similarity" else 1 - cosine
    power = 1 if measure == "l1" else 2
    moved = sum(abs(a - b) ** power for a, b in zip(now, before, strict=True)) ** (1 / power)
    return moved / sum(abs(b) ** power for b in before) ** (1 / power)


def naive(x, first, seen, mask, measure, threshold):
    """Changes of one token after the other, and what each one is compared with next (None for nothing)."""
    B, T, S, _ = x.shape
    change, kept = torch.zeros(B, T, S, dtype=torch.float64), {}
    for b, s in itertools.product(range(B), range(S)):
        before = first[b, s].tolist() if first is not None and (seen is None or seen[b, s]) else None
        for t in range(T):
            if mask is not None and not mask[b, t, s]:
                change[b, t, s] = -math.inf
                before = before if threshold is not None else None
                continue
            now = x[b, t, s].tolist()
            moved = distance(now, before, measure) if before is not None else math.inf
            change[b, t, s] = -math.inf if before is None and measure == "similarity" else moved
            if threshold is None or moved > threshold:
                before = now
        kept[b, s] = before
    return change, kept


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("threshold", [None, 0.35])
def test_equals_the_loops(monkeypatch, backend, measure, threshold):
    if measure == "similarity" and threshold is not None:
        return
    if backend == "reference":
        monkeypatch.setattr(cpu, "frame_change", reference.frame_change)
    B, T, S, D = 2, 7, 5, 4
    x, mask = make(B, T, S, D), masked(B, T, S)
    first, seen = given(B, S, D)
    for r, q, m in itertools.product((None, first), (None, seen), (None, mask)):
        if r is None and q is not None:
            continue
        want, kept = naive(x, r, q, m, measure, threshold)
        got = frame_change(x, reference=r, seen=q, mask=m, measure=measure, threshold=threshold)
        torch.testing.assert_close(got.change, want.float(), atol=1e-7, rtol=1e-6)
        assert (got.fired is None) == (threshold is None)
        if threshold is not None:
            assert torch.equal(got.fired, want > threshold)
        for (b, s), value in kept.items():
            assert (value is not None) == (got.seen is None or bool(got.seen[b, s]))
            assert got.reference[b, s].tolist() == (value or [0] * D)


def test_slow_drift_adds_up_until_it_fires():
    x = torch.stack([torch.full((1, 3), 1 + 0.1 * t) for t in range(8)])[None]
    steps = frame_change(x, measure="l2")
    assert (steps.change[0, 1:] < 0.11).all()
    assert steps.fired is None
    running = frame_change(x, measure="l2", threshold=0.25)
    # 1.3 is 30 % above 1.0, 1.7 is 31 % above 1.3
    assert running.fired[0, :, 0].tolist() == [True, False, False, True, False, False, False, True]
    torch.testing.assert_close(running.reference, x[:, 7])


@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_video_in_pieces_is_the_same_as_in_one(threshold, with_mask):
    x, mask = make(2, 9, 6, 5, torch.float32), masked(2, 9, 6) if with_mask else None
    whole = frame_change(x, mask=mask, threshold=threshold)
    parts, last, seen = [], None, None
    for start, stop in ((0, 4), (4, 4), (4, 5), (5, 9)):
        part = None if mask is None else mask[:, start:stop]
        got = frame_change(x[:, start:stop], reference=last, seen=seen, mask=part, threshold=threshold)
        last, seen = got.reference, got.seen
        parts.append(got.change)
    assert torch.equal(torch.cat(parts, 1), whole.change)
    assert torch.equal(last, whole.reference)
    assert (seen is None) == (whole.seen is None) == (not with_mask)
    assert seen is None or torch.equal(seen, whole.seen)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("block", [1, 100, 1000, 1 << 20])
def test_every_block_size_gives_the_reference(monkeypatch, dtype, block):
    monkeypatch.setattr(cpu, "_BLOCK", block)
    x, mask = make(3, 5, 11, 8, dtype), masked(3, 5, 11)
    first, seen = given(3, 11, 8, dtype)
    for measure, threshold, r, m in itertools.product(range(4), (None, 0.3), (None, first), (None, mask)):
        if measure == 1 and threshold is not None:
            continue
        arguments = (x, r, None if r is None else seen, m, measure, threshold)
        for got, want in zip(cpu.frame_change(*arguments), reference.frame_change(*arguments), strict=True):
            if measure == 2:
                torch.testing.assert_close(got, want)
            else:
                assert torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_broken_values_are_told_and_never_reused(backend):
    x = make(1, 5, 3, 4, torch.float32)
    clean = BACKENDS[backend](x, None, None, None, 0, None)[0]
    bad = x.clone()
    bad[0, 2, 1] = torch.nan
    got = BACKENDS[backend](bad, None, None, None, 0, None)[0]
    assert got.isnan().nonzero().tolist() == [[0, 2, 1], [0, 3, 1]]
    assert torch.equal(got[:, :, ::2], clean[:, :, ::2])
    change, at = BACKENDS[backend](bad, None, None, None, 0, 5.0)
    assert change.isnan().nonzero().tolist() == [[0, 2, 1], [0, 3, 1]]
    assert at.tolist() == [[0, 3, 0]]
    mask = ~bad.isnan().any(-1)
    for threshold in (None, 0.1):
        first = torch.full((1, 3, 4), torch.nan)
        nothing = torch.zeros(1, 3, dtype=torch.bool)
        assert not BACKENDS[backend](bad, first, nothing, mask, 0, threshold)[0].isnan().any()
        assert not frame_change(bad[:, :3], mask=mask[:, :3], threshold=threshold).reference.isnan().any()


def test_nothing_and_zeros():
    for B, T, S, D in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4)):
        for threshold in (None, 0.1):
            got = frame_change(torch.ones(B, T, S, D), threshold=threshold)
            assert got.change.shape == (B, T, S)
            assert got.reference.shape == (B, S, D)
    got = frame_change(torch.ones(2, 0, 3, 4))
    assert got.seen.tolist() == [[False] * 3] * 2
    assert got.reference.eq(0).all()
    first = torch.ones(2, 3, 4)
    assert torch.equal(frame_change(torch.ones(2, 0, 3, 4), reference=first, threshold=0.1).reference, first)
    zeros = torch.zeros(1, 2, 1, 3)
    assert frame_change(zeros).change[0, 1].tolist() == [1.0]
    assert frame_change(zeros, measure="l1").change[0, 1].tolist() == [0.0]
    assert frame_change(torch.ones(1, 2, 1, 0)).change[0, 1].tolist() == [1.0]


SHAPES = covering(
    T=[1, 2, 7, 19],
    S=[1, 7, 65],
    D=[1, 33, 72, 130],
    B=[1, 2],
    measure=MEASURES,
    threshold=[None, 0.31],
    first=["none", "given", "seen"],
    mask=[False, True],
    dtype=DTYPES,
    layout=["plain", "strided"],
)


def inputs_of(case):
    B, T, S, D = (case[name] for name in "BTSD")
    x = make(B, T, S, D, case["dtype"])
    first, seen = given(B, S, D, case["dtype"])
    x = strided(x) if case["layout"] == "strided" else x.transpose(1, 2).contiguous().transpose(1, 2)
    first = None if case["first"] == "none" else strided(first) if case["layout"] == "strided" else first
    seen = seen if case["first"] == "seen" else None
    mask = masked(B, T, S) if case["mask"] else None
    return [None if v is None else v.to(DEVICE) for v in (x, first, seen, mask)]


def low_precision(x, first, mask, measure, threshold, exact):
    """Torch in the inputs' own dtype, with the references that the exact changes choose."""
    before, out = torch.zeros_like(x[:, 0]) if first is None else first, exact.clone()
    for t in range(x.shape[1]):
        out[:, t] = measured(x[:, t], before, measure).float()
        taken = torch.ones_like(exact[:, t], dtype=torch.bool) if threshold is None else ~(exact[:, t] <= threshold)
        before = torch.where((taken if mask is None else taken & mask[:, t])[..., None], x[:, t], before)
    return out


def check(x, first, seen, mask, measure, threshold):
    got, at = torch.ops.mmaccel.frame_change(x, first, seen, mask, measure, threshold)
    wide = None if first is None else first.double()
    exact, at_exact = reference.frame_change(x.double(), wide, seen, mask, measure, threshold)
    if threshold is not None:
        assert (exact - threshold).abs().min() > 1e-5, "rounding would decide what fires"
    assert torch.equal(at, at_exact)
    infinite = exact.isinf()
    assert torch.equal(got[infinite], exact[infinite])
    low = low_precision(x, first, mask, measure, threshold, exact)
    got, low, exact = (v.masked_fill(infinite, 0) for v in (got, low, exact))
    as_good_as(got, low, exact.double(), floor=2e-6 * max(1.0, float(exact.abs().max())))


@pytest.mark.parametrize("case", SHAPES, ids=describe)
def test_triton_is_as_good_as_torch_in_the_same_dtype(on_triton, case):
    threshold = None if case["measure"] == "similarity" else case["threshold"]
    check(*inputs_of(case), MEASURES.index(case["measure"]), threshold)


def test_triton_on_tokens_longer_than_a_tile(on_triton):
    x = make(1, 5, 3, 5000, torch.float32).to(DEVICE)
    first, seen = (v.to(DEVICE) for v in given(1, 3, 5000, torch.float32))
    check(x, first, seen, None, 3, 0.31)
    check(x, first, None, None, 0, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_finds_no_change_in_a_still_video(on_triton, dtype):
    x = make(1, 1, 9, 100, dtype).expand(1, 6, 9, 100).to(DEVICE)
    for measure in ("cosine", "l1", "l2"):
        for threshold in (None, 0.0):
            got = frame_change(x, measure=measure, threshold=threshold, reference=x[:, 0])
            assert got.change.eq(0).all()
            assert threshold is None or not got.fired.any()
    assert frame_change(x, measure="similarity").change[:, 1:].eq(1).all()


def test_triton_on_broken_values_nothing_and_zeros(on_triton):
    x = make(1, 5, 3, 4, torch.float32)
    x[0, 2, 1] = torch.nan
    mask = ~x.isnan().any(-1)
    first = torch.full((1, 3, 4), torch.nan)
    seen = torch.tensor([[False, True, False]])
    for threshold, m, q in itertools.product((None, 0.1, 5.0), (None, mask), (seen, torch.zeros_like(seen))):
        for measure in (0, 2, 3):
            on_device = [None if v is None else v.to(DEVICE) for v in (x, first, q, m)]
            got = torch.ops.mmaccel.frame_change(*on_device, measure, threshold)
            want = reference.frame_change(x, first, q, m, measure, threshold)
            torch.testing.assert_close(got[0].cpu(), want[0], equal_nan=True)
            assert torch.equal(got[1].cpu(), want[1])
    for B, T, S, D in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
        for threshold in (None, 0.1):
            got = frame_change(torch.ones(B, T, S, D, device=DEVICE), threshold=threshold)
            assert got.change.shape == (B, T, S)
            assert got.reference.shape == (B, S, D)
            assert not got.change.isnan().any()
    zeros = torch.zeros(1, 2, 1, 3, device=DEVICE)
    assert [frame_change(zeros, measure=m).change[0, 1].item() for m in ("cosine", "l1", "l2")] == [1, 0, 0]
    nothing = torch.zeros(1, 5, 3, dtype=torch.bool, device=DEVICE)
    got = frame_change(x.to(DEVICE), mask=nothing, threshold=0.1)
    assert got.change.eq(-torch.inf).all()
    assert got.reference.eq(0).all()
    assert not got.fired.any()
    assert not got.seen.any()


def test_wrong_arguments():
    x, (first, seen) = make(2, 3, 4, 5, torch.float32), given(2, 4, 5, torch.float32)
    wrong = [
        {"measure": "l3"},
        {"measure": "similarity", "threshold": 0.5},
        {"threshold": math.inf},
        {"threshold": math.nan},
        {"reference": first[:1]},
        {"reference": first.double()},
        {"seen": seen},
        {"reference": first, "seen": seen[:, :3]},
        {"reference": first, "seen": seen.float()},
        {"mask": torch.ones(2, 3, dtype=torch.bool)},
        {"mask": torch.ones(2, 3, 4)},
    ]
    for arguments in wrong:
        with pytest.raises(MethodError):
            frame_change(x, **arguments)
    for bad in (x[0], x.int()):
        with pytest.raises(MethodError, match="must be floating"):
            frame_change(bad)


@pytest.mark.parametrize("threshold", [None, 0.3])
@pytest.mark.parametrize("all_of_them", [False, True])
def test_opcheck(threshold, all_of_them):
    x, mask = make(2, 3, 4, 5, torch.float32), masked(2, 3, 4)
    rest = (*given(2, 4, 5, torch.float32), mask) if all_of_them else (None, None, None)
    torch.library.opcheck(torch.ops.mmaccel.frame_change.default, (x, *rest, 0, threshold))


def test_compiles_to_one_graph():
    x, mask = make(2, 4, 3, 5, torch.float32), masked(2, 4, 3)
    first, seen = given(2, 3, 5, torch.float32)

    def changes(x, first, seen, mask):
        running = frame_change(x, reference=first, seen=seen, mask=mask, threshold=0.3)
        return running.change, running.fired, running.reference, running.seen, frame_change(x, measure="l1").change

    compiled = torch.compile(changes, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(x, first, seen, mask), changes(x, first, seen, mask), strict=True):
        assert torch.equal(got, want)


def test_the_record(on_triton):
    x = make(1, 2, 3, 4, torch.float32).to(DEVICE)
    with kernels.recording() as events:
        frame_change(x)
        with kernels.use("torch"):
            frame_change(x)
    assert [(event.op, event.backend) for event in events] == [("frame_change", "triton"), ("frame_change", "torch")]
    with pytest.raises(NotApplicableError, match="float64 has no Triton path"):
        frame_change(x.double())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "T", "S", "D"), [(1, 32, 196, 896), (2, 16, 729, 1152), (1, 8, 1560, 3584)])
def test_full_shapes_on_a_gpu(on_triton, dtype, B, T, S, D):
    gpu_only()
    x, mask = make(B, T, S, D, dtype).to(DEVICE), masked(B, T, S).to(DEVICE)
    first, seen = (v.to(DEVICE) for v in given(B, S, D, dtype))
    for measure in range(4):
        check(x, None, None, None, measure, None)
        check(x, first, seen, mask, measure, None)
    check(x, None, None, None, 3, 0.31)
    check(x, first, seen, mask, 2, 0.31)


class PeakMemory(TorchDispatchMode):
    """Sums the storages that torch operations allocate and notes the largest sum that was alive at once."""

    live = peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in old:
                storage = t.untyped_storage()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.release, storage.nbytes())
        return result

    def release(self, nbytes):
        self.live -= nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_memory_beyond_inputs_is_at_most_20_mb(dtype, threshold):
    x = torch.ones(1, 16, 1024, 1024, dtype=dtype)  # 64 MB in float32
    for measure in (0, 2):
        with PeakMemory() as memory:
            cpu.frame_change(x, None, None, None, measure, threshold)
        assert 0 < memory.peak <= 20 * 2**20
