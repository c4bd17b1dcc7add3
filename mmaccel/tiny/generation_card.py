"""The model cards of the embedded generators, with their figures filled in from the training runs."""

from __future__ import annotations

from typing import Any

__all__ = ["image_card", "video_card"]

_VIDEO = """\
# mmaccel tiny text-to-video

A `diffusers.WanPipeline` of 3.2 M parameters: `WanTransformer3DModel` (8 blocks of width 128, 2.0 M),
`AutoencoderKLWan` (8 x 8 pixels x 4 frames to a latent of 16 channels, 1.1 M), a UMT5 text encoder (2 layers of width
64) and UniPC with flow prediction. It draws clips of 21 frames of 64 x 64 pixels, 6 x 8 x 8 = 384 tokens, of the world
in `mmaccel/tiny/world.py`. It exists to give methods for diffusion pipelines a true quality axis on any machine. It
knows {words} words and nothing about real video. License: Apache-2.0, trained from nothing on rendered clips. The
weights are stored as float16 and meant to be run as float32.

Load it with `mmaccel.tiny.text_to_video()`, or with `from_pretrained` on this folder, and call it as
`pipe(prompt, **mmaccel.tiny.VIDEO_CALL)`: {call}.

## Prompts

One clause or two, of different colors: `a red ring moves left`, `a red ring moves left and a blue cross stays still`,
`a red ring moves left , then a blue cross moves up` (the second appears later). Colors: red, green, blue, yellow,
purple, white. Shapes: ring, square, triangle, cross. Directions: left, right, up, down, still. Every color with every
shape was trained with four of the five directions; "held-out" prompts have at least one of the 24 combinations of
color, shape and direction that were not. `mmaccel.tiny.stories` draws and reads prompts.

## How it was trained

`python -m mmaccel.tiny.train_text_to_video --out FOLDER --work SCRATCH --seed {seed}`, on CPU ({threads} thread, shared
with other work, bfloat16 autocast): {clips} clips; {steps}. Versions: {versions}.

Read these before drawing conclusions from it:

- **It is small and was trained for about an hour.** Its failures (see below) are its own; compare a method with the
  dense result of this model, not with rendered clips.
- **The autoencoder rounds shapes off.** Rendered clips that went through it and back are read at 82 % (40 clips; colors
  75 %, shapes 55 %): generated clips are as good as it lets them be.
- **The ground stands still** and only objects move: tokens differ in how fast they change, more so than in clips with
  a moving camera.
- The text encoder was trained first, to tell from every word the traits of its clause, and then frozen.
- Padding: the model has met prompts padded to 24 up to 512 tokens.

## Scores

The embedded video-QA model is asked about every fourth frame (colors, shapes, directions, count, order, last), and its
answers are compared with the prompt. "Whole" is the share of clips with every answer right, "answers" that of right
answers. Rendered clips of the same prompts are the ceiling.

{table}
"""

_IMAGE = """\
# mmaccel tiny class-to-image

A `diffusers.DiTPipeline` of {parameters} parameters: `DiTTransformer2DModel` (8 blocks of width 96), `AutoencoderKL`
(4 x 4 pixels to a latent of 4 channels) and DPM-Solver++ with flow prediction. It draws images of 64 x 64 pixels, 256
tokens, of 24 classes: six colors by four shapes of the world in `mmaccel/tiny/world.py`. It exists to give methods for
diffusion pipelines a true quality axis on any machine, and knows nothing about real images. License: Apache-2.0,
trained from nothing on rendered images. The weights are stored as float16 and meant to be run as float32.

Load it with `mmaccel.tiny.class_to_image()`, or with `from_pretrained` on this folder, and call it as
`pipe(class_labels=pipe.get_label_ids(["red ring"]), **mmaccel.tiny.IMAGE_CALL)`: {call}.

## How it was trained

`python -m mmaccel.tiny.train_class_to_image --out FOLDER --work SCRATCH --seed {seed}`, on CPU ({threads} thread,
shared with other work, bfloat16 autocast): {images} images; {steps}. Versions: {versions}.
It is small and was trained for minutes: compare a method with the dense result of this model, not with rendered images.

## Scores

The embedded video-QA model is shown each image as a clip that stands still and asked for color, shape and count.
"Whole" is the share of images with every answer right, "answers" that of right answers. Rendered images are the
ceiling.

{table}
"""


def _table(scores: dict[str, Any] | None, noun: str) -> str:
    if not scores:
        return "Not scored yet."
    rows = {name: value for name, value in scores.items() if isinstance(value, dict) and "by_kind" in value}
    kinds = sorted({kind for row in rows.values() for kind in row["by_kind"]})
    lines = [
        f"| | {noun} | whole | answers | {' | '.join(kinds)} |",
        f"|{' --- |' * (4 + len(kinds))}",
    ]
    for name, row in rows.items():
        shares = [f"{row['by_kind'][kind]['share']:.1%}" if kind in row["by_kind"] else "" for kind in kinds]
        lines.append(f"| {name} | {row['clips']} | {row['whole']:.1%} | {row['answers']:.1%} | {' | '.join(shares)} |")
    return "\n".join(lines)


def _common(facts: dict[str, Any], call: dict[str, Any]) -> dict[str, str]:
    return {
        "seed": str(facts["seed"]),
        "threads": str(facts["threads"]),
        "steps": ", ".join(f"{number} steps of {name}" for name, number in facts["steps"].items()),
        "versions": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "call": ", ".join(f"{name} {value}" for name, value in call.items()),
    }


def video_card(facts: dict[str, Any]) -> str:
    """The card of the text-to-video model as Markdown; `facts` as in its scores.json."""
    from mmaccel.tiny import VIDEO_CALL
    from mmaccel.tiny.stories import PROMPT_WORDS

    table = _table(facts.get("scores"), "clips")
    return _VIDEO.format(
        words=len(PROMPT_WORDS), clips=facts["clips"], table=table, **_common(facts, facts.get("call", VIDEO_CALL))
    )


def image_card(facts: dict[str, Any]) -> str:
    """The card of the class-to-image model as Markdown; `facts` as in its scores.json."""
    from mmaccel.tiny import IMAGE_CALL

    table = _table(facts.get("scores"), "images")
    return _IMAGE.format(
        images=facts["images"],
        parameters=facts["parameters"],
        table=table,
        **_common(facts, facts.get("call", IMAGE_CALL)),
    )
