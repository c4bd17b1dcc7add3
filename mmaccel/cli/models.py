"""Models for the command line: the embedded one, a checkpoint with its weights, or only the outline of one."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mmaccel.cli.terminal import one_line
from mmaccel.errors import MMAccelError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["EMBEDDED", "Loaded", "attempt", "load", "location", "outline", "quiet"]

EMBEDDED = "embedded model (1.4 M parameters, knows only the rendered world it was trained on)"


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, its processor, and what to call it; `embedded` if it is the project's own."""

    model: Any
    processor: Any
    label: str
    embedded: bool


def load(source: str | None) -> Loaded:
    """The embedded model, or the checkpoint of an ID or folder in its own dtype, on the GPU if there is one.

    Code that comes with a checkpoint is never run.

    Raises:
        MMAccelError: the checkpoint cannot be loaded as an image- or video-text model.
    """
    quiet()
    if source is None:
        from mmaccel.tiny import video_qa

        return Loaded(*video_qa(), EMBEDDED, embedded=True)
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    where = location(source)
    processor = attempt(source, lambda: AutoProcessor.from_pretrained(source, **where))
    if not hasattr(processor, "apply_chat_template") or getattr(processor, "tokenizer", None) is None:
        raise MMAccelError(f"{source} has no processor for text and pictures, so it cannot be asked about a video.")
    device = {"device_map": "auto"} if torch.cuda.is_available() else {}
    model = attempt(
        source,
        lambda: AutoModelForImageTextToText.from_pretrained(
            source, dtype="auto", attn_implementation="sdpa", **device, **where
        ),
    )
    return Loaded(model.eval(), processor, source, embedded=False)


def outline(source: str) -> Any:
    """A model built from its configuration alone, its parameters on the meta device: fast, and needs no weights.

    `source` is "tiny" (the embedded model), a tiny family, "tiny-text", "tiny-wan", a published model of
    `mmaccel.tiny.families.REAL`, a folder, or a Hugging Face ID of a transformers or diffusers model.

    Raises:
        MMAccelError: nothing can be built from it.
    """
    quiet()
    from mmaccel.tiny import VIDEO_QA_FOLDER
    from mmaccel.tiny.families import FAMILIES, REAL

    if source == "tiny":
        return _from_config(str(VIDEO_QA_FOLDER), {"local_files_only": True})
    if source in FAMILIES:
        return FAMILIES[source].build()
    if source in REAL:
        return _bare(source, REAL[source].config())
    if source in ("tiny-text", "tiny-wan"):
        from mmaccel.tiny.pipelines import tiny_text_lm, tiny_wan_pipeline

        return tiny_wan_pipeline() if source == "tiny-wan" else tiny_text_lm()[0]
    names = ("tiny", "tiny-text", "tiny-wan", *FAMILIES, *REAL)
    if not source.strip() or (not Path(source).exists() and "/" not in source):
        raise MMAccelError(f"{source!r} is no folder, no Hugging Face ID and none of {', '.join(names)}.")
    where = location(source)
    if (Path(source) / "model_index.json").exists():
        return _diffusion(source, where)
    try:
        return _from_config(source, where)
    except MMAccelError as error:
        if Path(source).exists() or (where and not _cached(source, "model_index.json")):
            raise
        try:
            return _diffusion(source, where)
        except MMAccelError:
            raise error from None


def _from_config(source: str, where: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return _bare(source, attempt(source, lambda: AutoConfig.from_pretrained(source, **where)))


def _bare(source: str, config: Any) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto in (AutoModelForImageTextToText, AutoModelForCausalLM):
        if type(config) in auto._model_mapping:
            with init_empty_weights():
                return attempt(source, lambda auto=auto: auto.from_config(config)).eval()
    raise MMAccelError(f"{source} is a {config.model_type}, which is no image-, video- or text-language model.")


def _diffusion(source: str, where: dict[str, Any]) -> Any:
    import diffusers
    from accelerate import init_empty_weights

    library: Any = diffusers
    index = attempt(source, lambda: library.DiffusionPipeline.load_config(source, **where))
    entry = index.get("transformer")
    if not entry or not hasattr(library, entry[1] or ""):
        raise MMAccelError(f"{source} is a diffusers pipeline without a transformer of diffusers.")
    cls = getattr(library, entry[1])
    config = attempt(source, lambda: cls.load_config(source, subfolder="transformer", **where))
    with init_empty_weights():
        return cls.from_config(config)


def location(source: str) -> dict[str, Any]:
    """Where to look: a folder, the hub, or, when that cannot be reached, what has been downloaded before."""
    if Path(source).is_dir():
        return {"local_files_only": True}
    if Path(source).exists():
        raise MMAccelError(f"{source} is a file; give the folder of a checkpoint or a Hugging Face ID.")
    return {"local_files_only": True} if _offline() else {}


def _offline() -> bool:
    # The hub client retries for half a minute before it gives up; one look-up tells the same at once.
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return False
    from huggingface_hub import constants

    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return True
    return False


def _cached(source: str, name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(source, name), str)


def attempt(source: str, action: Callable[[], Any]) -> Any:
    """What `action` gives; whatever a loader stumbles over becomes one MMAccelError that names `source`."""
    try:
        return action()
    except MMAccelError:
        raise
    # Loaders raise whatever the files made them stumble over: OSError, KeyError, ImportError, parser errors.
    except Exception as error:
        reason = one_line(error)
        if isinstance(error, OSError) and not Path(source).exists():
            reason = f"it is no folder here, is not in the cache, and the hub does not give it ({reason})"
        raise MMAccelError(f"{source} cannot be loaded: {reason[:400]}") from error


def quiet() -> None:
    """Have transformers and the hub say errors only, without bars of their own."""
    from transformers.utils import logging as library_logging

    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
