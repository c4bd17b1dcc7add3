"""A tokenizer that needs no file: one token for each byte, and one for each special token."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerFast

PAD = "<pad>"
EOS = "<eos>"
VOCABULARY = 288


def byte_tokenizer(
    special: Sequence[str] = (), *, padding_side: str = "left", close: bool = False, **named: str
) -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer in memory, so that the length of a text is known without asking it.

    Every byte is one token (ids 0 to 255), `<pad>` is 256, `<eos>` 257, then come `special` in the order given.
    `close` ends each text with `<eos>`, as the text encoders of diffusion pipelines want. `named` gives attribute
    names to special tokens, as the processor of InternVL wants: `byte_tokenizer(["<img>"], start_image_token="<img>")`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([PAD, EOS, *special])
    if close:
        ending = [(EOS, special_ids(special)[EOS])]
        backend.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=ending)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        padding_side=padding_side,
        extra_special_tokens=named or list(special),
        clean_up_tokenization_spaces=False,
    )


def special_ids(special: Sequence[str]) -> dict[str, int]:
    """Give the ids that `byte_tokenizer(special)` assigns: `<pad>` 256, `<eos>` 257, then the others in order."""
    return {token: 256 + index for index, token in enumerate((PAD, EOS, *special))}
