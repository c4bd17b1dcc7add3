"""References that know nothing of the machinery: dense models with masked tokens, naive loops, exact snapshots."""

from __future__ import annotations

import contextlib

import torch
import transformers
from packaging.version import Version

from mmaccel.tiny.families import FAMILIES

VIDEO = [family for family in FAMILIES.values() if "video" in family.modalities]
ALL = list(FAMILIES.values())


def ids(families):
    return [family.name for family in families]


def mixture(family):
    """Three prompts of different kinds and lengths, one of them without anything visual."""
    return ["video" if "video" in family.modalities else "image", "text", "images"]


def call(model, inputs, **more):
    with torch.no_grad():
        return model(**fresh(inputs), **more)


CACHE = "cache" if Version(transformers.__version__) >= Version("5.24") else "past_key_values"


def cached(cache):
    """The keyword that hands a cache to a model of this version of transformers."""
    return {CACHE: cache}


def cache_of(output):
    return output[CACHE]


def fresh(inputs):
    """The library keeps and changes what it is given, so every call gets its own dictionary."""
    return dict(inputs)


def generate(model, inputs, steps=8, **more):
    """(ids, logits [steps + 1][B, V]) of greedy generation: prefill and `steps` decode steps."""
    more = {"max_new_tokens": steps + 1, "output_logits": True, "return_dict_in_generate": True} | more
    out = model.generate(**fresh(inputs), **more)
    return out.sequences, out.logits


def dropped(kept, inputs):
    """bool [B, S]: the tokens of the prompts, padding apart, that are not among `kept`."""
    valid = inputs["attention_mask"].bool()
    gone = valid.clone()
    for row, places in zip(gone, kept, strict=True):
        row[places] = False
    return gone


@contextlib.contextmanager
def masked(model, gone, layer=0):
    """The dense model, to which the tokens `gone` (bool [B, N], of the first N seen) are invisible from `layer` on.

    Positions are left alone. More rows than B are repeats of each row (beams).
    """
    language_model, seen = model.model.language_model, {}

    def hidden(width, B):
        hide = torch.zeros(B, width, dtype=torch.bool)
        n = min(width, gone.shape[1])
        hide[:, :n] = gone.repeat_interleave(B // len(gone), 0)[:, :n]
        return hide

    def whole(_module, args, kwargs):
        B, S = kwargs["inputs_embeds"].shape[:2]
        cache = kwargs.get(CACHE)
        past = cache.get_seq_length() if cache is not None else 0
        given = kwargs.get("attention_mask")
        assert given is None or given.dim() == 2
        base = torch.ones(B, past + S, dtype=torch.bool) if given is None else given.bool()
        visible = base & ~hidden(past + S, B)
        if layer == 0:
            return args, {**kwargs, "attention_mask": visible.long()}
        causal = torch.ones(S, past + S, dtype=torch.bool).tril(past)
        seen["mask"] = causal & visible[:, None, None]
        return None

    def later(_module, args, kwargs):
        return args, {**kwargs, "attention_mask": seen["mask"]}

    hooks = [language_model.register_forward_pre_hook(whole, with_kwargs=True)]
    if layer:
        hooks += [each.register_forward_pre_hook(later, with_kwargs=True) for each in language_model.layers[layer:]]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def close(got, want, atol=1e-5):
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


def rows_of(logits, kept, left=True):
    """For each row the logits of its kept tokens, from a batch filled up on the left or right."""
    return [row[-len(places) :] if left else row[: len(places)] for row, places in zip(logits, kept, strict=True)]


def seen_by_language_model(model, run):
    """The keywords that the language model gets in the first of its calls inside of `run()`, ours applied."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    try:
        run()
    finally:
        hook.remove()
    return seen[0]


def closed_up(position, places, kept):
    """int64 [P, n]: the ids of the kept tokens of one prompt after renumbering, token by token.

    position: [P, S], the dense ids. One axis: consecutive. More (M-RoPE): what follows a run of visual tokens moves up
    by as much as the run's largest y or x has shrunk.
    """
    kept, S = set(kept), position.shape[1]
    if position.shape[0] == 1:
        start = int(position[0, min(kept)]) if places[min(kept)] is None else 0
        return torch.arange(start, start + len(kept))[None]
    moved, out, i = 0, [], 0
    while i < S:
        j = i + 1
        if places[i] is not None:
            while j < S and places[j] is not None and places[j].item == places[i].item:
                j += 1
        run = range(i, j)
        out += [position[-3:, k] - moved for k in run if k in kept]
        if places[i] is not None:
            high = {k: max(position[-2:, k].tolist()) for k in run}
            lowest = min(min(position[-2:, k].tolist()) for k in run)
            left = [high[k] for k in run if k in kept]
            moved += max(high.values()) - (max(left) if left else lowest - 1)
        i = j
    return torch.stack(out, 1)


HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
HOOK_FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


def snapshot(model):
    """Everything that can be told apart about a model without running it, as plain values by module path."""
    found = {}
    for path, module in model.named_modules():
        found[path, "class"] = type(module)
        for name, value in vars(module).items():
            if name in HOOKS:
                found[path, name] = [getattr(hook, "__qualname__", repr(type(hook))) for hook in value.values()]
            elif name in HOOK_FLAGS:
                found[path, name] = len(value)
            elif name in ("_parameters", "_buffers"):
                found |= {(path, name, key): _plain(tensor) for key, tensor in value.items()}
            elif name == "_modules":
                found[path, name] = list(value)
            else:
                found[path, name] = _plain(value)
    return found


def _plain(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), hash(value.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    if hasattr(value, "to_dict"):
        return type(value), value.to_dict(), {k: v for k, v in vars(value).items() if k.startswith("_")}
    if callable(value):
        return getattr(value, "__qualname__", type(value))
    return value
