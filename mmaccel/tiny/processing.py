"""Tokenizer, chat template and processor of the embedded video-QA model, in the real transformers classes."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

from mmaccel.errors import VocabularyError
from mmaccel.tiny.world import COLORS, DIRECTIONS, SHAPES, SIZE

if TYPE_CHECKING:
    from transformers import LlavaOnevisionProcessor, PreTrainedTokenizerFast

__all__ = [
    "CHAT_TEMPLATE",
    "PATCH",
    "SPECIAL_TOKENS",
    "WORDS",
    "build_processor",
    "build_tokenizer",
    "check_vocabulary",
]

PATCH = 8
SPECIAL_TOKENS = ("<pad>", "<unk>", "<|user|>", "<|assistant|>", "<|end|>", "<image>", "<video>")
WORDS = (
    *("what", "color", "shape", "is", "the", "object", "objects", "which", "way", "does", "move", "how", "many"),
    *("are", "there", "came", "first", "or", "that", "appeared", "last", "?", ","),
    *COLORS,
    *SHAPES,
    *DIRECTIONS,
    *("1", "2", "3", "4"),
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}{{ '<' + part['type'] + '>' }}{% endif %}{% endfor %}{% endif %}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def check_vocabulary(text: str) -> None:
    """Raise `VocabularyError` for words that the embedded model was never taught; case does not matter."""
    pieces = re.findall(r"<\|?\w+\|?>|\w+|[^\w\s]+", text.lower())
    special = sorted({piece for piece in pieces if piece in SPECIAL_TOKENS})
    if special:
        raise VocabularyError(
            f"{', '.join(special)} cannot stand in a question: the prompt around it is made by the chat template"
        )
    known = set(WORDS)
    strange = list(dict.fromkeys(piece for piece in pieces if piece not in known))
    if not strange:
        return
    near = [word for piece in strange for word in difflib.get_close_matches(piece, WORDS, n=2)]
    hint = ", ".join(dict.fromkeys([*near, *COLORS, *SHAPES]))
    raise VocabularyError(
        f"the embedded model does not know {', '.join(map(repr, strange))}; it was taught {len(WORDS)} words,"
        f" among them {hint} - ask for example 'what color is the ring ?'"
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing word-level tokenizer over `SPECIAL_TOKENS` and `WORDS`, padding on the left."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate((*SPECIAL_TOKENS, *WORDS))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<image>", "<video>"],
        padding_side="left",
        model_max_length=4096,
    )


def build_processor() -> LlavaOnevisionProcessor:
    """The processor: `SIZE` x `SIZE` pixels, `PATCH`-pixel patches, 64 pooled tokens a frame and one newline token."""
    from transformers import LlavaOnevisionImageProcessor, LlavaOnevisionProcessor, LlavaOnevisionVideoProcessor

    size = {"height": SIZE, "width": SIZE}
    gray = [0.5, 0.5, 0.5]
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(
            size=size, image_mean=gray, image_std=gray, image_grid_pinpoints=[[SIZE, SIZE]]
        ),
        tokenizer=build_tokenizer(),
        video_processor=LlavaOnevisionVideoProcessor(size=size, image_mean=gray, image_std=gray),
        num_image_tokens=(SIZE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        chat_template=CHAT_TEMPLATE,
    )
