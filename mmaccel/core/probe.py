"""See the queries and keys of one attention layer while SDPA or flash attention stays on.

A layer's attention module reads the name of its attention function from its config. For the probed layer alone that
config is replaced by a copy that names a function of ours, which shows q and k to the listeners and then calls the
function that the model was set to. No other layer, model or class notices.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from mmaccel.core.patching import Patcher
from mmaccel.errors import AdapterError

__all__ = ["Listener", "probe_attention", "probed"]

# listener(query [B, H, Sq, D], key [B, Hkv, Sk, D] after rotary embedding and cache, mask, the call's keywords)
Listener = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None", dict[str, Any]], None]

_PREFIX = "mmaccel_probe_"
# Kept in the copied config, so that the model alone holds its listeners, which hold the model.
_LISTENERS = "_mmaccel_listeners"


def _probed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> Any:
    config: Any = module.config
    for listener in vars(config)[_LISTENERS]:
        listener(query, key, attention_mask, {"scaling": getattr(module, "scaling", None), **kwargs})
    name = config._attn_implementation.removeprefix(_PREFIX)
    # "eager" is in no table: each modeling file has its own function of this name
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    attention = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)  # type: ignore[arg-type]
    return attention(module, query, key, value, attention_mask, **kwargs)


def probed(module: nn.Module) -> bool:
    """Whether somebody listens to the attention module `module`."""
    config = getattr(module, "config", None)
    return config is not None and bool(vars(config).get(_LISTENERS))


def probe_attention(patcher: Patcher, module: nn.Module, listener: Listener) -> None:
    """Call `listener` in each forward of the attention module `module` until the patcher is undone.

    Raises:
        AdapterError: the module does not choose its attention function through a config.
    """
    config: Any = getattr(module, "config", None)
    if config is None or not hasattr(config, "_attn_implementation"):
        raise AdapterError(
            f"{type(module).__name__} does not choose its attention function by config, so its scores cannot be read; "
            "use a method that needs no attention (mmaccel list)."
        )
    name = config._attn_implementation or "eager"
    probed = copy.copy(config)
    if not name.startswith(_PREFIX):
        AttentionInterface.register(_PREFIX + name, _probed_attention)
        # the property's setter would reach into sub-configs, which the copy shares with the original
        probed._attn_implementation_internal = _PREFIX + name
        vars(probed)[_LISTENERS] = []
    listeners = vars(probed)[_LISTENERS]  # shared by the copies of all patchers
    patcher.set(module, "config", probed)
    listeners.append(listener)
    patcher.on_undo(lambda: listeners.remove(listener))
