"""Offline answers to compare a stream with: the library's own processor and generate, given the whole video."""

from __future__ import annotations

import torch
from transformers.video_utils import VideoMetadata

from mmaccel.tiny.families import FAMILIES

NAMES = ("llava-onevision", "llava-next-video", "qwen2-vl", "qwen2.5-vl", "qwen3-vl")
STREAMED = [FAMILIES[name] for name in NAMES]
QUESTION = "Which colour comes last?"


def template(family):
    return "".join(
        [*family.opening, *family.before, family.marker["video"], *family.after, "{question}", *family.closing]
    )


def options(family):
    return {"processor": family.processor(), "prompt": template(family)}


def frames_of(family, count=8, seed=0):
    """uint8 [count, 3, H, W]."""
    pictures = [family.pictures("video", seed=seed + n)[0][0] for n in range((count + 7) // 8)]
    return torch.cat(pictures)[:count]


def inputs_of(family, frames, first=0, fps=1.0, question=QUESTION):
    """What the processor makes of a video of `frames`, which were numbers first, first + 1, ... of a longer one."""
    numbers = list(range(first, first + len(frames)))
    # the library takes the rate of what was sampled from the share of all frames that this is
    metadata = VideoMetadata(total_num_frames=len(frames), fps=fps, frames_indices=numbers)
    text = template(family).replace("{question}", question)
    made = family.processor()(
        text=[text], videos=[frames], video_metadata=[metadata], do_sample_frames=False, return_tensors="pt"
    )
    return dict(made)


def offline(model, inputs, steps=5):
    """(token ids, logits [steps, V]) of greedy generation."""
    out = model.generate(
        **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return tuple(out.sequences[0, inputs["input_ids"].shape[1] :].tolist()), torch.cat(out.logits)


def same(answer, want, atol=1e-5):
    ids, logits = want
    assert answer.ids == ids
    torch.testing.assert_close(answer.logits, logits, atol=atol, rtol=0)
