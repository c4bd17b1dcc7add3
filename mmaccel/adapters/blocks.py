"""Blocks of the vision encoders of transformers, timm and open_clip, taken apart by how they are built."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mmaccel.core.block import Block, Map, heads_of, tokens_of
from mmaccel.errors import AdapterError

__all__ = ["take_apart"]


def take_apart(block: nn.Module) -> Block:
    """The parts of one block.

    Raises:
        AdapterError: it is built in a way that is not known here.
    """
    for fits, made in _KINDS:
        if fits(block):
            return made(block)
    raise AdapterError(
        f"{type(block).__name__} is no block that mmaccel can take apart; it knows those of CLIP, SigLIP, SigLIP2, "
        "InternViT, Qwen-VL, timm and open_clip."
    )


def _has(*paths: str) -> Callable[[nn.Module], bool]:
    def fits(block: nn.Module) -> bool:
        for path in paths:
            found: Any = block
            for name in path.split("."):
                found = getattr(found, name, None)
            if found is None:
                return False
        return True

    return fits


def _third(linear: Any, part: int, weight: torch.Tensor | None, bias: torch.Tensor | None) -> Map:
    """One third of a joined projection to queries, keys and values."""
    if weight is None:  # not a plain linear layer (quantised, or with an adapter on it): only it knows how to compute
        return lambda x: linear(x).chunk(3, -1)[part]
    width = weight.shape[0] // 3
    rows = slice(part * width, (part + 1) * width)
    return lambda x: F.linear(x, weight[rows], None if bias is None else bias[rows])


def _joined(linear: Any) -> list[Map]:
    plain = type(linear) is nn.Linear
    return [_third(linear, i, linear.weight if plain else None, linear.bias if plain else None) for i in range(3)]


def _only(block: nn.Module, parts: dict[str, str]) -> None:
    """Raise unless the submodules at the paths in `parts` hold nothing but what is named there."""
    for path, names in parts.items():
        module = block.get_submodule(path)
        held = {name for name, _ in module.named_children()} | {name for name, _ in module.named_parameters("", False)}
        if others := held - set(names.split()):
            raise AdapterError(
                f"{type(module).__name__} holds {', '.join(sorted(others))}, and mmaccel does not know what it does "
                "with that; it takes apart blocks with plain softmax attention."
            )


def _itself(x: torch.Tensor) -> torch.Tensor:
    return x


def _encoder_layer(block: Any) -> Block:
    """CLIP, SigLIP, SigLIP2 of transformers."""
    attention = block.self_attn
    heads = attention.num_heads
    return Block(
        block, attention, block.layer_norm1, block.layer_norm2,
        query=lambda x: heads_of(attention.q_proj(x), heads),
        key=lambda x: heads_of(attention.k_proj(x), heads),
        value=lambda x: heads_of(attention.v_proj(x), heads),
        out=attention.out_proj, mlp=block.mlp, scale=attention.scale,
        taps={
            "key": (attention.k_proj, _itself), "value": (attention.v_proj, _itself),
            "attention": (attention, lambda made: made[0]), "mlp": (block.mlp, _itself),
        },
    )  # fmt: skip


def _internvit(block: Any) -> Block:
    attention = block.attention
    heads = attention.num_heads
    return Block(
        block, attention, block.layernorm_before, block.layernorm_after,
        query=lambda x: heads_of(attention.q_norm(attention.q_proj(x)), heads),
        key=lambda x: heads_of(attention.k_norm(attention.k_proj(x)), heads),
        value=lambda x: heads_of(attention.v_proj(x), heads),
        out=lambda x: block.lambda_1 * attention.projection_dropout(attention.projection_layer(x)),
        mlp=lambda x: block.lambda_2 * block.dropout(block.mlp(x)), scale=attention.scale,
        taps={
            "key": (attention.k_norm, _itself), "value": (attention.v_proj, _itself),
            "attention": (attention, lambda made: block.lambda_1 * made[0]),
            "mlp": (block.dropout, lambda x: block.lambda_2 * x),
        },
    )  # fmt: skip


def _qwen(block: Any) -> Block:
    attention = block.attn
    heads = attention.num_heads
    query, key, value = _joined(attention.qkv)
    turn: Any = vars(sys.modules[type(attention).__module__])["apply_rotary_pos_emb_vision"]

    def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        tokens_first = x.transpose(-3, -2)
        return turn(tokens_first, tokens_first, *rotary)[0].transpose(-3, -2)

    return Block(
        block, attention, block.norm1, block.norm2,
        query=lambda x: heads_of(query(x), heads), key=lambda x: heads_of(key(x), heads),
        value=lambda x: heads_of(value(x), heads),
        out=attention.proj, mlp=block.mlp, scale=attention.scaling, rotate=rotate,
        taps={
            "key": (attention.qkv, lambda x: x.chunk(3, -1)[1]), "value": (attention.qkv, lambda x: x.chunk(3, -1)[2]),
            "attention": (attention, _itself), "mlp": (block.mlp, _itself),
        },
    )  # fmt: skip


def _timm(block: Any) -> Block:
    attention = block.attn
    if getattr(attention, "gate", None) is not None:
        raise AdapterError("this timm model has gated attention, whose gate depends on the query; it is not supported.")
    _only(
        block,
        {
            "": "norm1 attn ls1 drop_path1 norm2 mlp ls2 drop_path2",
            "attn": "qkv q_norm k_norm attn_drop norm proj proj_drop",
        },
    )
    heads = attention.num_heads
    query, key, value = _joined(attention.qkv)
    return Block(
        block, attention, block.norm1, block.norm2,
        query=lambda x: attention.q_norm(heads_of(query(x), heads)),
        key=lambda x: attention.k_norm(heads_of(key(x), heads)),
        value=lambda x: heads_of(value(x), heads),
        out=lambda x: block.drop_path1(block.ls1(attention.proj_drop(attention.proj(attention.norm(x))))),
        mlp=lambda x: block.drop_path2(block.ls2(block.mlp(x))), scale=attention.scale,
        taps={
            "key": (attention.k_norm, tokens_of), "value": (attention.qkv, lambda x: x.chunk(3, -1)[2]),
            "attention": (block.drop_path1, _itself), "mlp": (block.drop_path2, _itself),
        },
    )  # fmt: skip


def _open_clip(block: Any) -> Block:
    attention = block.attn
    _only(block, {"": "ln_1 attn ls_1 ln_2 mlp ls_2", "attn": "in_proj_weight in_proj_bias out_proj"})
    heads = attention.num_heads
    parts = [_third(None, i, attention.in_proj_weight, attention.in_proj_bias) for i in range(3)]
    return Block(
        block, attention, block.ln_1, block.ln_2,
        query=lambda x: heads_of(parts[0](x), heads), key=lambda x: heads_of(parts[1](x), heads),
        value=lambda x: heads_of(parts[2](x), heads),
        out=lambda x: block.ls_1(attention.out_proj(x)), mlp=lambda x: block.ls_2(block.mlp(x)),
        scale=attention.head_dim**-0.5,
        # keys and values of nn.MultiheadAttention are made inside a function
        taps={"attention": (block.ls_1, _itself), "mlp": (block.ls_2, _itself)},
    )  # fmt: skip


_KINDS: list[tuple[Callable[[nn.Module], bool], Callable[[Any], Block]]] = [
    (_has("self_attn.q_proj", "self_attn.out_proj", "layer_norm1", "layer_norm2", "mlp"), _encoder_layer),
    (_has("attention.projection_layer", "layernorm_before", "layernorm_after", "lambda_1"), _internvit),
    (_has("attn.qkv", "attn.proj", "attn.scaling", "norm1", "norm2", "mlp"), _qwen),
    (_has("attn.qkv", "attn.proj_drop", "attn.q_norm", "attn.norm", "norm1", "norm2", "mlp", "ls1", "ls2"), _timm),
    (_has("attn.in_proj_weight", "attn.out_proj", "ln_1", "ln_2", "ls_1", "ls_2", "mlp"), _open_clip),
]
