"""Between decoder layers: take visual tokens out behind one, and give the later ones masks and angles that fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import nn

from mmaccel.core.cache import Kept
from mmaccel.core.forward import Count, Forward, Level, Reduce, calls_of
from mmaccel.core.layout import Site, VisualTokens
from mmaccel.core.sequence import old_keys
from mmaccel.errors import NonFiniteError, NotApplicableError
from mmaccel.kernels.attention_received import attention_received
from mmaccel.tokens.place import TEXT, Reduction, TokenMap, place

__all__ = ["Queries", "deepstack", "fit_layer", "record_attention", "reduce_after"]

Queries = Literal["last", "question"]


def record_attention(site: Site, key: object, queries: Queries = "last") -> Callable[..., None]:
    """A listener at a decoder layer that notes, mean over heads, the attention to all tokens of the call.

    queries: "last", the attention of each prompt's last token; "question", the largest that any of the prompt's text
    tokens behind its last image or video pays (of the last token, where there is no such text).
    """

    @torch.no_grad()
    def listen(query: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None, call: dict[str, Any]) -> None:
        calls = calls_of(site)
        if calls is None or calls.forward.tokens is None:
            return
        tokens = calls.forward.tokens
        valid = tokens.valid.to(keys.device)
        last = valid.shape[1] - 1 - valid.flip(1).int().argmax(1) - calls.guessed
        received = _attention_of(last, query, keys, valid, mask, call)
        if queries == "question":
            shown = (tokens.item.to(keys.device) != TEXT) & valid
            number = last - (shown * torch.arange(1, valid.shape[1] + 1, device=keys.device)).amax(1) + 1
            for back in range(1, int(number.max())):
                earlier = _attention_of((last - back).clamp_min(0), query, keys, valid, mask, call)
                asked = (number > back)[:, None]
                received = torch.where(asked, torch.maximum(received, earlier), received)
        calls.forward.inner_scores[key] = received

    return listen


def _attention_of(
    at: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, valid: torch.Tensor, mask: torch.Tensor | None,
    call: dict[str, Any],
) -> torch.Tensor:  # fmt: skip
    """float32 [B, S]: the attention of the token at [B] of each row to the tokens of the call, mean over heads."""
    S, Sk = valid.shape[1], keys.shape[2]
    rows = torch.arange(len(at), device=keys.device)
    visible = torch.ones(len(at), Sk, dtype=torch.bool, device=keys.device)
    visible[:, Sk - S :] = valid & (torch.arange(S, device=keys.device) <= at[:, None])
    if mask is not None and mask.dim() == 4:
        seen = mask.to(keys.device).expand(len(at), *mask.shape[1:])[rows, 0, at, :Sk]
        visible &= seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
    elif mask is not None and mask.dim() == 2:
        visible &= mask[:, -Sk:].bool()
    received = attention_received(query[rows, :, at].unsqueeze(2), keys, key_padding=visible, scale=call.get("scaling"))
    return received[:, Sk - S :]


def reduce_after(site: Site, name: str, layer: int, reduce: Reduce | None, key: object, count: Count) -> Any:
    """A hook behind decoder layer `layer - 1` that reduces each prompt's visual tokens by the scores noted as `key`."""
    place_name = f"layer {layer}"

    def hook(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        calls = calls_of(site)
        if calls is None:
            return None
        forward = calls.forward
        tokens = forward.tokens
        if tokens is None:
            if forward.length > 1 and not forward.seen:
                count(name, place_name, 0, 0)
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        found = _decide(site, forward, tokens, hidden, name, layer, reduce, key) if reduce is not None else []
        placement = place(tokens, found, pad_left=forward.pad_left)
        if not found or placement.identity:
            n = int(tokens.visual.sum())
            count(name, place_name, n, n, tokens)
            return None
        forward.tokens, (hidden,) = placement.carry(tokens, hidden)
        above = forward.levels[-1].index if forward.levels else None
        index = placement.index if above is None else above.gather(1, placement.index)
        full = bool(placement.valid.all())
        forward.levels.append(Level(layer, forward.tokens, placement, index, full))
        count(name, place_name, int(tokens.visual.sum()), int(forward.tokens.visual.sum()), forward.tokens)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return hook


@torch.no_grad()
def _decide(
    site: Site, forward: Forward, tokens: TokenMap, hidden: torch.Tensor, name: str, layer: int, reduce: Reduce,
    key: object,
) -> list[tuple[int, torch.Tensor, Reduction]]:  # fmt: skip
    scores = forward.inner_scores[key].to(hidden.device)
    visual = tokens.visual
    if not bool(torch.isfinite(scores).all()):
        prefix = "" if site.root is site.target else "model."
        raise NonFiniteError(
            f"{name}: attention scores of {prefix}language_model.layers.{layer - 1} are NaN or infinite; check the "
            "model's weights and dtype."
        )
    found = []
    for row in range(visual.shape[0]):
        cells = visual[row].nonzero().squeeze(1)
        if cells.numel() == 0:
            continue
        every = torch.arange(cells.numel(), device=cells.device)
        reduction = reduce(VisualTokens(hidden[row, cells], every, (0, 0, 0), scores[row, cells], "prompt", row))
        if reduction is not None:
            found.append((row, cells, reduction))
    return found


def fit_layer(site: Site, number: int, fitting: set[int]) -> Callable[..., Any]:
    """A hook that brings the keywords of decoder layer `number` in line with the tokens and keys alive there.

    fitting: the forwards that need it; while there is none, as in most decoding steps, the hook costs nothing.
    """

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls = calls_of(site) if fitting else None
        if calls is None:
            return None
        forward = calls.forward
        level, kept = forward.level_at(number), forward.kept_at(number)
        inner = level is not None or (kept is not None and kept.columns is not None)
        if not (inner or forward.reduced) or number in forward.fitted:
            return None
        forward.fitted.add(number)
        # layers read position_ids only to find packed sequences, and would take the gaps of dropped tokens for borders
        changed: dict[str, Any] = {"position_ids": None}
        if inner:
            # layers of different kinds get different masks; one that is kept cannot give its id to the next
            mask = kwargs.get("attention_mask")
            memo = (id(level), id(kept), id(mask))
            if memo not in forward.shared:
                forward.shared[memo] = mask, _keywords(site, forward, number, kwargs, level, kept)
            changed |= forward.shared[memo][1]
        return args, {**kwargs, **changed}

    return hook


def _keywords(
    site: Site, forward: Forward, number: int, kwargs: dict[str, Any], level: Level | None, kept: Kept | None
) -> dict[str, Any]:
    cos, sin = kwargs["position_embeddings"]
    mask = kwargs.get("attention_mask")
    changed: dict[str, Any] = {}
    full = (level is None or level.full) and (kept is None or kept.full)
    if mask is not None or not full:
        changed["attention_mask"] = _mask(site, forward, number, mask, level, cos)
    for one in forward.levels:
        if one.first <= number:
            cos, sin = _angles(one, cos, sin)
    if level is not None:
        changed["position_embeddings"] = (cos, sin)
    return changed


def _angles(level: Level, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if cos.dim() == 3:
        cos, sin = level.placement.together(rows=(cos, sin))
        return cos, sin
    # M-RoPE of older transformers: one table an axis, [3, B, S, D], merged inside of attention
    moved = level.placement.together(rows=(*cos, *sin))
    return torch.stack(moved[: len(cos)]), torch.stack(moved[len(cos) :])


def _mask(site: Site, forward: Forward, number: int, mask: Any, level: Level | None, cos: torch.Tensor) -> torch.Tensor:
    """The mask of a layer, made from that of layer 0: rows of the tokens alive, columns of the keys held there."""
    device, L = cos.device, cos.shape[-2]
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise NotApplicableError(
            f"a {type(mask).__name__} cannot be cut to the tokens of one layer; load the model with "
            'attn_implementation="sdpa".'
        )
    B = len(level.index) if level is not None else len(forward.cache.layers[0].keys)
    _, valid, columns = old_keys(forward, number, B, device)
    rows = torch.arange(L, device=device).expand(B, L) if level is None else level.index.to(device)
    fresh = torch.ones_like(rows, dtype=torch.bool) if level is None else level.tokens.valid.to(device)
    columns = torch.cat([columns, rows + (forward.held[0] if forward.held else 0)], 1)
    valid = torch.cat([valid, fresh], 1)
    if mask is None:
        return _causal(site, rows, valid, cos.dtype)
    if mask.dim() == 2:
        return mask.expand(B, -1).gather(1, columns) * valid
    mask = mask.expand(B, *mask.shape[1:])
    mask = mask.gather(2, rows[:, None, :, None].expand(*mask.shape[:2], rows.shape[1], mask.shape[3]))
    mask = mask.gather(3, columns[:, None, None, :].expand(*mask.shape[:3], columns.shape[1]))
    never = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return mask.masked_fill(~valid[:, None, None, :], never)


def _causal(site: Site, rows: torch.Tensor, valid: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    config: Any = site.language_model.config
    implementation = config._attn_implementation or "eager"
    if "flash" in implementation:
        return valid
    q, kv = rows.shape[1], valid.shape[1]
    allowed = torch.ones(q, kv, dtype=torch.bool, device=valid.device).tril(kv - q) & valid[:, None, None, :]
    if implementation != "eager":
        return allowed
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)


def deepstack(site: Site) -> Callable[..., Any]:
    """A wrapper of the method that adds features of inner vision layers: it leaves out those of dropped tokens."""

    def around(call: Any, hidden: torch.Tensor, where: torch.Tensor, features: torch.Tensor) -> Any:
        calls = calls_of(site)
        if calls is None or not calls.forward.levels or calls.forward.in_deepstack:
            return call(hidden, where, features)
        forward = calls.forward
        dense = features.new_zeros(*where.shape, features.shape[-1])
        dense[where] = features
        for level in forward.levels:
            where = level.placement.along(where, -1) & level.placement.valid.to(where.device)
            dense = level.placement.values(dense)
        forward.in_deepstack = True
        try:
            return call(hidden, where, dense[where])
        finally:
            forward.in_deepstack = False

    return around
