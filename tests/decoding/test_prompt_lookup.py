"""transformers' prompt lookup under our handle: same tokens, fewer forwards, exact undo."""

from __future__ import annotations

import pytest
import torch

import mmaccel
from mmaccel.errors import ConflictError, MethodError, NotApplicableError
from mmaccel.tiny.families import FAMILIES
from mmaccel.tiny.pipelines import tiny_text_lm


def ids(text):
    return torch.tensor([list(text.encode())])


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_greedy_output_is_the_same_and_forwards_are_counted(kind):
    model, _ = tiny_text_lm(kind)
    prompt = ids("abc abc abd abc abc abd abc")
    dense = model.generate(input_ids=prompt, max_new_tokens=24, do_sample=False)
    forwards = []
    hook = model.register_forward_hook(lambda *_: forwards.append(1))
    with mmaccel.accelerate(model, mmaccel.PromptLookup(draft=5)) as handle:
        assert torch.equal(model.generate(input_ids=prompt, max_new_tokens=24, do_sample=False), dense)
    hook.remove()
    events = handle.report().events
    assert events["tokens written"] == dense.shape[1] - prompt.shape[1]
    assert events["forwards"] == len(forwards)
    assert events["tokens per forward"] == round(events["tokens written"] / events["forwards"], 3)


def test_draft_zero_is_the_identity_and_undo_is_exact():
    model, _ = tiny_text_lm()
    prompt = ids("one two one two")
    dense = model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)
    before = {name: sorted(vars(module)) for name, module in model.named_modules()}
    with mmaccel.accelerate(model, "prompt-lookup:draft=0"):
        assert torch.equal(model.generate(input_ids=prompt, max_new_tokens=8, do_sample=False), dense)
    assert {name: sorted(vars(module)) for name, module in model.named_modules()} == before
    assert not model._forward_hooks
    assert model.generate.__func__ is type(model).generate


def test_models_with_images_are_refused():
    with pytest.raises(NotApplicableError, match="prompt-lookup works on text-lm"):
        mmaccel.accelerate(FAMILIES["llava-onevision"].build(), "prompt-lookup")


def test_wrong_use_is_refused():
    model, _ = tiny_text_lm()
    with pytest.raises(MethodError, match="draft"):
        mmaccel.PromptLookup(draft=-1)
    with mmaccel.accelerate(model, "prompt-lookup"), pytest.raises(ConflictError, match="pause"):
        model.generate(input_ids=ids("abab"), max_new_tokens=4, prompt_lookup_num_tokens=3)
