"""What every tiny family offers: a model, a processor, inputs, and an account of its own which token is what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mmaccel.errors import NotApplicableError
from mmaccel.tiny.families.tokenizer import special_ids
from mmaccel.tiny.families.weights import build_random

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PretrainedConfig

KINDS: dict[str, tuple[str, ...]] = {
    "text": (),
    "image": ("image",),
    "video": ("video",),
    "images": ("image", "image"),
    "videos": ("video", "video"),
    "image+video": ("image", "video"),
    "turn": (),
}
"""What a prompt of each kind holds. `turn` is the text of a second chat turn, to be put behind an answered prompt."""

QUESTIONS = ("Which colour comes last?", "How many shapes move, and where to?", "Why?")


class Item(NamedTuple):
    """One image or video of a prompt: `number` counts both together, in the order of the prompt; sizes in pixels."""

    modality: str
    number: int
    frames: int
    height: int
    width: int


class Place(NamedTuple):
    """Where a visual token comes from.

    `item` counts the images and videos of one prompt together. `t` is the frame, the group of frames that the model
    encodes as one (Qwen), or the tile of an image cut into tiles; an anyres image has t = 0 for the overview and
    t = 1 for the large picture. `y` and `x` count tokens, not pixels. A newline token has x = -1 and its row in `y`;
    the newline that closes an item has t = y = x = -1.
    """

    modality: str
    item: int
    t: int
    y: int
    x: int


def grid(item: Item, t: int, rows: int, columns: int, *, newline: bool = False) -> list[Place | None]:
    """List the places of one picture in reading order, each row ended by a newline token if asked for."""
    places: list[Place | None] = []
    for y in range(rows):
        places += [Place(item.modality, item.number, t, y, x) for x in range(columns)]
        if newline:
            places.append(Place(item.modality, item.number, t, y, -1))
    return places


@dataclass(frozen=True, eq=False)
class Family:
    """A tiny model family: the real transformers classes, small configs, random weights, no file and no network.

    `config` makes a fresh config, `processor` a fresh processor (`special` are the tokens beyond bytes, `<pad>` and
    `<eos>`). `visual_tokens` names the placeholder that stands in `input_ids` for each visual token, by modality.
    `opening` starts a prompt, `closing` ends it; `before`, `marker` and `after` surround an image or a video.
    `sizes` are (height, width) of the first and of a second item by modality; `frames` of the first and second video.
    `expand` says what the marker of an item becomes in a prompt with these items: a `Place` for a visual token, None
    for a token of text. `arguments` gives what the processor wants to be told about the videos;
    `nested_images` is for a processor that treats several images of one prompt differently from a single one.
    """

    name: str
    model_class: str
    special: tuple[str, ...]
    config: Callable[[], PretrainedConfig]
    processor: Callable[[], Any]
    expand: Callable[[Item, list[Item]], list[Place | None]]
    visual_tokens: dict[str, str]
    marker: dict[str, str]
    opening: tuple[str, ...]
    closing: tuple[str, ...]
    sizes: dict[str, tuple[tuple[int, int], tuple[int, int]]]
    frames: tuple[int, int] = (8, 8)
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ("\n",)
    arguments: Callable[[list[Item]], dict[str, Any]] = lambda _: {}
    nested_images: bool = False

    @property
    def modalities(self) -> frozenset[str]:
        """The modalities that a prompt may hold, of `image` and `video`."""
        return frozenset(self.marker)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of prompt that the family can take."""
        return tuple(kind for kind, needs in KINDS.items() if self.modalities.issuperset(needs))

    @property
    def visual_token_ids(self) -> dict[str, int]:
        """The id in `input_ids` that stands for a visual token, by modality (one id for both in InternVL)."""
        ids = special_ids(self.special)
        return {modality: ids[token] for modality, token in self.visual_tokens.items()}

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
        """Build a fresh model in eval mode with SDPA attention; the same seed gives the same weights.

        Rows of the output head that belong to special tokens are zero, so that greedy decoding never writes one.
        """
        import transformers

        model = build_random(getattr(transformers, self.model_class), self.config(), seed=seed, dtype=dtype)
        model.generation_config.pad_token_id = special_ids(self.special)["<pad>"]
        with torch.no_grad():
            model.lm_head.weight[256:] = 0
        return model

    def inputs(
        self,
        kind: str | Sequence[str],
        batch: int = 1,
        seed: int = 0,
        *,
        row: int | None = None,
        pictures: list[list[torch.Tensor]] | None = None,
    ) -> dict[str, Any]:
        """Make inputs for `model(**inputs)` and `model.generate(**inputs)` with the family's own processor.

        `kind` is one of `kinds`, used for all `batch` prompts, or one kind for each prompt. Prompts differ in length
        and are padded on the left; `row` gives one prompt of that batch alone, without padding. `pictures` replaces
        what `pictures(kind, batch, seed)` draws. Kind `turn` gives `input_ids` and masks of the new text only, all
        rows of one length. Raises `NotApplicableError` for a kind that the family does not take.
        """
        prompts = self._prompts(kind, batch)
        drawn = self.pictures(kind, batch, seed) if pictures is None else pictures
        if row is not None:
            prompts, drawn = prompts[row : row + 1], drawn[row : row + 1]
        items = [[item for _, item in prompt if item is not None] for prompt in prompts]
        pairs = [list(zip(*pair, strict=True)) for pair in zip(items, drawn, strict=True)]
        images = [[pixels for item, pixels in pair if item.modality == "image"] for pair in pairs]
        videos = [pixels for pair in pairs for item, pixels in pair if item.modality == "video"]
        given: dict[str, Any] = {}
        if any(images):
            given["images"] = images if self.nested_images else [image for some in images for image in some]
        if videos:
            given |= {"videos": videos, **self.arguments([item for some in items for item in some])}
        texts = ["".join(piece for piece, _ in prompt) for prompt in prompts]
        return dict(_processor(self)(text=texts, padding=True, return_tensors="pt", **given))

    def pictures(self, kind: str | Sequence[str], batch: int = 1, seed: int = 0) -> list[list[torch.Tensor]]:
        """Draw the images ([3, H, W]) and videos ([T, 3, H, W]) of each prompt, uint8, in the order of the prompt."""
        generator = torch.Generator().manual_seed(seed)
        return [[_draw(item, generator) for _, item in row if item is not None] for row in self._prompts(kind, batch)]

    def places(self, kind: str | Sequence[str], batch: int = 1, *, row: int | None = None) -> list[list[Place | None]]:
        """Say for each position of `inputs(kind, batch, row=row)["input_ids"]` which visual token it is, or None.

        Nothing of the processor or of the tokenizer is asked: text has one token a byte, items expand by `expand`.
        """
        prompts = self._prompts(kind, batch)
        rows: list[list[Place | None]] = []
        for prompt in prompts if row is None else prompts[row : row + 1]:
            items = [item for _, item in prompt if item is not None]
            places: list[Place | None] = []
            for piece, item in prompt:
                if item is not None:
                    places += self.expand(item, items)
                else:
                    places += [None] * (1 if piece in self.special else len(piece.encode()))
            rows.append(places)
        longest = max(map(len, rows))
        return [[None] * (longest - len(places)) + places for places in rows]

    def _prompts(self, kind: str | Sequence[str], batch: int) -> list[list[tuple[str, Item | None]]]:
        kinds = [kind] * batch if isinstance(kind, str) else list(kind)
        prompts = []
        for number, one in enumerate(kinds):
            pieces: list[tuple[str, Item | None]] = [(piece, None) for piece in self.opening]
            for item in self._items(one):
                pieces += [(piece, None) for piece in self.before]
                pieces.append((self.marker[item.modality], item))
                pieces += [(piece, None) for piece in self.after]
            question = QUESTIONS[number % len(QUESTIONS)] if one != "turn" else f"And {'abc'[number % 3]}?"
            pieces.append((question, None))
            pieces += [(piece, None) for piece in self.closing]
            prompts.append(pieces)
        return prompts

    def _items(self, kind: str) -> list[Item]:
        if kind not in self.kinds:
            known = ", ".join(self.kinds)
            raise NotApplicableError(f"{self.name} takes no prompt of kind {kind!r}; use one of: {known}.")
        seen = {"image": 0, "video": 0}
        items = []
        for number, modality in enumerate(KINDS[kind]):
            nth = seen[modality]
            seen[modality] += 1
            frames = self.frames[nth] if modality == "video" else 1
            items.append(Item(modality, number, frames, *self.sizes[modality][nth]))
        return items


@cache
def _processor(family: Family) -> Any:
    return family.processor()


def _draw(item: Item, generator: torch.Generator) -> torch.Tensor:
    """Draw a textured background with a bright square that moves, and a cut to another scene half way."""
    size = (item.height, item.width)
    scenes = torch.randint(0, 160, (2, *size, 3), generator=generator)
    frames = []
    for number in range(item.frames):
        frame = scenes[2 * number // item.frames] + torch.randint(0, 16, (*size, 3), generator=generator)
        left = (4 * number) % max(1, item.width - 8)
        frame[item.height // 3 : item.height // 3 + 8, left : left + 8] = torch.tensor([250, 200, 40])
        frames.append(frame)
    pixels = torch.stack(frames).to(torch.uint8).permute(0, 3, 1, 2)
    return pixels if item.modality == "video" else pixels[0]
