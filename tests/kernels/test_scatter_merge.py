from __future__ import annotations

import pytest
import torch
from harness import DEVICE, DTYPES, as_good_as, covering, describe, gpu_only, strided

from mmaccel import kernels
from mmaccel.errors import MethodError, NotApplicableError
from mmaccel.kernels.scatter_merge import cpu, reference, scatter_merge, unmerge


def make(B, N, D, K, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, N, D, generator=g, dtype=torch.float64).to(dtype)
    assignment = torch.randint(-1, K, (B, N), generator=g)
    return x, assignment, torch.rand(B, N, generator=g)


def on_device(*tensors):
    return [x.to(DEVICE) for x in tensors]


def naive(x, assignment, weight, K):
    B, N, D = x.shape
    out = torch.zeros(B, K, D, dtype=torch.float64)
    for b in range(B):
        for n in range(N):
            for d in range(D):
                if assignment[b, n] >= 0:
                    out[b, int(assignment[b, n]), d] += float(weight[b, n]) * float(x[b, n, d])
    return out


@pytest.mark.parametrize("implementation", [reference, cpu])
@pytest.mark.parametrize(("B", "N", "D", "K"), [(1, 1, 1, 1), (2, 7, 3, 4), (3, 9, 2, 1), (1, 4, 2, 9), (2, 3, 2, 0)])
def test_equals_the_loops(implementation, B, N, D, K):
    x, assignment, weight = make(B, N, D, K)
    merged = naive(x, assignment, weight, K)
    torch.testing.assert_close(implementation.scatter_merge(x, assignment, weight, K), merged)
    torch.testing.assert_close(scatter_merge(x, assignment, weight, K), merged)
    back = torch.zeros(B, N, D, dtype=torch.float64)
    for b in range(B):
        for n in range(N):
            if assignment[b, n] >= 0:
                back[b, n] = merged[b, assignment[b, n]]
    assert torch.equal(implementation.unmerge(merged, assignment), back)
    assert torch.equal(unmerge(merged, assignment), back)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("block", [1, 30, 64, 1 << 19])
def test_every_block_size_gives_the_reference(monkeypatch, dtype, block):
    monkeypatch.setattr(cpu, "_BLOCK", block)
    x, assignment, weight = make(3, 13, 8, 5, dtype)
    for tokens in (x, strided(x), x[:1].expand(3, -1, -1)):
        got = cpu.scatter_merge(tokens, assignment, weight, 5)
        assert got.dtype == dtype
        assert torch.equal(got, reference.scatter_merge(tokens, assignment, weight, 5))


def test_weighted_tokens_are_not_all_held_at_once(monkeypatch):
    x, assignment, weight = make(1, 400, 8, 3, torch.bfloat16)
    largest = []
    add = torch.Tensor.index_add_

    def watched(out, dim, index, source):
        largest.append(source.numel())
        return add(out, dim, index, source)

    monkeypatch.setattr(cpu, "_BLOCK", 256)
    monkeypatch.setattr(torch.Tensor, "index_add_", watched)
    cpu.scatter_merge(x, assignment, weight, 3)
    assert max(largest) <= 256
    assert sum(largest) == x.numel()


CASES = covering(
    B=[1, 2],
    N=[1, 7, 65, 129],
    D=[1, 72, 512, 515],
    K=[1, 5, 40],
    dtype=DTYPES,
    layout=["plain", "strided", "token-major"],
    deterministic=[False, True],
)


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_triton_is_as_good_as_torch_in_the_same_dtype(on_triton, case):
    K = case["K"]
    x, assignment, weight = on_device(*make(case["B"], case["N"], case["D"], K, case["dtype"]))
    if case["layout"] == "strided":
        x, assignment, weight = strided(x), strided(assignment), strided(weight)
    elif case["layout"] == "token-major":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    got = scatter_merge(x, assignment, weight, K, deterministic=case["deterministic"])
    assert got.dtype == x.dtype
    exact = reference.scatter_merge(x.double(), assignment, weight.double(), K)
    # the matrix that sums, in the dtype of the tokens, is how a merge is written without a scatter
    onto = (assignment[:, None] == torch.arange(K, device=DEVICE)[:, None]) * weight[:, None]
    low = onto.to(x.dtype) @ x
    as_good_as(got, low, exact, floor=2e-6)
    back = unmerge(got, assignment)
    assert torch.equal(back, reference.unmerge(got, assignment))
    assert torch.equal(cpu.unmerge(got, assignment), back)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_alone_pass_bit_for_bit(nan_filled, backend, deterministic, dtype):
    x = torch.randn(2, 9, 70, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    g = torch.Generator().manual_seed(1)
    order = torch.stack([torch.randperm(12, generator=g)[:9] for _ in range(2)]).to(DEVICE)
    with kernels.use(backend):
        ones = torch.ones(2, 9, device=DEVICE)
        assert torch.equal(unmerge(scatter_merge(x, order, ones, 12, deterministic=deterministic), order), x)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_nan_shows_where_it_goes_and_nowhere_else(nan_filled, backend, deterministic):
    x, assignment, weight = on_device(*make(2, 20, 6, 3, torch.float32))
    with kernels.use(backend):
        clean = scatter_merge(x, assignment, weight, 3, deterministic=deterministic)
        hurt, share = x.clone(), weight.clone()
        hurt[assignment < 0], share[assignment < 0] = torch.nan, torch.inf
        torch.testing.assert_close(scatter_merge(hurt, assignment, share, 3, deterministic=deterministic), clean)
        at = int((assignment[1] >= 0).nonzero()[0])
        hurt[1, at, 2] = torch.nan
        got = scatter_merge(hurt, assignment, share, 3, deterministic=deterministic)
        assert got.isnan().nonzero().tolist() == [[1, int(assignment[1, at]), 2]]
        back = unmerge(got, assignment)
        assert torch.equal(back.isnan().any(2), (assignment == assignment[1, at]) & (assignment >= 0) & at_item(1, 2))


def at_item(b, B):
    return torch.arange(B, device=DEVICE)[:, None] == b


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_nothing_to_merge(nan_filled, backend, deterministic):
    x = torch.ones(2, 5, 3, device=DEVICE)
    nowhere, weight = torch.full((2, 5), -1, device=DEVICE), torch.ones(2, 5, device=DEVICE)
    with kernels.use(backend):
        got = scatter_merge(x, nowhere, weight, 4, deterministic=deterministic)
        assert got.shape == (2, 4, 3)
        assert got.eq(0).all()
        assert scatter_merge(x, nowhere, weight, 0, deterministic=deterministic).shape == (2, 0, 3)
        assert unmerge(x[:, :0], nowhere).eq(0).all()
        assert unmerge(x, nowhere).eq(0).all()
        assert unmerge(x, nowhere[:, :0]).shape == (2, 0, 3)
        for tokens in (x[:, :0], x[:0], x[..., :0]):
            B, N, D = tokens.shape
            got = scatter_merge(tokens, nowhere[:B, :N], weight[:B, :N], 4, deterministic=deterministic)
            assert got.shape == (B, 4, D)
            assert got.eq(0).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_output_of_many_tokens(nan_filled, backend):
    # eight tokens a step, so that one output is summed in one step and another in several
    x = torch.randint(-8, 8, (1, 40, 5), generator=torch.Generator().manual_seed(0)).float().to(DEVICE)
    assignment = (torch.arange(40, device=DEVICE)[None] % 7 == 0).long()
    with kernels.use(backend):
        got = scatter_merge(x, assignment, torch.ones(1, 40, device=DEVICE), 2, deterministic=True)
    assert torch.equal(got, torch.stack([x[assignment == k].sum(0) for k in (0, 1)])[None])


def test_only_the_atomic_way_adds_atomically(on_triton, monkeypatch):
    from mmaccel.kernels.scatter_merge import triton

    class Watched:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(triton, name)

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    launched = []
    for name in ("_atomic_kernel", "_ordered_kernel"):
        monkeypatch.setattr(triton, name, Watched(name))
    x, assignment, weight = on_device(*make(1, 3, 2, 2, torch.float32))
    for deterministic in (False, True):
        scatter_merge(x, assignment, weight, 2, deterministic=deterministic)
    assert launched == ["_atomic_kernel", "_ordered_kernel"]


def test_none_follows_torch(monkeypatch):
    from mmaccel.kernels.scatter_merge import triton

    seen = []
    monkeypatch.setattr(triton, "scatter_merge", lambda *arguments: seen.append(arguments[-1]) or arguments[0])
    x, assignment, weight = on_device(*make(1, 3, 2, 2, torch.float32))
    before = torch.are_deterministic_algorithms_enabled()
    try:
        with kernels.use("triton"):
            for asked in (False, True):
                torch.use_deterministic_algorithms(asked)
                scatter_merge(x, assignment, weight, 3)
                scatter_merge(x, assignment, weight, 3, deterministic=not asked)
    finally:
        torch.use_deterministic_algorithms(before)
    assert seen == [False, True, True, False]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_record(backend):
    x, assignment, weight = on_device(*make(1, 3, 2, 3, torch.float32))
    with kernels.use(backend), kernels.recording() as events:
        unmerge(scatter_merge(x, assignment, weight, 3), assignment)
    assert events == [kernels.Event("scatter_merge", backend, None), kernels.Event("unmerge", backend, None)]
    with kernels.use("triton"), pytest.raises(NotApplicableError, match="float64 has no Triton path"):
        scatter_merge(x.double(), assignment, weight, 3)
    with kernels.use("triton"):
        assert torch.equal(unmerge(x.double(), assignment), unmerge(x, assignment).double())


def test_gradients_take_the_torch_path():
    x, assignment, weight = on_device(*make(2, 5, 3, 4, torch.float32))
    x.requires_grad_()
    unmerge(scatter_merge(x, assignment, weight, 4), assignment).sum().backward()
    members = ((assignment[:, :, None] == assignment[:, None]) & (assignment >= 0)[..., None]).sum(2)
    torch.testing.assert_close(x.grad, (weight * members)[..., None].expand_as(x))
    with kernels.use("triton"), pytest.raises(NotApplicableError, match="no backward"):
        scatter_merge(x, assignment, weight, 4)
    with kernels.use("triton"), pytest.raises(NotApplicableError, match="no backward"):
        unmerge(x, assignment)


def test_wrong_arguments():
    x, assignment, weight = make(2, 5, 3, 4, torch.float32)
    for arguments in (
        (x[0], assignment, weight, 4),
        (x.long(), assignment, weight, 4),
        (x, assignment.int(), weight, 4),
        (x, assignment[:, :4], weight, 4),
        (x, assignment[:1], weight, 4),
        (x, assignment, weight[:, :4], 4),
        (x, assignment, weight.double(), 4),
        (x.to("meta"), assignment, weight, 4),
        (x, assignment, weight.to("meta"), 4),
        (x, assignment, weight, -1),
        (x, assignment + 5, weight, 4),
        (x, assignment - 5, weight, 4),
    ):
        with pytest.raises(MethodError):
            scatter_merge(*arguments)
    for arguments in ((x[0], assignment), (x, assignment[:1]), (x, assignment + 5), (x, assignment[0])):
        with pytest.raises(MethodError):
            unmerge(*arguments)


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        x, assignment, weight = make(2, 7, 3, 4, dtype)
        for deterministic in (False, True):
            arguments = (x, assignment, weight, 4, deterministic)
            torch.library.opcheck(torch.ops.mmaccel.scatter_merge.default, arguments)
        torch.library.opcheck(torch.ops.mmaccel.unmerge.default, (x, assignment.clamp_max(2)))


def test_compiles_to_one_graph():
    x, assignment, weight = make(2, 7, 3, 4, torch.float32)

    def round_trip(x, assignment, weight):
        return unmerge(scatter_merge(x, assignment, weight, 4) * 2, assignment)

    compiled = torch.compile(round_trip, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, assignment, weight), round_trip(x, assignment, weight))


def test_an_output_outside_is_left_out(on_triton):
    # the public function rejects it on a CPU, and cannot wait for the values on a GPU
    x, weight = torch.ones(2, 3, 4, device=DEVICE), torch.ones(2, 3, device=DEVICE)
    assignment = torch.tensor([[0, 2, -5], [2, 9, 0]], device=DEVICE)
    for deterministic in (False, True):
        got = torch.ops.mmaccel.scatter_merge(x, assignment, weight, 2, deterministic)
        assert got[..., 0].tolist() == [[1, 0], [1, 0]]
    assert torch.ops.mmaccel.unmerge(x, assignment)[..., 0].tolist() == [[1, 1, 0], [1, 0, 1]]


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("B", "N", "D", "K"), [(1, 6272, 3584, 940), (8, 729, 1152, 64), (2, 65000, 3584, 30000)])
def test_full_shapes_on_a_gpu(on_triton, deterministic, B, N, D, K):
    gpu_only()
    x, assignment, weight = on_device(*make(B, N, D, K, torch.bfloat16))
    got = scatter_merge(x, assignment, weight, K, deterministic=deterministic)
    exact = reference.scatter_merge(x.double(), assignment, weight.double(), K)
    # rounded once, from sums in float32
    as_good_as(got, exact.bfloat16(), exact, floor=2e-5)
    if deterministic:
        assert torch.equal(got, scatter_merge(x, assignment, weight, K, deterministic=True))
    assert torch.equal(unmerge(got, assignment), reference.unmerge(got, assignment))
