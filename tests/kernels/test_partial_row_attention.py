from __future__ import annotations

import math

import pytest
import torch
from harness import DEVICE, DTYPES, as_good_as, covering, describe, gpu_only, strided
from torch.nn import functional as F

from mmaccel import kernels
from mmaccel.errors import MethodError, NotApplicableError
from mmaccel.kernels.partial_row_attention import cpu, partial_row_attention, reference

BACKENDS = {"reference": reference.partial_row_attention, "dense": cpu.partial_row_attention}


def triton_path(*arguments):
    with kernels.use("triton"):
        return torch.ops.mmaccel.partial_row_attention(*arguments)


EVERY = {**BACKENDS, "triton": triton_path}


def make(B, H, Hkv, m, N, D, Dv=None, dtype=torch.float32, seed=0, device="cpu"):
    """q, k_new, v_new, rows, k_cache, v_cache: rows in random order, distinct, none of them padding."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((H, m, D), (Hkv, m, D), (Hkv, m, Dv or D), (Hkv, N, D), (Hkv, N, Dv or D))
    q, k_new, v_new, k, v = (torch.randn(B, *s, generator=g, dtype=torch.float64).to(device, dtype) for s in shapes)
    rows = torch.rand(B, N, generator=g).argsort(1)[:, :m].to(device)
    return q, k_new, v_new, rows, k, v


def copied(arguments):
    return [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]


def doubled(arguments):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in copied(arguments)]


def naive(q, k_new, v_new, rows, k, v, key_ok, causal, scale):
    """Python numbers only: the output, and the caches with the new rows, as nested lists turned into tensors."""
    G = q.shape[1] // k.shape[1]
    qs, ks, vs = q.tolist(), k.tolist(), v.tolist()
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for b, item in enumerate(rows.tolist()):
        for place, row in enumerate(item):
            for h in range(k.shape[1]):
                if row >= 0 and k_new is not None:
                    ks[b][h][row] = k_new[b, h, place].tolist()
                if row >= 0 and v_new is not None:
                    vs[b][h][row] = v_new[b, h, place].tolist()
        for place, row in enumerate(item):
            seen = [j for j in range(k.shape[2]) if (key_ok is None or key_ok[b, j]) and (not causal or j <= row)]
            if row < 0 or not seen:
                continue
            for h in range(q.shape[1]):
                logits = [
                    scale * sum(a * c for a, c in zip(qs[b][h][place], ks[b][h // G][j], strict=True)) for j in seen
                ]
                top = max(logits)
                weights = [math.exp(s - top) for s in logits]
                for d in range(v.shape[3]):
                    sums = sum(w * vs[b][h // G][j][d] for w, j in zip(weights, seen, strict=True))
                    out[b, h, place, d] = sums / sum(weights)
    return out, torch.tensor(ks, dtype=torch.float64), torch.tensor(vs, dtype=torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("B", "H", "Hkv", "m", "N", "D", "Dv"),
    [
        (1, 1, 1, 1, 1, 1, 1),
        (2, 4, 4, 7, 7, 3, 3),
        (2, 6, 2, 3, 9, 4, 2),
        (1, 8, 1, 1, 11, 2, 3),
        (3, 2, 2, 5, 6, 5, 5),
    ],
)
def test_equals_the_loops(backend, causal, B, H, Hkv, m, N, D, Dv):
    q, k_new, v_new, rows, k, v = make(B, H, Hkv, m, N, D, Dv, torch.float64)
    g = torch.Generator().manual_seed(1)
    key_ok = torch.rand(B, N, generator=g) > 0.4
    holes = rows.masked_fill(torch.rand(B, m, generator=g) > 0.6, -1)
    for at, mask, new in ((rows, None, (k_new, v_new)), (holes, key_ok, (k_new, None)), (holes, None, (None, v_new))):
        got_k, got_v = k.clone(), v.clone()
        want, want_k, want_v = naive(q, *new, at, k, v, mask, causal, 0.3)
        got = BACKENDS[backend](q, *new, at, got_k, got_v, mask, causal, 0.3)
        torch.testing.assert_close(got, want, atol=1e-9, rtol=0)
        torch.testing.assert_close((got_k, got_v), (want_k, want_v), atol=0, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("Hkv", "Dv"), [(4, 16), (2, 16), (1, 5)])
def test_the_dense_path_gives_the_reference(causal, padded, Hkv, Dv):
    arguments = make(3, 4, Hkv, 13, 37, 16, Dv)
    rows = arguments[3].masked_fill(torch.arange(13) >= torch.tensor([[13], [9], [0]]), -1)
    ok = torch.rand(3, 37, generator=torch.Generator().manual_seed(2)) > 0.3
    rest = (ok if padded else None, causal, 0.25)
    mine, theirs = copied(arguments), copied(arguments)
    mine[3] = theirs[3] = rows
    got, want = cpu.partial_row_attention(*mine, *rest), reference.partial_row_attention(*theirs, *rest)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(mine[4:], theirs[4:], atol=0, rtol=0)
    assert got[2].eq(0).all()
    assert got.stride() == want.stride() == (13 * 4 * Dv, Dv, 4 * Dv, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_as_good_as_torch_in_that_dtype(dtype):
    arguments = make(2, 4, 2, 20, 65, 72, dtype=dtype)
    exact = reference.partial_row_attention(*doubled(arguments), None, False, 0.25)
    got = cpu.partial_row_attention(*copied(arguments), None, False, 0.25)
    as_good_as(got, low_precision(*copied(arguments), None, False, 0.25), exact, floor=1e-5)


def low_precision(q, k_new, v_new, rows, k, v, key_ok, causal, scale):
    """The map written in torch in the inputs' own dtype, as eager attention does it."""
    B, H = q.shape[:2]
    for new, cache in ((k_new, k), (v_new, v)):
        for b in range(B if new is not None else 0):
            kept = rows[b] >= 0
            cache[b][:, rows[b][kept]] = new[b][:, kept]
    seen = (rows >= 0)[:, :, None].expand(-1, -1, k.shape[2])
    if causal:
        seen = seen & (torch.arange(k.shape[2], device=q.device) <= rows[:, :, None])
    if key_ok is not None:
        seen = seen & key_ok[:, None]
    maps = (q @ k.repeat_interleave(H // k.shape[1], 1).mT * scale).masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    return maps.nan_to_num() @ v.repeat_interleave(H // k.shape[1], 1)


SHAPES = covering(
    m=[1, 7, 65, 129],
    more=[0, 6, 60],
    D=[64, 72, 80, 128],
    values=["equal", 40],
    groups=[1, 2, 8],
    causal=[False, True],
    order=["sorted", "shuffled", "padded"],
    padding=[None, "left", "holes"],
    dtype=DTYPES,
)
for number, chosen in enumerate(SHAPES):
    chosen["new"] = ("both", "keys", "values", "none")[number % 4]
    chosen["layout"] = ("plain", "strided", "token-major")[number % 3]


def inputs_of(case, seed=0):
    m, N = case["m"], case["m"] + case["more"]
    H = 8 if case["groups"] == 8 else 2
    B = 1 if H == 8 or m * N > 5000 else 2
    Dv = case["D"] if case["values"] == "equal" else case["values"]
    q, k_new, v_new, rows, k, v = make(B, H, H // case["groups"], m, N, case["D"], Dv, case["dtype"], seed, DEVICE)
    g = torch.Generator().manual_seed(seed)
    if case["order"] == "sorted":
        rows = rows.sort(1).values
    elif case["order"] == "padded":
        rows = rows.masked_fill((torch.rand(B, m, generator=g) > 0.7).to(DEVICE), -1)
    ok = None
    if case["padding"] == "holes":
        ok = (torch.rand(B, N, generator=g) > 0.3).to(DEVICE)
    elif case["padding"] == "left":
        ok = (torch.arange(N).expand(B, -1) >= torch.randint(0, N, (B, 1), generator=g)).to(DEVICE)
    tensors = [q, k_new, v_new, k, v]
    if case["layout"] == "strided":
        tensors = [strided(x) for x in tensors]
    elif case["layout"] == "token-major":
        tensors = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    q, k_new, v_new, k, v = tensors
    k_new = k_new if case["new"] in ("both", "keys") else None
    v_new = v_new if case["new"] in ("both", "values") else None
    return q, k_new, v_new, rows, k, v, ok, case["causal"], 0.2


@pytest.mark.parametrize("case", SHAPES, ids=describe)
def test_triton_is_as_good_as_torch_in_the_same_dtype(on_triton, case):
    arguments = inputs_of(case)
    exact_inputs, low_inputs = doubled(arguments), copied(arguments)
    exact = reference.partial_row_attention(*exact_inputs)
    got = torch.ops.mmaccel.partial_row_attention(*arguments)
    as_good_as(got, low_precision(*low_inputs), exact, floor=2e-6)
    assert got.dtype == case["dtype"]
    assert got.transpose(1, 2).is_contiguous()
    for mine, theirs in zip(arguments[4:6], exact_inputs[4:6], strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=0, rtol=0)


def test_triton_leaves_what_lies_between_strided_rows(on_triton):
    q, k_new, v_new, rows, k, v = make(1, 2, 2, 5, 9, 64, device=DEVICE)
    wide = strided(k)
    partial_row_attention(q, k_new, v_new, rows, wide, v)
    between = torch.as_strided(wide, wide.shape, wide.stride(), 1)
    assert between.isnan().all()


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("causal", [False, True])
def test_all_rows_are_dense_attention(nan_filled, backend, causal):
    q, k_new, v_new, _, k, v = make(2, 4, 2, 70, 70, 64, device=DEVICE)
    k, v = k.fill_(torch.nan), v.fill_(torch.nan)
    rows = torch.arange(70, device=DEVICE).expand(2, -1)
    got = EVERY[backend](q, k_new, v_new, rows, k, v, None, causal, 0.125)
    want = F.scaled_dot_product_attention(q, k_new, v_new, is_causal=causal, scale=0.125, enable_gqa=True)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close((k, v), (k_new, v_new), atol=0, rtol=0)


@pytest.mark.parametrize("backend", EVERY)
def test_some_rows_are_the_rows_of_dense_attention_over_the_mixed_cache(nan_filled, backend):
    q, k_new, v_new, rows, k, v = make(2, 4, 4, 9, 40, 72, device=DEVICE)
    full_q = torch.randn(2, 4, 40, 72, device=DEVICE)
    at = rows[:, None, :, None].expand(-1, 4, -1, 72)
    full_q.scatter_(2, at, q)
    mixed_k, mixed_v = k.scatter(2, at, k_new), v.scatter(2, at, v_new)
    want = F.scaled_dot_product_attention(full_q, mixed_k, mixed_v).gather(2, at)
    got = EVERY[backend](q, k_new, v_new, rows, k, v, None, False, 72**-0.5)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)

    # a second call with other rows finds what the first one wrote
    other = (rows + 11) % 40
    second = other[:, None, :, None].expand(-1, 4, -1, 72)
    mixed_k, mixed_v = mixed_k.scatter(2, second, v_new), mixed_v.scatter(2, second, k_new)
    got = EVERY[backend](q, v_new, k_new, other, k, v, None, False, 72**-0.5)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, mixed_k, mixed_v), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close((k, v), (mixed_k, mixed_v), atol=0, rtol=0)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("causal", [False, True])
def test_order_and_padding_of_the_rows_do_not_matter(nan_filled, backend, causal):
    q, k_new, v_new, rows, k, v = make(1, 2, 1, 6, 30, 64, device=DEVICE)
    first_k, first_v = k.clone(), v.clone()
    want = EVERY[backend](q, k_new, v_new, rows, first_k, first_v, None, causal, 0.125)
    order = torch.tensor([3, 0, 5, 1, 4, 2], device=DEVICE)
    places = torch.tensor([1, 2, 4, 5, 7, 8], device=DEVICE)
    more_q, more_k, more_v = (torch.full((*x.shape[:2], 9, 64), torch.nan, device=DEVICE) for x in (q, k_new, v_new))
    more_rows = torch.full((1, 9), -1, device=DEVICE)
    for target, source in ((more_q, q), (more_k, k_new), (more_v, v_new)):
        target[:, :, places] = source[:, :, order]
    more_rows[:, places] = rows[:, order]
    got = EVERY[backend](more_q, more_k, more_v, more_rows, k, v, None, causal, 0.125)
    torch.testing.assert_close(got[:, :, places], want[:, :, order])
    assert got[:, :, more_rows[0] < 0].eq(0).all()
    torch.testing.assert_close((k, v), (first_k, first_v), atol=0, rtol=0)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize("causal", [False, True])
def test_a_padded_batch_equals_single_items_and_nan_in_padding_does_not_leak(nan_filled, backend, causal):
    lengths, N, m = (30, 66, 70), 70, 9
    q, k_new, v_new, _, k, v = make(3, 4, 2, m, N, 64, device=DEVICE)
    rows = torch.full((3, m), -1, device=DEVICE)
    ok = torch.arange(N, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
    want = []
    for b, n in enumerate(lengths):
        active = torch.randperm(n, generator=torch.Generator().manual_seed(b))[: m - b].to(DEVICE)
        rows[b, : m - b] = active
        q[b, :, m - b :], k_new[b, :, m - b :], v_new[b, :, m - b :] = torch.nan, torch.nan, torch.nan
        k[b, :, n:], v[b, :, n:] = torch.nan, torch.nan
        one = [x[b : b + 1, :, : m - b] for x in (q, k_new, v_new)]
        caches = [x[b : b + 1, :, :n].clone() for x in (k, v)]
        want.append(EVERY[backend](*one, active[None], *caches, None, causal, 0.1))
    got = EVERY[backend](q, k_new, v_new, rows, k, v, ok, causal, 0.1)
    for b in range(3):
        torch.testing.assert_close(got[b, :, : m - b], want[b][0])
        assert got[b, :, m - b :].eq(0).all()


@pytest.mark.parametrize("backend", EVERY)
def test_nan_that_takes_part_shows(nan_filled, backend):
    q, k_new, v_new, rows, k, v = make(4, 2, 2, 3, 9, 64, device=DEVICE)
    q[0, 0, 1], k_new[1, 1, 0], k[3, 0, 0, 0] = torch.nan, torch.nan, 1.0
    v[2, 0, next(j for j in range(9) if j not in rows[2].tolist())] = torch.nan
    got = EVERY[backend](q, k_new, v_new, rows, k, v, None, False, 0.1).isnan()
    assert got[0, 0, 1].all()
    assert got.sum((1, 2, 3)).tolist() == [64, 3 * 64, 3 * 64, 0]


@pytest.mark.parametrize("backend", EVERY)
def test_nothing_to_do(nan_filled, backend):
    for B, H, m, N in ((0, 2, 3, 3), (2, 2, 0, 3), (2, 2, 0, 0)):
        q, k_new, v_new, rows, k, v = make(B, H, H, m, N, 64, device=DEVICE)
        before = k.clone()
        assert EVERY[backend](q, k_new, v_new, rows, k, v, None, False, 1.0).shape == (B, H, m, 64)
        torch.testing.assert_close(k, before)
    q, k_new, v_new, rows, k, v = make(2, 2, 2, 3, 5, 64, device=DEVICE)
    before = k.clone(), v.clone()
    got = EVERY[backend](q, k_new, v_new, torch.full_like(rows, -1), k, v, None, False, 1.0)
    assert got.eq(0).all()
    torch.testing.assert_close((k, v), before, atol=0, rtol=0)
    nothing = torch.tensor([[False] * 5, [True] * 5], device=DEVICE)
    got = EVERY[backend](q, k_new, v_new, rows, k, v, nothing, True, 1.0)
    assert got[0].eq(0).all()
    assert got[1].ne(0).any(-1).all()


@pytest.mark.parametrize("causal", [False, True])
def test_triton_takes_rows_that_do_not_exist_as_padding(on_triton, causal):
    q, k_new, v_new, rows, k, v = make(1, 2, 2, 70, 80, 64, device=DEVICE)
    rows[0, 3:] = -1  # a whole block of queries has nothing to do
    want_k, want_v = k.clone(), v.clone()
    want = torch.ops.mmaccel.partial_row_attention(q, k_new, v_new, rows, want_k, want_v, None, causal, 0.1)
    rows[0, 5:8] = torch.tensor([80, -7, 2**40])
    got = torch.ops.mmaccel.partial_row_attention(q, k_new, v_new, rows, k, v, None, causal, 0.1)
    torch.testing.assert_close(got, want, atol=0, rtol=0)
    torch.testing.assert_close((k, v), (want_k, want_v), atol=0, rtol=0)
    assert got[:, :, 3:].eq(0).all()


@pytest.mark.parametrize("backend", EVERY)
def test_huge_logits_do_not_overflow(nan_filled, backend):
    q, k_new, v_new, rows, k, v = make(1, 1, 1, 4, 70, 64, device=DEVICE)
    got = EVERY[backend](q * 1e4, k_new, v_new, rows, k, v, None, False, -1.0)
    best = (-q @ k.mT)[0, 0].argmax(1)
    torch.testing.assert_close(got[0, 0], v[0, 0, best])


def test_rows_may_be_shared_by_all_items():
    q, k_new, v_new, rows, k, v = make(2, 2, 2, 4, 9, 8)
    shared = copied((k, v))
    got = partial_row_attention(q, k_new, v_new, rows[0], *shared, scale=0.2)
    torch.testing.assert_close(got, partial_row_attention(q, k_new, v_new, rows[:1].expand(2, -1), k, v, scale=0.2))
    torch.testing.assert_close(shared, [k, v], atol=0, rtol=0)
    default = partial_row_attention(q, None, None, rows, k, v)
    torch.testing.assert_close(default, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("new", [(True, True), (False, True), (False, False)])
def test_opcheck(new):
    q, k_new, v_new, rows, k, v = make(2, 4, 2, 3, 5, 4)
    rows[0, 1] = -1
    new = [x if there else None for x, there in zip((k_new, v_new), new, strict=True)]
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    for causal, ok in ((False, None), (True, mask)):
        torch.library.opcheck(torch.ops.mmaccel.partial_row_attention.default, (q, *new, rows, k, v, ok, causal, 0.5))


def test_compiles_to_one_graph_that_writes_the_callers_caches():
    q, k_new, v_new, rows, k, v = make(2, 4, 2, 3, 8, 4)

    def step(q, k_new, v_new, rows, k, v):
        first = partial_row_attention(q, k_new + 1, v_new, rows, k, v, causal=True)
        return first + partial_row_attention(q, None, v_new * 2, rows, k, v) + k.sum()

    eager, compiled = (k.clone(), v.clone()), (k.clone(), v.clone())
    want = step(q, k_new, v_new, rows, *eager)
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(q, k_new, v_new, rows, *compiled)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(compiled, eager, atol=0, rtol=0)
    assert not torch.equal(eager[0], k)


def test_wrong_arguments():
    q, k_new, v_new, rows, k, v = make(2, 4, 2, 3, 6, 4)
    before = k.clone()
    right = {"q": q, "k_new": k_new, "v_new": v_new, "rows": rows, "k_cache": k, "v_cache": v}
    wrong = [
        ("q must be", {"q": q[0]}),
        ("q must be", {"q": q[:1]}),
        ("one length", {"q": q[..., :3]}),
        ("multiple of", {"q": q[:, :3]}),
        ("share a floating dtype", {"q": q.double()}),
        ("share a floating dtype", {name: x if name == "rows" else x.int() for name, x in right.items()}),
        ("k_new must be", {"k_new": k_new[:, :, :2]}),
        ("v_new must be", {"v_new": v_new[..., :2]}),
        ("equal in B, Hkv and N", {"v_cache": v[:, :, :5]}),
        ("expanded", {"k_cache": k[:1].expand(2, -1, -1, -1)}),
        ("rows must be int64", {"rows": rows.int()}),
        ("rows must be int64", {"rows": rows[:, :2]}),
        ("rows must be int64", {"rows": rows[:1]}),
        ("rows must lie", {"rows": rows.clamp(min=-1) + 6}),
        ("rows must lie", {"rows": torch.full_like(rows, -2)}),
        ("key_padding", {"key_padding": torch.ones(2, 3, dtype=torch.bool)}),
        ("key_padding", {"key_padding": torch.ones(2, 6)}),
    ]
    for message, arguments in wrong:
        with pytest.raises(MethodError, match=message):
            partial_row_attention(**{**right, **arguments})
    torch.testing.assert_close(k, before, atol=0, rtol=0)


def test_the_record_and_what_triton_cannot_take(monkeypatch):
    monkeypatch.delenv("MMACCEL_KERNELS", raising=False)
    arguments = make(1, 2, 2, 3, 4, 8)
    with kernels.recording() as events:
        partial_row_attention(*arguments)
    assert events == [kernels.Event("partial_row_attention", "torch", None)]
    with kernels.use("triton"):
        if DEVICE == "cpu":
            with kernels.recording() as events:
                partial_row_attention(*arguments)
            assert events == [kernels.Event("partial_row_attention", "triton", None)]
        with pytest.raises(NotApplicableError, match=r"300 channels in torch\.float16 are above 256"):
            partial_row_attention(*make(1, 2, 2, 3, 4, 8, 300, dtype=torch.float16))
        with pytest.raises(NotApplicableError, match=r"129 channels in torch\.float32 are above 128"):
            partial_row_attention(*make(1, 2, 2, 3, 4, 8, 129))
        with pytest.raises(NotApplicableError, match="float64 has no Triton path"):
            partial_row_attention(*make(1, 2, 2, 3, 4, 8, dtype=torch.float64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "H", "Hkv", "m", "N", "D", "causal"),
    [(4, 16, 16, 182, 729, 72, False), (1, 12, 12, 2048, 8192, 128, False), (2, 14, 2, 1600, 6309, 64, True),
     (1, 4, 4, 100, 1000, 256, False)],
)  # fmt: skip
def test_full_shapes_on_a_gpu(on_triton, dtype, B, H, Hkv, m, N, D, causal):
    gpu_only()
    if dtype == torch.float32 and D > 128:
        pytest.skip("no Triton path")
    arguments = (*make(B, H, Hkv, m, N, D, dtype=dtype, device=DEVICE), None, causal, D**-0.5)
    exact_inputs, low_inputs = doubled(arguments), copied(arguments)
    exact = reference.partial_row_attention(*exact_inputs)
    got = torch.ops.mmaccel.partial_row_attention(*arguments)
    as_good_as(got, low_precision(*low_inputs), exact, floor=2e-6)
    torch.testing.assert_close(arguments[4].double(), exact_inputs[4], atol=0, rtol=0)
