"""One dataclass with tensors as one safetensors file, with a checksum over all that is in it."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mmaccel.errors import VideoError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["DamagedEntryError", "read_entry", "write_entry"]

_KIND = "#"


class DamagedEntryError(VideoError):
    """A file of the frame cache does not hold what was written into it."""


def write_entry(path: Path, record: Any) -> None:
    """Write a dataclass: tensors and arrays as tensors, all other fields as JSON; tuples and dataclasses stay such."""
    tensors: dict[str, torch.Tensor] = {}
    facts = json.dumps(_pack(record, tensors))
    save_file(tensors, path, metadata={"facts": facts, "sum": _checksum(facts, tensors)})


def read_entry(path: Path, device: Any = None) -> Any:
    """Read what `write_entry` wrote. Tensors on the CPU are mapped, not copied; writing to them leaves the file alone.

    device: where tensors go that were not on the CPU, None for where they were. Raises FileNotFoundError, and
    DamagedEntryError where the content does not agree with its checksum or is no safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            head = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, RuntimeError) as error:
        # Removed by another process between two looks at it: safetensors has more than one word for that.
        if not path.exists():
            raise FileNotFoundError(path) from error
        raise DamagedEntryError(f"{path} cannot be read ({error})") from error
    if head.get("sum") != _checksum(head.get("facts", ""), tensors):
        raise DamagedEntryError(f"{path} does not agree with its checksum")
    return _unpack(json.loads(head["facts"]), tensors, device)


def _checksum(facts: str, tensors: dict[str, torch.Tensor]) -> str:
    total = hashlib.blake2b(facts.encode(), digest_size=32)
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Turn a value into what JSON holds; tensors are put aside into `tensors`."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [_pack(item, tensors) for item in value]
    if type(value) is tuple:
        return {_KIND: "tuple", "items": [_pack(item, tensors) for item in value]}
    if type(value) is dict:
        pairs = [[_pack(key, tensors), _pack(item, tensors)] for key, item in value.items()]
        return {_KIND: "dict", "items": pairs}
    if isinstance(value, (torch.Tensor, np.ndarray)):
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value.detach()
        name = f"{len(tensors)}"
        # A copy of its own for a view: safetensors refuses tensors that share memory.
        owns = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        tensors[name] = tensor.cpu() if owns else tensor.contiguous().clone().cpu()
        return {_KIND: type(value).__name__, "name": name, "device": str(tensor.device)}
    if dataclasses.is_dataclass(value) and type(value).__module__.startswith("mmaccel."):
        fields = {field.name: _pack(getattr(value, field.name), tensors) for field in dataclasses.fields(value)}
        return {_KIND: "record", "module": type(value).__module__, "type": type(value).__qualname__, "fields": fields}
    raise TypeError(f"a {type(value).__name__} cannot be kept in the frame cache")


def _unpack(value: Any, tensors: dict[str, torch.Tensor], device: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors, device) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value[_KIND]
    if kind == "tuple":
        return tuple(_unpack(item, tensors, device) for item in value["items"])
    if kind == "dict":
        return {_unpack(key, tensors, device): _unpack(item, tensors, device) for key, item in value["items"]}
    if kind == "ndarray":
        return tensors[value["name"]].numpy()
    if kind == "record":
        cls = getattr(importlib.import_module(value["module"]), value["type"])
        return cls(**{name: _unpack(item, tensors, device) for name, item in value["fields"].items()})
    tensor = tensors[value["name"]]
    return tensor if value["device"] == "cpu" else tensor.to(value["device"] if device is None else device)
