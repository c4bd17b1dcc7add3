from __future__ import annotations

import math
import weakref

import pytest
import torch
from harness import DEVICE, DTYPES, as_good_as, covering, describe, gpu_only, strided
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmaccel import kernels
from mmaccel.errors import MethodError, NotApplicableError
from mmaccel.kernels.attention_received import attention_received, cpu, reference

BACKENDS = {"reference": reference.attention_received, "blocked": cpu.attention_received}


def make(B, H, Hkv, Sq, Sk, D, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(B, H, Sq, D, generator=g, dtype=torch.float64)
    k = torch.randn(B, Hkv, Sk, D, generator=g, dtype=torch.float64)
    return q.to(dtype), k.to(dtype)


def naive(q, k, rows=None, key_ok=None, causal=False, scale=None):
    """Python numbers only: (B, H, Sk) nested lists of the mean softmax column over the given rows of each item."""
    B, H, Sq, D = q.shape
    Hkv, Sk = k.shape[1:3]
    scale = D**-0.5 if scale is None else scale
    out = torch.zeros(B, H, Sk, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            count = 0
            for i in range(Sq) if rows is None else rows[b]:
                seen = [j for j in range(Sk) if (key_ok is None or key_ok[b, j]) and (not causal or j <= i + Sk - Sq)]
                if not seen:
                    continue
                logits = [
                    scale * sum(float(q[b, h, i, d]) * float(k[b, h * Hkv // H, j, d]) for d in range(D)) for j in seen
                ]
                top = max(logits)
                total = sum(math.exp(s - top) for s in logits)
                count += 1
                for j, s in zip(seen, logits, strict=True):
                    out[b, h, j] += math.exp(s - top) / total
            if count:
                out[b, h] /= count
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("B", "H", "Hkv", "Sq", "Sk", "D"),
    [(1, 1, 1, 1, 1, 1), (2, 4, 4, 7, 7, 3), (2, 6, 2, 3, 9, 4), (1, 8, 1, 1, 11, 2), (3, 2, 2, 5, 6, 5)],
)
def test_equals_the_loops(backend, causal, B, H, Hkv, Sq, Sk, D):
    q, k = make(B, H, Hkv, Sq, Sk, D)
    g = torch.Generator().manual_seed(1)
    key_ok = torch.rand(B, Sk, generator=g) > 0.3
    rows = torch.randint(-1, Sq, (B, 4), generator=g)
    chosen = [[i for i in row if i >= 0] for row in rows.tolist()]
    for r, r_list in ((None, None), (rows, chosen)):
        for mask in (None, key_ok):
            expected = naive(q, k, r_list, mask, causal)
            per_head = BACKENDS[backend](q, k, r, mask, causal, True, D**-0.5)
            mean = BACKENDS[backend](q, k, r, mask, causal, False, D**-0.5)
            torch.testing.assert_close(per_head.double(), expected, atol=1e-7, rtol=0)
            torch.testing.assert_close(mean.double(), expected.mean(1), atol=1e-7, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("block", [1, 40, 300, 1 << 20])
def test_every_block_size_gives_the_reference(monkeypatch, causal, block):
    monkeypatch.setattr(cpu, "_BLOCK", block)
    q, k = make(3, 6, 2, 13, 17, 8, torch.float32)
    # left padding, right padding, and a hole
    ok = torch.ones(3, 17, dtype=torch.bool)
    ok[0, :5], ok[1, 12:], ok[2, 6:9] = False, False, False
    for heads in (False, True):
        for mask in (None, ok):
            for rows in (None, torch.tensor([[12, 0, 5, 5], [1, -1, -1, 3], [-1, -1, -1, -1]])):
                got = cpu.attention_received(q, k, rows, mask, causal, heads, 0.3)
                torch.testing.assert_close(got, reference.attention_received(q, k, rows, mask, causal, heads, 0.3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("native", [False, True])
def test_low_precision_is_as_good_as_torch_in_that_dtype(monkeypatch, dtype, native):
    monkeypatch.setattr(cpu, "_multiplies_natively", lambda *_: native)
    q, k = make(2, 4, 2, 65, 65, 72, dtype)
    exact = reference.attention_received(q.double(), k.double(), None, None, False, False, 0.25).double()
    eager = ((q @ k.repeat_interleave(2, 1).mT) * 0.25).softmax(-1).float().mean((1, 2)).double()
    error = (cpu.attention_received(q, k, None, None, False, False, 0.25) - exact).abs().max()
    assert error <= max(2 * (eager - exact).abs().max(), 1e-6)
    if not native:
        assert error < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs(dtype):
    q, k = make(2, 4, 4, 10, 10, 6, dtype)
    expected = attention_received(q, k)
    token_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    sliced = [torch.cat([x, torch.full_like(x, torch.nan)], -1)[..., :6] for x in (q, k)]
    broadcast = attention_received(q[:1].expand(2, -1, -1, -1), k[:1].expand(2, -1, -1, -1))
    torch.testing.assert_close(attention_received(*token_major), expected)
    torch.testing.assert_close(attention_received(*sliced), expected)
    torch.testing.assert_close(broadcast, expected[:1].expand(2, -1))


def test_columns_sum_to_one_and_follow_the_sdpa_convention():
    q, k = make(2, 4, 2, 9, 9, 8, torch.float32)
    received = attention_received(q, k, causal=True)
    assert received.dtype == torch.float32
    torch.testing.assert_close(received.sum(1), torch.ones(2))
    # With one-hot values attention's output is the attention map itself.
    hot = torch.eye(9).expand(2, 2, 9, 9)
    maps = torch.nn.functional.scaled_dot_product_attention(q, k, hot, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(received, maps.mean((1, 2)))


def test_a_permutation_of_the_keys_permutes_the_result():
    q, k = make(2, 4, 4, 6, 8, 5, torch.float32)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(attention_received(q, k[:, :, order]), attention_received(q, k)[:, order])


def test_ways_to_choose_queries():
    q, k = make(2, 2, 2, 6, 6, 4)

    def rows(*numbers):
        return naive(q, k, [numbers] * 2).mean(1).float()

    torch.testing.assert_close(attention_received(q, k, queries="all"), rows(*range(6)))
    torch.testing.assert_close(attention_received(q, k, queries=2), rows(4, 5))
    torch.testing.assert_close(attention_received(q, k, queries=(1, 3)), rows(1, 2))
    torch.testing.assert_close(attention_received(q, k, queries=torch.tensor([0])), rows(0))
    torch.testing.assert_close(attention_received(q, k, queries=torch.tensor([5, -1, 2])), rows(5, 5, 2))
    torch.testing.assert_close(attention_received(q, k, queries=torch.tensor([], dtype=torch.int64)), torch.zeros(2, 6))


def test_the_last_n_rows_are_the_last_valid_ones():
    q, k = make(3, 2, 2, 6, 6, 4)
    ok = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]], dtype=torch.bool)
    got = attention_received(q, k, queries=2, key_padding=ok, query_padding=ok)
    torch.testing.assert_close(got, naive(q, k, [[4, 5], [1, 2], [1]], ok).mean(1).float())
    chosen = attention_received(q, k, queries=torch.tensor([1, 4]), key_padding=ok, query_padding=ok)
    torch.testing.assert_close(chosen, naive(q, k, [[4], [1], [1]], ok).mean(1).float())


def test_causal_queries_share_the_validity_of_the_keys():
    q, k = make(2, 2, 1, 3, 7, 4)
    ok = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    got = attention_received(q, k, causal=True, key_padding=ok)
    torch.testing.assert_close(got, naive(q, k, [[0, 1, 2], [0, 1]], ok, causal=True).mean(1).float())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_single_items(causal, side):
    lengths, longest = (3, 7, 5), 7
    items = [make(1, 4, 2, n, n, 6, torch.float32, seed=n) for n in lengths]
    q, k = (torch.full((3, heads, longest, 6), torch.nan) for heads in (4, 2))
    ok = torch.zeros(3, longest, dtype=torch.bool)
    for b, (n, (qi, ki)) in enumerate(zip(lengths, items, strict=True)):
        at = slice(longest - n, longest) if side == "left" else slice(0, n)
        q[b, :, at], k[b, :, at], ok[b, at] = qi[0], ki[0], True
    got = attention_received(q, k, causal=causal, key_padding=ok, query_padding=ok)
    for b, (qi, ki) in enumerate(items):
        torch.testing.assert_close(got[b][ok[b]], attention_received(qi, ki, causal=causal)[0])
        assert got[b][~ok[b]].eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_item_and_is_ignored_where_nothing_is_read(backend):
    q, k = make(3, 2, 2, 5, 5, 4, torch.float32)
    clean = BACKENDS[backend](q, k, None, None, False, False, 0.5)
    bad_q, bad_k = q.clone(), k.clone()
    bad_q[1, 0, 3], bad_k[2, 1, 0] = torch.nan, torch.nan
    got = BACKENDS[backend](bad_q, bad_k, None, None, False, False, 0.5)
    torch.testing.assert_close(got[0], clean[0])
    assert got[1:].isnan().all()
    rows, ok = torch.tensor([[0, 1]] * 3), torch.tensor([[False, True, True, True, True]] * 3)
    got = BACKENDS[backend](bad_q, bad_k, rows, ok, False, False, 0.5)
    torch.testing.assert_close(got, BACKENDS[backend](q, k, rows, ok, False, False, 0.5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 2, 0, 3), (2, 2, 3, 0)])
def test_empty_inputs_give_zeros(backend, shape):
    B, H, Sq, Sk = shape
    q, k = make(B, H, H, Sq, Sk, 4)
    got = BACKENDS[backend](q, k, None, None, False, False, 1.0)
    assert got.shape == (B, Sk)
    assert got.eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_logits_do_not_overflow(backend):
    q, k = make(1, 1, 1, 4, 6, 3, torch.float32)
    got = BACKENDS[backend](q * 1e4, k * 1e4, None, None, False, False, 1.0)
    # A softmax this sharp is a vote: every row gives its whole attention to its best key.
    votes = torch.bincount((q @ k.mT)[0, 0].argmax(1), minlength=6) / 4
    torch.testing.assert_close(got[0], votes)


def test_wrong_arguments():
    q, k = make(2, 4, 2, 5, 6, 4, torch.float32)
    wrong = [
        {"reduce": "row"},
        {"reduce": "block", "block": 0},
        {"reduce": "diagonal"},
        {"queries": 0},
        {"queries": 6},
        {"queries": True},
        {"queries": "last"},
        {"queries": (3, 3)},
        {"queries": (0, 6)},
        {"queries": (1, 2, 3)},
        {"queries": torch.tensor([5])},
        {"queries": torch.tensor([-6])},
        {"queries": torch.tensor([0.0])},
        {"queries": torch.tensor([[0]])},
        {"key_padding": torch.ones(2, 5, dtype=torch.bool)},
        {"key_padding": torch.ones(2, 6)},
        {"query_padding": torch.ones(2, 6, dtype=torch.bool)},
    ]
    for arguments in wrong:
        with pytest.raises(MethodError):
            attention_received(q, k, **arguments)
    for a, b in ((q[0], k), (q[:, :3], k), (q, k[:1]), (q, k[..., :3]), (q, k.double()), (q.int(), k.int())):
        with pytest.raises(MethodError):
            attention_received(a, b)
    with pytest.raises(MethodError, match="6 queries but 5 keys"):
        attention_received(k, q[:, :2], causal=True)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("rows", [None, torch.tensor([[0, 2], [1, -1]])])
def test_opcheck(heads, rows):
    q, k = make(2, 4, 2, 3, 5, 4, torch.float32)
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    for causal in (False, True):
        torch.library.opcheck(
            torch.ops.mmaccel.attention_received.default, (q, k, rows, mask, causal, heads, 0.5, causal)
        )


def test_compiles_to_one_graph():
    q, k = make(2, 4, 2, 5, 5, 4, torch.float32)
    ok = torch.tensor([[False, True, True, True, True], [True] * 5])
    index = torch.tensor([-1, 0])

    def scores(q, k, ok, index):
        last = attention_received(q, k, queries=1, causal=True, key_padding=ok)
        return last + attention_received(q, k) + attention_received(q, k, queries=index)

    compiled = torch.compile(scores, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, k, ok, index), scores(q, k, ok, index))


def test_backends_and_the_record(monkeypatch):
    q, k = make(1, 2, 2, 3, 3, 4, torch.float32)
    monkeypatch.delenv("MMACCEL_KERNELS", raising=False)
    assert kernels.backend() == "auto"
    with kernels.recording() as outer:
        attention_received(q, k)
        with kernels.recording() as inner, kernels.use("torch"):
            attention_received(q, k)
    attention_received(q, k)
    ran = kernels.Event("attention_received", "torch", None)
    assert (outer, inner) == ([ran, ran], [ran])

    with kernels.use("triton"), pytest.raises(NotApplicableError, match="float64 has no Triton path"):
        attention_received(q.double(), k.double())
    monkeypatch.setenv("MMACCEL_KERNELS", "triton")
    with pytest.raises(NotApplicableError, match="attention_received"):
        attention_received(q.double(), k.double())
    with kernels.use("torch"):
        attention_received(q, k)
    monkeypatch.setenv("MMACCEL_KERNELS", "cuda")
    with pytest.raises(MethodError, match="'cuda'"):
        kernels.backend()
    with pytest.raises(MethodError, match="'fast'"), kernels.use("fast"):
        pass


def test_a_fallback_on_a_gpu_is_recorded_with_its_reason():
    from mmaccel.kernels.dispatch import choose

    gpu = torch.device("cuda")
    with kernels.use("auto"), kernels.recording() as events:
        assert choose("op", gpu, triton_missing="no path for int8") == "torch"
        assert choose("op", gpu, triton_missing=None) == "triton"
        assert choose("op", torch.device("cpu"), triton_missing=None) == "torch"
    assert [(e.backend, e.reason) for e in events] == [("torch", "no path for int8"), ("triton", None), ("torch", None)]


SHAPES = covering(
    queries=[1, 7, 65, 129],
    keys=[1, 7, 65, 129],
    D=[64, 72, 80, 128],
    groups=[1, 2, 8],
    causal=[False, True],
    chosen=["all", "rows"],
    padding=[None, "left", "holes"],
    dtype=DTYPES,
    layout=["plain", "strided"],
)
SHAPES = [case for case in SHAPES if not (case["causal"] and case["queries"] > case["keys"])]


def inputs_of(case, seed=0):
    H = max(2, case["groups"]) if case["groups"] < 8 else 8
    B = 1 if H == 8 or case["queries"] * case["keys"] > 5000 else 2
    q, k = make(B, H, H // case["groups"], case["queries"], case["keys"], case["D"], case["dtype"], seed)
    g = torch.Generator().manual_seed(seed)
    rows = None if case["chosen"] == "all" else torch.randint(-1, case["queries"], (B, 5), generator=g)
    padding = None
    if case["padding"] == "holes":
        padding = torch.rand(B, case["keys"], generator=g) > 0.3
    elif case["padding"] == "left":
        padding = torch.arange(case["keys"]).expand(B, -1) >= torch.randint(0, case["keys"] + 1, (B, 1), generator=g)
    if case["layout"] == "strided":
        q, k = strided(q), strided(k)
    return q, k, rows, padding


def on(device, *tensors):
    return [None if tensor is None else tensor.to(device) for tensor in tensors]


def low_precision(q, k, rows, padding, causal, scale):
    """The map written in torch in the inputs' own dtype, as eager attention does it; float64 sums."""
    B, H, Sq, _ = q.shape
    Sk = k.shape[2]
    seen = torch.ones(B, 1, Sq, Sk, dtype=torch.bool, device=q.device)
    if causal:
        seen = seen & torch.ones(Sq, Sk, dtype=torch.bool, device=q.device).tril(Sk - Sq)
    if padding is not None:
        seen = seen & padding[:, None, None]
    maps = (q @ k.repeat_interleave(H // k.shape[1], 1).mT * scale).masked_fill(~seen, -torch.inf).softmax(-1)
    weight = torch.ones(B, Sq, device=q.device)
    if rows is not None:
        weight = torch.zeros(B, Sq + 1, device=q.device).scatter_add_(
            1, rows + 1, torch.ones(rows.shape, device=q.device)
        )
        weight = weight[:, 1:]
    weight = weight * seen.any(-1)[:, 0]
    total = (maps.double().nan_to_num() * weight[:, None, :, None]).sum(2)
    return total / weight.sum(1).clamp_min(1)[:, None, None]


@pytest.mark.parametrize("case", SHAPES, ids=describe)
def test_triton_is_as_good_as_torch_in_the_same_dtype(on_triton, case):
    given = on(DEVICE, *inputs_of(case))
    q, k, rows, padding = given
    got = torch.ops.mmaccel.attention_received(q, k, rows, padding, case["causal"], True, 0.25, False)
    exact = reference.attention_received(q.double(), k.double(), rows, padding, case["causal"], True, 0.25)
    low = low_precision(q, k, rows, padding, case["causal"], 0.25)
    as_good_as(got, low, exact.double(), floor=2e-6)
    mean = torch.ops.mmaccel.attention_received(q, k, rows, padding, case["causal"], False, 0.25, False)
    torch.testing.assert_close(mean, got.mean(1))


@pytest.mark.parametrize("backend", ["reference", "blocked", "triton"])
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(("Sq", "Sk"), [(1, 1), (7, 7), (3, 70), (66, 70)])
def test_diagonals_equal_the_loops(monkeypatch, on_triton, backend, heads, Sq, Sk):
    q, k = make(2, 4, 2, Sq, Sk, 3, torch.float32)
    g = torch.Generator().manual_seed(4)
    ok = torch.arange(Sk).expand(2, -1) >= torch.tensor([[0], [Sk // 2]])
    for rows in (None, torch.randint(-1, Sq, (2, 3), generator=g)):
        for mask in (None, ok):
            want = torch.zeros(2, 4, Sk, dtype=torch.float64)
            for b in range(2):
                chosen = range(Sq) if rows is None else [i for i in rows[b].tolist() if i >= 0]
                chosen = [i for i in chosen if mask is None or bool(mask[b, : i + Sk - Sq + 1].any())]
                for i in chosen:
                    one = naive(q[b : b + 1], k[b : b + 1], [[i]], None if mask is None else mask[b : b + 1], True)[0]
                    for j in range(i + Sk - Sq + 1):
                        want[b, :, i + Sk - Sq - j] += one[:, j] / len(chosen)
            arguments = (q, k, rows, mask, True, heads, 3**-0.5, True)
            if backend == "triton":
                got = torch.ops.mmaccel.attention_received(*on(DEVICE, *arguments[:4]), *arguments[4:]).cpu()
            else:
                got = BACKENDS[backend](*arguments)
            torch.testing.assert_close(got.double(), want if heads else want.mean(1), atol=1e-6, rtol=0)


def test_blocks_are_sums_of_tokens():
    q, k = make(2, 4, 2, 7, 23, 4, torch.float32)
    by_token = attention_received(q, k, causal=True, heads=True)
    got = attention_received(q, k, causal=True, heads=True, reduce="block", block=5)
    want = torch.stack([by_token[..., start : start + 5].sum(-1) for start in range(0, 23, 5)], -1)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(attention_received(q, k, reduce="block", block=64)[:, 0], torch.ones(2))


def test_triton_where_nothing_is_seen(on_triton):
    for shape in ((0, 2, 3, 3), (2, 2, 0, 3), (2, 2, 3, 0)):
        B, H, Sq, Sk = shape
        q, k = on(DEVICE, *make(B, H, H, Sq, Sk, 64, torch.float32))
        assert torch.ops.mmaccel.attention_received(q, k, None, None, False, False, 1.0, False).eq(0).all()
    q, k = on(DEVICE, *make(2, 2, 2, 3, 5, 64, torch.float32))
    nothing = torch.tensor([[False] * 5, [True] * 5], device=DEVICE)
    got = attention_received(q, k, key_padding=nothing)
    assert got[0].eq(0).all()
    torch.testing.assert_close(got[1].sum(), torch.ones((), device=DEVICE))


def test_triton_ignores_nan_that_is_not_read_and_shows_the_rest(on_triton):
    q, k = on(DEVICE, *make(3, 2, 2, 5, 5, 64, torch.float32))
    clean = attention_received(q, k)
    bad_q, bad_k = q.clone(), k.clone()
    bad_q[1, 0, 3], bad_k[2, 1, 0] = torch.nan, torch.nan
    got = attention_received(bad_q, bad_k)
    torch.testing.assert_close(got[0], clean[0])
    assert got[1:].isnan().all()
    ok = torch.tensor([[False, True, True, True, True]] * 3, device=DEVICE)
    got = attention_received(bad_q, bad_k, queries=(0, 2), key_padding=ok)
    torch.testing.assert_close(got, attention_received(q, k, queries=(0, 2), key_padding=ok))


def test_a_head_that_is_too_long_falls_back_with_a_reason(on_triton):
    q, k = make(1, 1, 1, 2, 2, 300, torch.float32)
    with pytest.raises(NotApplicableError, match="300 channels"):
        attention_received(q, k)
    with kernels.use("auto"):
        attention_received(q, k)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("Sq", "Sk", "causal"), [(729, 729, False), (2048, 6309, True), (1, 6309, True)])
def test_full_shapes_on_a_gpu(on_triton, dtype, Sq, Sk, causal):
    gpu_only()
    q, k = on(DEVICE, *make(2, 14, 2, Sq, Sk, 72, dtype))
    got = torch.ops.mmaccel.attention_received(q, k, None, None, causal, True, 72**-0.5, False)
    exact = reference.attention_received(q.double(), k.double(), None, None, causal, True, 72**-0.5)
    as_good_as(got, low_precision(q, k, None, None, causal, 72**-0.5), exact.double(), floor=2e-6)


class PeakMemory(TorchDispatchMode):
    """Sums the storages that torch operations allocate and notes the largest sum that was alive at once."""

    live = peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                storage = t.untyped_storage()
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.release, storage.nbytes())
        return result

    def release(self, nbytes):
        self.live -= nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("native", [False, True])
def test_memory_beyond_inputs_is_at_most_20_mb(monkeypatch, dtype, native):
    # The map of one head alone takes 4096 * 4096 floats, 64 MB.
    monkeypatch.setattr(cpu, "_multiplies_natively", lambda dtype, _: native or dtype == torch.float32)
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in make(1, 2, 1, 4096, 4096, 16, dtype))
    valid = torch.rand(1, 4096, generator=torch.Generator().manual_seed(0)) > 0.1
    for mask, causal in ((None, False), (valid, True)):
        with PeakMemory() as memory:
            cpu.attention_received(q, k, None, mask, causal, False, 0.25)
        assert 0 < memory.peak <= 20 * 2**20
