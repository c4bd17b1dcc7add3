"""Watch a vision encoder: note which call made which features, and the attention scores of one of its layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from mmaccel.core.forward import calls_of
from mmaccel.core.layout import Encoded, Site
from mmaccel.kernels.attention_received import attention_received

__all__ = ["encoding", "note_encoding", "record_scores"]


def note_encoding(site: Site, modality: str) -> Callable[..., Any]:
    """A wrapper of the method that encodes one modality; what it notes is kept by the run."""

    def around(call: Any, *args: Any, **kwargs: Any) -> Any:
        calls = calls_of(site)
        if calls is None or calls.encoding is not None:  # not in a run; or another handle, or a wrapper inside of ours
            return call(*args, **kwargs)
        encoded = calls.encoding = Encoded(modality, site.bind(modality, args, kwargs))
        try:
            encoded.given = call(*args, **kwargs)
        finally:
            calls.encoding = None
        encoded.output = copy.copy(encoded.given)
        calls.encoded[modality] = calls.forward.encoded[modality] = encoded
        return encoded.given

    return around


def encoding(site: Site) -> Encoded | None:
    """The encoder call that is running on this model in this context, if there is one."""
    calls = calls_of(site)
    return calls.encoding if calls is not None else None


def record_scores(site: Site, kind: str) -> Callable[..., None]:
    """A listener at the score layer: attention received from all queries, or from query 0, the class token ("cls")."""
    recorder = object()

    @torch.no_grad()
    def listen(query: torch.Tensor, key: torch.Tensor, _mask: Any, call: dict[str, Any]) -> None:
        calls = calls_of(site)
        if calls is None or calls.encoding is None:
            return
        if calls.encoding.recorders.setdefault(kind, recorder) is not recorder:
            return  # another handle records the same scores
        chosen: Any = "all" if kind == "received" else (0, 1)
        lengths = call.get("cu_seq_lens_q")
        parts = [(query, key)]
        if lengths is not None:
            sizes = (lengths[1:] - lengths[:-1]).tolist()
            parts = list(zip(query.split(sizes, 2), key.split(sizes, 2), strict=True))
        recorded = calls.encoding.scores.setdefault(kind, [])
        for q, k in parts:
            recorded.append(attention_received(q, k, queries=chosen, scale=call.get("scaling")))

    return listen
