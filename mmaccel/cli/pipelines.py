"""Pipelines for the command line: loaded from a folder, called with what was asked for, timed and measured."""

from __future__ import annotations

import inspect
import math
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmaccel.cli.models import attempt, location, quiet
from mmaccel.cli.terminal import one_line
from mmaccel.errors import MMAccelError, NonFiniteError, NotApplicableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy as np

__all__ = ["EMBEDDED", "Made", "Pipeline", "Request", "load_pipeline", "make", "measured", "refusals", "save", "warm"]

EMBEDDED = "embedded text-to-video model (3.2 M parameters, knows only the rendered world it was trained on)"
_DTYPES = ("float32", "bfloat16", "float16")
_WARMUP_STEPS = 2


@dataclass(frozen=True)
class Pipeline:
    """A pipeline, what to call it, the arguments of its calls, and those that it has by default here."""

    pipe: Any
    label: str
    takes: frozenset[str]
    defaults: dict[str, Any] = field(default_factory=dict)
    fps: float = 16.0

    @property
    def video(self) -> bool:
        """Whether it makes clips and not images."""
        return "num_frames" in self.takes


@dataclass(frozen=True)
class Request:
    """What to make; None is what the pipeline does by itself."""

    prompt: str
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None

    def arguments(self, pipeline: Pipeline) -> dict[str, Any]:
        """The arguments of a call, without the generator.

        Raises:
            NotApplicableError: the pipeline cannot be asked for one of them, or needs more than a prompt.
        """
        label, takes = pipeline.label, pipeline.takes
        wanted = {
            "--steps": ("num_inference_steps", self.steps), "--guidance": ("guidance_scale", self.guidance),
            "--height": ("height", self.height), "--width": ("width", self.width),
            "--frames": ("num_frames", self.frames),
        }  # fmt: skip
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise MMAccelError(f"--guidance {self.guidance} is no number to scale by.")
        found = dict(pipeline.defaults)
        for option, (name, value) in wanted.items():
            if value is None:
                continue
            if name not in takes:
                raise NotApplicableError(f"{label} cannot be given {name}; leave {option} out.")
            found[name] = value
        if "prompt" in takes:
            return {"prompt": self.prompt, "output_type": "np", **found}
        if "class_labels" not in takes:
            raise NotApplicableError(f"{label} takes neither a prompt nor a class.")
        names = list(getattr(pipeline.pipe, "labels", None) or ())
        if not names:
            raise NotApplicableError(f"{label} has no names of classes, so none can be asked for.")
        if self.prompt not in names:
            known = ", ".join(names[:8])
            raise MMAccelError(f"{label} knows no class {self.prompt!r}; it knows {known} and others.")
        labels = pipeline.pipe.get_label_ids([self.prompt])
        return {"class_labels": labels, "output_type": "np", **found}


@dataclass
class Made:
    """frames: uint8 [T, H, W, 3], T = 1 for an image. stages: seconds. peak: bytes, None where it cannot be read."""

    frames: np.ndarray
    stages: dict[str, float]
    peak: int | None
    growth: int | None
    report: Any = None

    @property
    def seconds(self) -> float:
        """The whole call."""
        return sum(self.stages.values())

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        report = None if self.report is None else self.report.as_dict()
        memory = {"peak_bytes": self.peak, "growth_bytes": self.growth}
        return {"seconds": self.seconds, "stages": self.stages, **memory, "report": report}


def load_pipeline(source: str | None, *, dtype: str | None = None, device: str | None = None) -> Pipeline:
    """The embedded pipeline (None or "tiny"), or the diffusers pipeline of a folder or ID.

    dtype: "float32", "bfloat16" or "float16"; bfloat16 on a GPU and float32 elsewhere if not given. device: a GPU if
    there is one. Code that comes with a checkpoint is never run.

    Raises:
        MMAccelError: there is no such device or dtype, or nothing that can be loaded.
        NotApplicableError: a pipeline without a transformer, or one that needs more than a prompt.
    """
    import torch

    place = _device(device)
    if dtype is not None and dtype not in _DTYPES:
        raise MMAccelError(f"--dtype {dtype}: choose one of {', '.join(_DTYPES)}.")
    kind = getattr(torch, dtype or ("bfloat16" if place.type == "cuda" and source not in (None, "tiny") else "float32"))
    quiet()
    from diffusers.utils import logging as library_logging

    library_logging.set_verbosity_error()
    library_logging.disable_progress_bar()
    if source in (None, "tiny"):
        from mmaccel.tiny import VIDEO_CALL, text_to_video

        pipe = text_to_video(kind).to(place)
        return Pipeline(pipe, EMBEDDED, _takes(pipe), dict(VIDEO_CALL), fps=8.0)
    import diffusers

    where = location(source)
    library: Any = diffusers
    index = attempt(source, lambda: library.DiffusionPipeline.load_config(source, **where))
    if not (index.get("transformer") or [None])[0]:
        raise NotApplicableError(
            f"{source} is a {index.get('_class_name', 'pipeline')} without a transformer; only transformer pipelines "
            "are supported."
        )
    pipe = attempt(source, lambda: library.DiffusionPipeline.from_pretrained(source, torch_dtype=kind, **where))
    pipe.set_progress_bar_config(disable=True)
    missing = _needs(pipe) - {"prompt", "class_labels"}
    if missing:
        raise NotApplicableError(
            f"{source} is a {type(pipe).__name__}, which needs more than a prompt: {', '.join(sorted(missing))}."
        )
    return Pipeline(attempt(source, lambda: pipe.to(place)), source, _takes(pipe))


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise MMAccelError(f"--device {name}: {one_line(error)[:200]}") from error
    return place


def _takes(pipe: Any) -> frozenset[str]:
    return frozenset(inspect.signature(pipe.__call__).parameters)


def _needs(pipe: Any) -> set[str]:
    parameters = inspect.signature(pipe.__call__).parameters.values()
    ordinary = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    needed = {p.name for p in parameters if p.default is p.empty and p.kind in ordinary}
    # image-to-video pipelines give the picture a default of None in places
    return needed | ({"image"} & {p.name for p in parameters} if "ImageToVideo" in type(pipe).__name__ else set())


def make(pipeline: Pipeline, request: Request, methods: Sequence[Any] = (), *, warmup: bool = True) -> Made:
    """One call, dense or with methods on, behind one that warms up: of two steps, or whole if there are methods.

    Methods may measure what they need in their first call, so that one has to be whole; the report counts both.

    Raises:
        MMAccelError: what the pipeline says to the request, memory that does not suffice, or what a method says.
        NonFiniteError: the result is not finite.
    """
    from mmaccel.api import accelerate

    with accelerate(pipeline.pipe, list(methods)) if methods else nullcontext() as handle:
        if warmup:
            warm(pipeline, request, whole=bool(methods))
        made = measured(pipeline, request)
        made.report = None if handle is None else handle.report()
    return made


def warm(pipeline: Pipeline, request: Request, *, whole: bool) -> None:
    """Call once, and forget it."""
    arguments = request.arguments(pipeline)
    steps = arguments.get("num_inference_steps")
    if not whole and "num_inference_steps" in pipeline.takes:
        arguments["num_inference_steps"] = _WARMUP_STEPS if steps is None else min(steps, _WARMUP_STEPS)
    _call(pipeline, request.seed, arguments)


def measured(pipeline: Pipeline, request: Request) -> Made:
    """One call of the pipeline as it stands, with its times and its memory."""
    from mmaccel.measure import peak_memory
    from mmaccel.measure.generation import pipeline_stages

    arguments, pipe, peak = request.arguments(pipeline), pipeline.pipe, None
    with ExitStack() as stack:
        with suppress(MMAccelError):  # no system to read it from
            peak = stack.enter_context(peak_memory(pipe.device))
        found, stages = pipeline_stages(pipe, lambda: _call(pipeline, request.seed, arguments))
    frames = _pixels(found, pipeline.label)
    return Made(frames, stages, *((None, None) if peak is None else (peak.peak, peak.growth)))


def _call(pipeline: Pipeline, seed: int, arguments: dict[str, Any]) -> Any:
    import torch

    with refusals(pipeline.label):
        # on the host, so that a seed means the same noise on every device
        return pipeline.pipe(generator=torch.Generator().manual_seed(seed), **arguments)


@contextmanager
def refusals(label: str) -> Iterator[None]:
    """What a pipeline says to a request, or memory that does not suffice, as one line that names it.

    Raises:
        MMAccelError: instead of ValueError, TypeError and out of memory inside the block.
    """
    import torch

    try:
        yield
    except MMAccelError:
        raise
    except torch.OutOfMemoryError as error:
        raise MMAccelError(
            f"{label}: {one_line(error)[:200]} Ask for a smaller --size, fewer --frames or --dtype bfloat16."
        ) from error
    except (ValueError, TypeError) as error:
        raise MMAccelError(f"{label} refuses this request: {one_line(error)[:400]}") from error


def _pixels(found: Any, label: str) -> np.ndarray:
    import numpy as np

    # a batch of one
    values = found.frames if hasattr(found, "frames") else found.images
    frames = np.asarray(values[0] if hasattr(found, "frames") else values[:1], dtype=np.float32)
    if not np.isfinite(frames).all():
        raise NonFiniteError(f"{label} made pictures that are not finite; try --dtype float32.")
    return np.floor(frames.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def save(path: Path, frames: np.ndarray, *, video: bool, fps: float) -> Path:
    """Write frames uint8 [T, H, W, 3] as a video, or the first one as an image.

    Raises:
        MMAccelError: the file cannot be written.
    """
    if video:
        from mmaccel.codecs import write_video

        return write_video(path, frames, fps=fps)
    from PIL import Image

    try:
        Image.fromarray(frames[0]).save(path)
    except (OSError, ValueError) as error:
        raise MMAccelError(f"{path} cannot be written ({one_line(error)}).") from error
    return path
