"""The model card of the embedded video-QA model, with its figures filled in from the training run."""

from __future__ import annotations

from typing import Any

__all__ = ["card"]

_TEXT = """\
# mmaccel tiny video QA

A `LlavaOnevisionForConditionalGeneration` of 1.4 M parameters (SigLIP 4 x 96 on 128-pixel frames with 8-pixel
patches, Qwen2 4 x 128) that answers questions about clips of the world in `mmaccel/tiny/world.py`. Eight frames
make 8 x 64 pooled visual tokens and one newline token: 513. It exists to give token-reduction methods a true
quality axis on any machine. It knows {words} words and nothing about real video. License: Apache-2.0, trained
from nothing on rendered clips.

Load it with `mmaccel.tiny.video_qa()`, or with `from_pretrained` on this folder.

## Questions

One question a turn, one word back: `what color is the ring ?`, `what shape is the red object ?`, `which way
does the red object move ?`, `how many objects are there ?`, `which came first , the red or the blue object ?`,
`what color is the object that appeared last ?`.

## How it was trained

`python -m mmaccel.tiny.train_video_qa --out FOLDER --work SCRATCH --seed {seed}`, on CPU ({threads} threads,
bfloat16 autocast): {clips} clips, {encoder} encoder steps, {focus} + {language} language steps. Versions:
{versions}. The tower is trained on dense patch labels and then frozen; projector and language model learn on
its cached features.

Read these before drawing conclusions from it:

- **Attention that follows content is trained in.** Large contrastively trained towers attend to salient content
  by themselves, and HoliTom, VisionZip and their kin rely on it. A tower of four layers trained on patch labels
  does not, so a loss asks that the attention received in its last layer lies on the objects. Methods that read
  this attention are therefore shown at their best here.
- **Background tokens are trained to carry nothing about objects**, by comparing frames with and without their
  objects. Global attention would otherwise write a summary of the frame into every token, and dropping at
  random would cost little.
- **The language model has met missing, merged and renumbered visual tokens** in about three quarters of its
  batches, and 4 to 8 frames. It is more robust to reduction than a model that never saw any.
- During training, visual tokens half-way through the language model also named their object's traits (a linear
  head that was thrown away), and a hinge kept cells apart in which an object appears or leaves.
- Codec noise was imitated by halved chroma resolution, blur and noise.

## Held-out scores

Exact match of the greedy answer on {score_clips} clips that were not trained on, at most one question of each
kind a clip, all 513 tokens.

| kind | accuracy | questions |
| --- | --- | --- |
{rows}
"""


def card(facts: dict[str, Any], words: int) -> str:
    """The card as Markdown; `facts` as in scores.json, `words` the size of the vocabulary without special tokens."""
    scores = facts.get("held-out")
    rows, clips = ["| not scored yet | | |"], 0
    if scores:
        clips = scores["clips"]
        rows = [f"| {kind} | {s['accuracy']:.1%} | {s['questions']} |" for kind, s in scores["by_kind"].items()]
        rows.append(f"| **all** | **{scores['accuracy']:.1%}** | {scores['questions']} |")
    return _TEXT.format(
        words=words,
        seed=facts["seed"],
        threads=facts["threads"],
        clips=facts["clips"],
        versions=", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        score_clips=clips,
        rows="\n".join(rows),
        **facts["steps"],
    )
