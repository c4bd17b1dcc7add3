"""Watch a vision encoder: note which call made which features, and the attention scores of one of its layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from mmaccel.core.forward import Calls, calls_of
from mmaccel.core.layout import Encoded, Site
from mmaccel.core.run import current, opened
from mmaccel.kernels.attention_received import attention_received

__all__ = ["encoding", "encoding_of", "note_encoding", "received_in_parts", "record_scores"]

_NOTE = "_mmaccel_encoded"


def note_encoding(site: Site, modality: str) -> Callable[..., Any]:
    """A wrapper of the method that encodes one modality; what it notes stays with the output."""

    def around(call: Any, *args: Any, **kwargs: Any) -> Any:
        outside = current(site.root) is None
        with opened(site.root) as run:
            calls = run.get(Calls)
            if calls.encoding is not None:  # another handle, or the library's own call of one such method by another
                return call(*args, **kwargs)
            encoded = calls.encoding = Encoded(modality, site.bind(modality, args, kwargs), outside=outside)
            try:
                given = call(*args, **kwargs)
            finally:
                calls.encoding = None
            encoded.output, encoded.tower = copy.copy(given), getattr(given, "last_hidden_state", None)
            calls.encoded[modality] = calls.forward.encoded[modality] = encoded
            if hasattr(given, "__dict__"):
                object.__setattr__(given, _NOTE, encoded)
            return given

    return around


def encoding(site: Site) -> Encoded | None:
    """The encoder call that is running on this model in this context and serves a prompt, if there is one."""
    calls = calls_of(site)
    return calls.encoding if calls is not None and calls.encoding is not None and not calls.encoding.outside else None


def encoding_of(output: Any) -> Encoded | None:
    """The encoder call that made `output`, if it was watched."""
    return getattr(output, _NOTE, None)


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
        calls.encoding.scores.setdefault(kind, []).extend(received_in_parts(query, key, call, chosen))

    return listen


def received_in_parts(
    query: torch.Tensor, key: torch.Tensor, call: dict[str, Any], queries: Any = "all"
) -> list[torch.Tensor]:
    """Attention received, part by part where a packed call says what attends together; `call`: its keywords."""
    lengths = call.get("cu_seq_lens_q")
    parts = [(query, key)]
    if lengths is not None:
        sizes = (lengths[1:] - lengths[:-1]).tolist()
        parts = list(zip(query.split(sizes, 2), key.split(sizes, 2), strict=True))
    return [attention_received(q, k, queries=queries, scale=call.get("scaling")) for q, k in parts]
