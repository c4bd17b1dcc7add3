"""Random weights that are cheap, seeded, of the right type at once, and strong enough to matter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

# A prime, so that the rows of a large matrix, cut from the repeated bank, do not line up with each other.
BANK = 1_000_003


def build_random(
    cls: Any,
    config: PretrainedConfig,
    *,
    seed: int,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
) -> Any:
    """Build a transformers model of class `cls` with random weights of `dtype` and without a pass over float32 ones.

    Parameters are born on the meta device and then filled on `device`; buffers are computed as always, on the CPU, so
    rotary frequencies stay exact and stay float32. The model comes back in eval mode with SDPA attention; a model that
    generates does so greedily and without an end token.
    """
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = cls._from_config(config, dtype=dtype, attn_implementation="sdpa")
    allocate(model, device)
    model.tie_weights()
    randomise(model, seed=seed)
    if model.can_generate():
        model.generation_config.eos_token_id = None
        model.generation_config.do_sample = False
    return model.eval()


def allocate(model: nn.Module, device: str | torch.device = "cpu") -> None:
    """Replace each parameter on the meta device by an empty one on `device`; shared parameters stay shared."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.is_meta and id(parameter) not in made:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                made[id(parameter)] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
            setattr(module, name, made.get(id(parameter), parameter))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


@torch.no_grad()
def randomise(model: nn.Module, *, seed: int) -> None:
    """Fill every parameter from one bank of normal numbers, in the order of `named_parameters`.

    Matrices and convolutions get a standard deviation of `1 / sqrt(fan-in)`, tables of embeddings 1 (unless an output
    head shares them), norm weights 1 +- 0.1, biases 0.1 and free vectors (class token, newline, position tables, layer
    scales) 0.5. With that, a tiny model feels the loss of one token by 1e-2 in its logits, and float32 rounding by
    some 1e-6: a wrong token and a wrong last digit can be told apart. Parameters larger than the bank repeat it, which
    is good enough for measuring speed.
    """
    from torch import nn

    first = next(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    bank = torch.randn(BANK, generator=generator).to(first.device, first.dtype)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    tables -= {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    cursor = 0
    for name, parameter in model.named_parameters():
        mean, std = 0.0, 0.5
        if id(parameter) in tables:
            std = 1.0
        elif name.endswith("bias"):
            std = 0.1
        elif name.endswith("weight") and parameter.ndim > 1:
            std = (parameter.shape[0] / parameter.numel()) ** 0.5
        elif name.endswith(("weight", "gamma")):
            mean, std = 1.0, 0.1
        cursor = _fill(parameter.view(-1), bank, cursor, mean, std)


def _fill(flat: torch.Tensor, bank: torch.Tensor, cursor: int, mean: float, std: float) -> int:
    done = 0
    while done < flat.numel():
        length = min(flat.numel() - done, bank.numel() - cursor)
        torch.mul(bank[cursor : cursor + length], std, out=flat[done : done + length])
        done += length
        cursor = (cursor + length) % bank.numel()
    if mean:
        flat.add_(mean)
    return cursor
