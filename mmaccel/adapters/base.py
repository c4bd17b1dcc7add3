"""What an adapter is: where the parts of a model family are, and how its visual tokens are laid out."""

from __future__ import annotations

import inspect
import math
from typing import Any, ClassVar

import torch
from torch import nn

from mmaccel.adapters.towers import BatchedTower, PackedTower
from mmaccel.core.encoder import Encoder
from mmaccel.core.prefill import Encoded, GridLayout, ItemLayout
from mmaccel.errors import AdapterError, NotApplicableError

__all__ = ["VideoLM", "get_module", "raster", "square"]


def get_module(root: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted `path`; the empty path is `root` itself.

    Raises:
        AdapterError: there is none.
    """
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise AdapterError(
            f"{type(root).__name__} has no module {path!r}; this version of its library is laid out differently from "
            "what the adapter expects."
        ) from error


def raster(T: int, H: int, W: int, *, start: int = 0) -> GridLayout:
    """A grid whose cells stand one behind the other in raster order, from token `start` of the item on."""
    return GridLayout((T, H, W), torch.arange(start, start + T * H * W))


def square(n: int) -> tuple[int, int]:
    """(H, W) of a square grid of n tokens.

    Raises:
        AdapterError: n is not a square number.
    """
    side = math.isqrt(n)
    if side * side != n:
        raise AdapterError(f"{n} visual tokens do not form a square grid; this encoder's layout is not known.")
    return side, side


class VideoLM:
    """A vision-language model of transformers, seen through its family's adapter.

    A subclass declares where things are. `target` is the object that the user holds, `root` the inner model whose
    forward joins image features and text.

    Raises:
        AdapterError: a part that the adapter names is missing.
    """

    family: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    encoders: ClassVar[dict[str, str]] = {"image": "get_image_features", "video": "get_video_features"}
    vision: ClassVar[str] = "vision_tower"
    vision_layers: ClassVar[str] = "encoder.layers"
    vision_attention: ClassVar[str] = "self_attn"
    projector: ClassVar[str] = "multi_modal_projector"
    decoder_attention_name: ClassVar[str] = "self_attn"
    patches_per_cell: ClassVar[int] = 1
    rotary_axes: ClassVar[int] = 1

    def __init__(self, target: nn.Module) -> None:
        self.target = target
        inner = getattr(target, "model", None)
        self.root: nn.Module = inner if isinstance(inner, nn.Module) and hasattr(inner, "language_model") else target
        self.language_model = get_module(self.root, "language_model")
        self.vision_tower = get_module(self.root, self.vision)
        for method in self.encoders.values():
            if not hasattr(self.root, method):
                raise AdapterError(f"{type(self.root).__name__} has no {method}; transformers >= 5.10 is needed.")
        self._signatures = {
            modality: inspect.signature(getattr(type(self.root), method)) for modality, method in self.encoders.items()
        }

    @property
    def config(self) -> Any:
        """The configuration of the whole model."""
        return self.root.config

    @property
    def layers(self) -> Any:
        """The decoder layers of the language model."""
        return get_module(self.language_model, "layers")

    @property
    def has_class_token(self) -> bool:
        """Whether token 0 of the vision tower is a class token that the language model does not get."""
        return False

    @property
    def windowed(self) -> bool:
        """Whether some decoder layers attend inside a sliding window or chunk."""
        config = self.language_model.config
        kinds = getattr(config, "layer_types", None)
        if kinds:
            return any("sliding" in kind or "chunked" in kind for kind in kinds)
        return getattr(config, "sliding_window", None) is not None

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    def bind(self, modality: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of an encoder call by name."""
        bound = self._signatures[modality].bind_partial(self.root, *args, **kwargs)
        named = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        if modality == "video" and "pixel_values_videos" not in named:  # what LLaVA calls them in older transformers
            named["pixel_values_videos"] = named.get("pixel_values")
        return named

    def decoder_attention(self, layer: int) -> nn.Module:
        """The attention module of decoder layer `layer`."""
        return get_module(self.layers[layer], self.decoder_attention_name)

    def vision_blocks(self) -> Any:
        """The layers of the vision tower."""
        inner = getattr(self.vision_tower, "vision_model", self.vision_tower)
        return get_module(inner, self.vision_layers)

    def encoder(self) -> Encoder:
        """The vision tower, taken apart.

        Raises:
            AdapterError: its blocks are built in a way that is not known.
        """
        from mmaccel.adapters.vision import of_vision_tower

        return of_vision_tower(self)

    def video_frames(self, encoded: Encoded) -> list[tuple[int, int]]:
        """(frames, rows of each in dimension 0 of the tower's tokens) of a call's videos; [] for batched images."""
        if encoded.modality != "video":
            return []
        videos, T = encoded.arguments["pixel_values_videos"].shape[:2]
        return [(T, 1)] * videos

    def sees_whole_frames(self, layer: int) -> int:
        """The last vision block up to `layer` whose attention is not cut into windows."""
        return layer

    def frame_boundary(self) -> list[nn.Module | tuple[nn.Module, str]]:
        """The modules, or (object, method)s, behind which features of all frames have to be there."""
        return [get_module(self.root, self.projector)]

    def score_layer(self, chosen: Any = None) -> int:
        """The vision layer whose output the language model gets: its attention tells which tokens matter.

        chosen: the `vision_feature_layer` of a call, by default that of the config.
        """
        chosen = getattr(self.config, "vision_feature_layer", -1) if chosen is None else chosen
        chosen = chosen[-1] if isinstance(chosen, (list, tuple)) else chosen
        depth = len(self.vision_blocks())
        return depth + chosen if chosen < 0 else chosen - 1

    def score_attention(self) -> nn.Module:
        """The attention module of the score layer."""
        return get_module(self.vision_blocks()[self.score_layer()], self.vision_attention)

    def score_kind(self) -> str:
        """Which scores the tower gives: attention of the class token, or attention received from all tokens."""
        return "cls" if self.has_class_token else "received"

    def module_paths(self) -> tuple[str, str]:
        """Names of the vision tower and of the projector, as seen from the user's object."""
        prefix = "model." if self.root is not self.target else ""
        return prefix + self.vision, prefix + self.projector

    def placeholders(self, input_ids: torch.Tensor | None, embeds: torch.Tensor) -> dict[str, torch.Tensor]:
        """bool [B, S] by modality: where visual tokens stand in the prompt."""
        found = {}
        for modality in self.encoders:
            token = getattr(self.config, f"{modality}_token_id")
            if input_ids is not None:
                found[modality] = input_ids == token
            else:
                found[modality] = self.spelled(embeds, token)
        return found

    def spelled(self, embeds: torch.Tensor, token: int) -> torch.Tensor:
        """bool [B, S]: where the embeddings are those of one token (prompts given as embeddings)."""
        table = self.root.get_input_embeddings()  # type: ignore[operator]
        one = table(torch.tensor(token, device=embeds.device))
        return (embeds == one.to(embeds.dtype)).all(-1)

    @property
    def interpolates(self) -> bool:
        """Whether the tower has to be asked to fit its position table to another image size."""
        return True

    @property
    def frames_at_once(self) -> int:
        """How many frames of a video the tower joins to one group of tokens."""
        return 1

    def clock(self, group: int, seconds: float) -> float | None:  # noqa: ARG002
        """Temporal position of a video's frame group before it is rounded down, from its number and when it begins.

        None where each group begins behind the tokens before it, as text does; otherwise all groups of a video share
        their origin and are apart in time only.
        """
        return None

    def tower(self) -> BatchedTower | PackedTower:
        """How the tower can be given less."""
        return BatchedTower(
            self.config.vision_config, class_token=self.has_class_token, patches_per_cell=self.patches_per_cell
        )

    def resizable(self, kind: str) -> bool:
        """Whether images or videos ("image", "video") of this family may be given smaller."""
        return kind in self.encoders

    def layout(self, encoded: Encoded, where: torch.Tensor) -> list[ItemLayout]:
        """The items that one encoder call made, in the order of their features."""
        raise NotImplementedError

    def token_scores(self, encoded: Encoded, kind: str) -> torch.Tensor:
        """float32 [tokens]: the scores of the vision tower's tokens, brought to the tokens of the language model."""
        raise NotImplementedError

    def raw_scores(self, encoded: Encoded, kind: str) -> torch.Tensor:
        """float32 [images, patches]: scores of a batched tower, class token cut off.

        Raises:
            NotApplicableError: this call takes its features from another layer than the config says.
        """
        layer = self.score_layer(encoded.arguments.get("vision_feature_layer"))
        if layer != self.score_layer():
            raise NotApplicableError(
                f"this call takes features of vision layer {layer}, but attention is read at layer "
                f"{self.score_layer()}; set config.vision_feature_layer instead of passing it."
            )
        scores = torch.cat(encoded.scores[kind], 0)
        for thinned in reversed(encoded.thinned):
            scores = thinned.tokens(scores)
        return scores[:, 1:] if self.has_class_token else scores
