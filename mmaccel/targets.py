"""What `accelerate` was given: find the model inside it and the adapter that knows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mmaccel.adapters import families, find_video_lm
from mmaccel.errors import AdapterError

__all__ = ["Target", "resolve"]


@dataclass(frozen=True)
class Target:
    """A target and what kind it is.

    given: the object of the user. kind: "video-lm", "vision-encoder", "text-lm" or "diffusion". site: the adapter,
    which knows where things are. root: the module that identifies the model when several handles hold it.
    """

    given: Any
    kind: str
    site: Any
    root: Any
    family: str


def resolve(given: Any) -> Target:
    """Find out what `given` is.

    Raises:
        AdapterError: no adapter exists for it; the message names what is known.
    """
    model = _inside(given)
    site = find_video_lm(model)
    if site is not None:
        return Target(given, "video-lm", site, site.root, site.family)
    from mmaccel.adapters import diffusion, text_lm, vision

    if vision.fits(model):
        site = vision.VisionModel(model)
        return Target(given, "vision-encoder", site, site.root, site.family)
    if diffusion.fits(model):
        site = diffusion.Diffusion(model)
        return Target(given, "diffusion", site, site.transformer, site.family)
    if text_lm.fits(model):
        site = text_lm.TextLM(model)
        return Target(given, "text-lm", site, model, site.family)
    raise AdapterError(
        f"mmaccel does not know what to do with a {type(given).__name__}; it takes vision-language models of "
        f"transformers ({', '.join(families())}), vision encoders of transformers, timm and open_clip, text language "
        "models, and pipelines or transformers of diffusers."
    )


def _inside(given: Any) -> Any:
    # torch.compile and PEFT put a module around the model; a transformers pipeline is a callable around it
    given = getattr(given, "_orig_mod", given)
    if callable(getattr(given, "get_base_model", None)):
        given = given.get_base_model()
    if type(given).__module__.startswith("transformers.pipelines") and hasattr(given, "model"):
        return given.model
    return given
