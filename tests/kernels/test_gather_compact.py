from __future__ import annotations

import pytest
import torch
from harness import DEVICE, DTYPES, covering, describe, gpu_only, strided

from mmaccel import kernels
from mmaccel.errors import MethodError, NotApplicableError
from mmaccel.kernels.gather_compact import cpu, gather_compact, reference


def tensors(B, S, C, dtype, seed=0):
    """Rows of three kinds, position ids of two, masks of two; some are shared by the items."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, S, C, generator=g).to(dtype)
    cos, sin = (torch.randn(shared, S, 8, generator=g) for shared in (1, B))
    plain = torch.randint(0, 1 << 40, (B, S), generator=g)
    axes = torch.randint(0, 1 << 40, (3, 1, S), generator=g)
    ones, bits = torch.ones(1, S, dtype=torch.int64), torch.rand(B, S, generator=g) > 0.5
    return [hidden, cos, sin], [plain, axes], [ones, bits]


def chosen(B, S, L, seed=1):
    g = torch.Generator().manual_seed(seed)
    index = torch.randint(0, S, (B, L), generator=g)
    valid = torch.arange(L).expand(B, L) >= torch.randint(0, L // 2 + 1, (B, 1), generator=g)
    return index, valid


def on_device(*groups):
    return [[x.to(DEVICE) for x in group] if isinstance(group, list) else group.to(DEVICE) for group in groups]


def same_bits(got, expected):
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert a.is_contiguous()
        assert torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))


def naive(index, valid, rows, columns, masks):
    B, L = index.shape
    out = [torch.stack([torch.stack([x[b % len(x), i] for i in index[b]]) for b in range(B)]) for x in rows]
    for x in columns + masks:
        moved = torch.zeros(*x.shape[:-2], B, L, dtype=x.dtype)
        for b in range(B):
            for j in range(L):
                if valid[b, j] or not any(x is mask for mask in masks):
                    moved[..., b, j] = x[..., b % x.shape[-2], index[b, j]]
        out.append(moved)
    return out


@pytest.mark.parametrize("implementation", [reference, cpu])
@pytest.mark.parametrize(("B", "S", "L", "C"), [(1, 1, 1, 1), (2, 7, 5, 3), (3, 4, 9, 2)])
def test_equals_the_loops(implementation, B, S, L, C):
    index, valid = chosen(B, S, L)
    rows, columns, masks = tensors(B, S, C, torch.float32)
    expected = naive(index, valid, rows, columns, masks)
    same_bits(implementation.gather_compact(index, valid, rows, columns, masks), expected)
    same_bits(gather_compact(index, valid, rows=rows, columns=columns, masks=masks), expected)


CASES = covering(
    B=[1, 2],
    S=[1, 7, 65, 700],
    L_C=[(1, 1), (7, 72), (129, 48), (7, 1024), (65, 513), (600, 1)],
    dtype=[*DTYPES, torch.float64, torch.int64, torch.bool],
    layout=["plain", "strided", "token-major"],
    padded=[False, True],
)


@pytest.mark.parametrize("case", CASES, ids=describe)
def test_triton_equals_torch_bit_for_bit(on_triton, case):
    B, S, (L, C) = case["B"], case["S"], case["L_C"]
    index, valid = chosen(B, S, L)
    rows, columns, masks = tensors(B, S, C, case["dtype"])
    if case["layout"] == "strided":
        rows, columns, masks = ([strided(x) for x in group] for group in (rows, columns, masks))
        index = strided(index)
    elif case["layout"] == "token-major":
        rows = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in rows]
        columns = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in columns]
    if not case["padded"]:
        valid = None
    index, rows, columns, masks = on_device(index, rows, columns, masks)
    valid = None if valid is None else valid.to(DEVICE)
    expected = reference.gather_compact(index, valid, rows, columns, masks)
    same_bits(gather_compact(index, valid, rows=rows, columns=columns, masks=masks), expected)
    same_bits(cpu.gather_compact(index, valid, rows, columns, masks), expected)


def test_nan_payloads_and_the_sign_of_zero_are_moved_as_they_are(on_triton):
    bits = torch.tensor([[0x7FC1, 0x8000, 0x7F80, 0x0001, 0xFFFF, 0x7F81]], dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16).reshape(1, 6, 1).to(DEVICE)
    index = torch.tensor([[4, 0, 1, 5]], device=DEVICE)
    got = gather_compact(index, rows=[x])[0]
    assert torch.equal(got.view(torch.int16), x[:, index[0]].view(torch.int16))


def test_one_launch_moves_everything(on_triton, monkeypatch):
    from mmaccel.kernels.gather_compact import triton

    launches = []

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    kernel = triton._gather_kernel
    monkeypatch.setattr(triton, "_gather_kernel", Counted())
    index, valid = chosen(2, 9, 5)
    rows, columns, masks = tensors(2, 9, 40, torch.float16)
    index, valid, rows, columns, masks = on_device(index, valid, rows, columns, masks)
    gather_compact(index, valid, rows=rows, columns=columns, masks=masks)
    assert len(launches) == 1


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nothing_to_move(nan_filled, backend):
    index, valid = on_device(*chosen(2, 5, 4))
    with kernels.use(backend):
        assert gather_compact(index, valid) == ()
        x = torch.ones(2, 5, 3, device=DEVICE)
        assert gather_compact(index[:, :0], rows=[x])[0].shape == (2, 0, 3)
        assert gather_compact(index[:0], rows=[x[:1], x[:0]])[0].shape == (0, 4, 3)
        assert gather_compact(index, rows=[x[..., :0]], columns=[x[..., 0]])[1].shape == (2, 4)
        assert gather_compact(index, columns=[x.new_empty(0, 2, 5)])[0].shape == (0, 2, 4)
        assert gather_compact(index[:, :0], rows=[x[:, :0]], columns=[x[:, :0, 0]])[1].shape == (2, 0)
        nothing = torch.zeros_like(valid)
        moved, mask = gather_compact(index, nothing, rows=[x], masks=[x[..., 0]])
        assert moved.eq(1).all()
        assert mask.eq(0).all()


def test_rows_of_any_shape():
    index, _ = chosen(2, 6, 4)
    for shape in ((2, 6), (1, 6), (2, 6, 3, 5), (1, 6, 2, 0)):
        x = torch.randn(shape)
        got = gather_compact(index, rows=[x])[0]
        assert torch.equal(got, torch.stack([x[b % len(x), index[b]] for b in range(2)]))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_record(monkeypatch, backend):
    monkeypatch.delenv("MMACCEL_KERNELS", raising=False)
    index = torch.tensor([[0, 2]], device=DEVICE)
    x = torch.randn(1, 3, 2, device=DEVICE, dtype=torch.float64)
    with kernels.use(backend), kernels.recording() as events:
        gather_compact(index, rows=[x])
    assert events == [kernels.Event("gather_compact", backend, None)]


def test_gradients_take_the_torch_path():
    index = torch.tensor([[0, 2, 0]], device=DEVICE)
    x = torch.randn(1, 3, 2, device=DEVICE, requires_grad=True)
    gather_compact(index, rows=[x])[0].sum().backward()
    assert x.grad.tolist() == [[[2, 2], [0, 0], [1, 1]]]
    with kernels.use("triton"):
        with pytest.raises(NotApplicableError, match="no backward"):
            gather_compact(index, rows=[x])
        with torch.no_grad():
            gather_compact(index, rows=[x])


def test_wrong_arguments():
    index, valid = chosen(2, 5, 3)
    x, position = torch.ones(2, 5, 4), torch.ones(2, 5)
    for arguments in (
        (index[0], None, [x], []),
        (index.int(), None, [x], []),
        (index, valid[:, :2], [x], []),
        (index, valid.int(), [x], []),
        (index, valid, [x[0, 0]], []),
        (index, valid, [x[:, :4]], [position]),
        (index, valid, [x.repeat(2, 1, 1)], []),
        (index, valid, [], [position[0]]),
        (index, valid, [], [position.repeat(2, 1)]),
        (index, valid, [x.to("meta")], []),
        (index + 5, valid, [x], []),
        (index - 5, valid, [], [position]),
    ):
        index_, valid_, rows, columns = arguments
        with pytest.raises(MethodError):
            gather_compact(index_, valid_, rows=rows, columns=columns)
        with pytest.raises(MethodError):
            gather_compact(index_, valid_, rows=rows, masks=columns)


def test_opcheck():
    index, valid = chosen(2, 6, 4)
    rows, columns, masks = tensors(2, 6, 5, torch.float32)
    for groups in ((rows, columns, masks), ([rows[0].mT.contiguous().mT], [], masks)):
        torch.library.opcheck(torch.ops.mmaccel.gather_compact.default, (index, valid, *groups))
    torch.library.opcheck(torch.ops.mmaccel.gather_compact.default, (index, None, rows, columns, []))


def test_compiles_to_one_graph():
    index, valid = chosen(2, 6, 4)
    rows, columns, masks = tensors(2, 6, 5, torch.float32)

    def moved(index, valid, rows, columns, masks):
        hidden, cos, *_, mask = gather_compact(index, valid, rows=rows, columns=columns, masks=masks)
        return hidden * 2, cos + 1, mask

    compiled = torch.compile(moved, backend="aot_eager", fullgraph=True)
    same_bits(compiled(index, valid, rows, columns, masks), moved(index, valid, rows, columns, masks))


def test_a_place_outside_gives_zero(on_triton):
    # the public function rejects it on a CPU, and cannot wait for the values on a GPU
    index, x = torch.tensor([[0, -1, 3]], device=DEVICE), torch.ones(1, 3, 2, device=DEVICE)
    rows, columns = torch.ops.mmaccel.gather_compact(index, None, [x], [x[..., 0]], [])
    assert rows.tolist() == [[[1, 1], [0, 0], [0, 0]]]
    assert columns.tolist() == [[1, 0, 0]]


@pytest.mark.gpu
@pytest.mark.parametrize(("B", "S", "L", "C"), [(1, 6309, 977, 3584), (4, 6309, 1001, 896), (2, 70000, 65000, 3584)])
def test_full_shapes_on_a_gpu(on_triton, B, S, L, C):
    gpu_only()
    index, valid = on_device(*chosen(B, S, L))
    rows, columns, masks = on_device(*tensors(B, S, C, torch.bfloat16))
    got = gather_compact(index, valid, rows=rows, columns=columns, masks=masks)
    same_bits(got, reference.gather_compact(index, valid, rows, columns, masks))
