"""The commands and their options. Each imports its work when it is called, so that `--help` comes at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mmaccel import __version__
from mmaccel.cli.terminal import Terminal, one_line, say_what_can_be_said

__all__ = ["app", "main"]

app = typer.Typer(
    help="Makes the multimodal model that you already have faster, and shows what it cost in quality.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps of the sampler.")]
Guidance = Annotated[float | None, typer.Option(help="Scale of classifier-free guidance.")]
Size = Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels, or one number for a square.")]
Height = Annotated[int | None, typer.Option(min=1, help="Height in pixels.")]
Width = Annotated[int | None, typer.Option(min=1, help="Width in pixels.")]
Frames = Annotated[int | None, typer.Option(min=1, help="Frames of a video.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; bfloat16 on a GPU, float32 elsewhere.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda:0; a GPU if there is one.")]
Pipeline = Annotated[
    str, typer.Option(help="A folder or Hugging Face ID of a diffusers pipeline, or 'tiny': the embedded one.")
]
Specs = Annotated[
    list[str] | None,
    typer.Option("--method", "-m", help="A method such as 'holitom:keep=0.15'. Several are put on together."),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmaccel {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,  # noqa: ARG001
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,  # noqa: ARG001
) -> None:
    """Makes the multimodal model that you already have faster, and shows what it cost in quality."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def demo(
    what: Annotated[
        str,
        typer.Argument(
            help="'methods' side by side on clips, 'stream': one stream without an end, or 'generate': text to video."
        ),
    ] = "methods",
    out: Annotated[Path, typer.Option(help="Folder for what is written: report.html, pareto.png, clips.")] = Path(
        "mmaccel-report"
    ),
    clips: Annotated[int, typer.Option(min=1, help="Clips at most.")] = 60,
    seconds_budget: Annotated[float, typer.Option(min=1, help="Start no new batch of clips that would end later.")] = (
        150.0
    ),
    method: Specs = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="stream: visual tokens held at most; those of one clip if not given.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="generate: steps of the sampler; 40 if not given.")] = None,
    json: Json = False,
) -> None:
    """Compare every method on the embedded video model: accuracy, tokens, FLOPs, time to first token.

    As `mmaccel demo stream`: push clips as one stream, ask along it, and show accuracy, tokens held and latency. As
    `mmaccel demo generate`: clips of the embedded text-to-video model, dense beside the methods for diffusion.
    """
    if what not in ("methods", "stream", "generate"):
        raise typer.BadParameter(f"{what!r} is none of 'methods', 'stream' and 'generate'")
    if what == "methods" and method:
        raise typer.BadParameter("--method belongs to 'mmaccel demo stream' and 'mmaccel demo generate'")
    if what != "stream" and max_tokens:
        raise typer.BadParameter("--max-tokens belongs to 'mmaccel demo stream'")
    if what != "generate" and steps:
        raise typer.BadParameter("--steps belongs to 'mmaccel demo generate'")
    with Terminal(json) as terminal:
        if what == "stream":
            from mmaccel.cli import demo_stream

            demo_stream.run(terminal, specs=method or [], clips=clips, max_tokens=max_tokens, seconds=seconds_budget)
        elif what == "generate":
            from mmaccel.cli import demo_generate

            demo_generate.run(terminal, out, specs=method or [], clips=clips, steps=steps, seconds=seconds_budget)
        else:
            from mmaccel.cli.demo import run

            run(terminal, out, clips=clips, seconds=seconds_budget)


@app.command()
def ask(
    video: Annotated[str, typer.Argument(help="A video file, or a URL that FFmpeg opens.")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: Annotated[
        str | None, typer.Option(help="A Hugging Face ID or folder; the embedded model if not given.")
    ] = None,
    method: Specs = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames to sample; 32, embedded model 8.")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Answer with and without; holitom:keep=0.15 if no method is given.")
    ] = False,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Length of the answer; 128, embedded 4.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="How often the time to first token is taken.")] = 3,
    json: Json = False,
) -> None:
    """Ask a question about a video, with or without acceleration."""
    from mmaccel.cli.ask import run

    with Terminal(json) as terminal:
        run(
            terminal, video, question, source=model, specs=method or [], frames=frames, both=compare,
            max_new_tokens=max_new_tokens, repeats=repeats,
        )  # fmt: skip


@app.command()
def generate(
    prompt: Annotated[
        str, typer.Argument(help="What to show; for the embedded model such as 'a red ring moves left'.")
    ],
    model: Pipeline = "tiny",
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "-m",
            help="A method such as 'hsa:runtime=0.5', or the file that 'mmaccel calibrate' wrote. Several are put on "
            "together.",
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Dense beside accelerated; hsa:runtime=0.5 if no method is given.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="File; mmaccel-generated.mp4 or .png if not given.")] = None,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the noise.")] = 0,
    guidance: Guidance = None,
    size: Size = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    fps: Annotated[float | None, typer.Option(min=0.1, help="Frames a second of the file; 16, embedded 8.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Generate a video (MP4) or an image (PNG) of a prompt, with or without acceleration."""
    from mmaccel.cli import generate as command

    with Terminal(json) as terminal:
        command.run(
            terminal, prompt, source=model, specs=method or [], both=compare, out=out, seed=seed, steps=steps,
            guidance=guidance, sides=command.size(size, height, width), frames=frames, fps=fps, dtype=dtype,
            device=device,
        )  # fmt: skip


@app.command()
def calibrate(
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompts", "-p", help="A prompt, or a file with one a line. May be given several times."),
    ] = None,
    model: Pipeline = "tiny",
    runtime: Annotated[float, typer.Option(help="Largest share of the dense transformer's work, 0 to 1.")] = 0.5,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help="A name to search, or a spec to try; all that fit if not given."),
    ] = None,
    out: Annotated[Path, typer.Option(help="File for 'mmaccel generate --method'.")] = Path("calibration.json"),
    everything: Annotated[bool, typer.Option("--all", help="Show all that was tried.")] = False,
    steps: Steps = None,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Seed of the noise of the first prompt.")] = 0,
    guidance: Guidance = None,
    size: Size = None,
    height: Height = None,
    width: Width = None,
    frames: Frames = None,
    dtype: Dtype = None,
    device: Device = None,
    json: Json = False,
) -> None:
    """Find the diffusion method, and its setting, that is nearest to the dense result at a share of its work."""
    from mmaccel.cli import calibrate as command
    from mmaccel.cli.generate import size as size_of

    with Terminal(json) as terminal:
        command.run(
            terminal, prompts or [], source=model, runtime=runtime, specs=method or [], out=out, everything=everything,
            seed=seed, steps=steps, guidance=guidance, sides=size_of(size, height, width), frames=frames, dtype=dtype,
            device=device,
        )  # fmt: skip


@app.command()
def bench(
    name: Annotated[str | None, typer.Argument(help="A scenario; without it the names are listed.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for the result rows, JSON lines.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--set", help="Replace an option of the scenario, such as clips=100.")
    ] = None,
    json: Json = False,
) -> None:
    """Run a benchmark scenario of this repository."""
    from mmaccel.cli.bench import run

    with Terminal(json) as terminal:
        run(terminal, name, out, option or [])


@app.command("list")
def catalogue(json: Json = False) -> None:
    """List the methods: stage, verb, knobs with ranges and defaults, source."""
    from mmaccel.cli.catalogue import run

    with Terminal(json) as terminal:
        run(terminal)


@app.command()
def explain(
    model: Annotated[
        str, typer.Argument(help="A Hugging Face ID or folder, or 'tiny', or the name of a tiny or a published model.")
    ],
    json: Json = False,
) -> None:
    """Say which methods fit a model and what each would touch. Needs no weights."""
    from mmaccel.cli.explain import run

    with Terminal(json) as terminal:
        run(terminal, model)


@app.command()
def probe(
    video: Annotated[str, typer.Argument(help="A video file, or a URL that FFmpeg opens.")],
    frames: Annotated[int | None, typer.Option(min=1, help="Frames to sample; 32, or all of a shorter video.")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames to sample in a second, instead.")] = None,
    size: Annotated[str | None, typer.Option(help="Shorter side in pixels, or HEIGHTxWIDTH.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Decoding threads; one a core, at most 16.")] = None,
    json: Json = False,
) -> None:
    """Say what is in a video file, and what reading frames of it would cost. Decodes one picture only."""
    from mmaccel.cli.probe import run

    with Terminal(json) as terminal:
        run(terminal, video, frames=frames, fps=fps, size=size, threads=threads)


# click's ClickException; typer carries its own copy of it since 0.20, and both versions are allowed.
_UsageProblem: Any = typer.BadParameter.__mro__[2]


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0, 1 for an error, 2 for wrong usage, 130 when interrupted."""
    say_what_can_be_said()
    arguments = list(sys.argv[1:] if words is None else words)
    debug = "--debug" in arguments
    # A traceback is wanted after the fact, so the switch may stand at the end of the line as well.
    arguments = [*(["--debug"] if debug else []), *(word for word in arguments if word != "--debug")]
    try:
        code = app(args=arguments, prog_name="mmaccel", standalone_mode=False)
        # typer says so by a code, older ones by Abort
        return _fail("interrupted.", 130) if code == 130 else code if isinstance(code, int) else 0
    except _UsageProblem as error:
        return _fail(error.format_message().rstrip(".") + " (see mmaccel --help)", error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted.", 130)
    except Exception as error:
        from mmaccel.errors import MMAccelError

        if debug:
            raise
        if isinstance(error, MMAccelError):
            return _fail(str(error), 1)
        return _fail(f"unexpected {type(error).__name__}: {error} (--debug shows where)", 1)


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"mmaccel: {one_line(message)}\n")
    return code
