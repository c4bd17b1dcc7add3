"""Text K/V cache: what the layers make of the prompt is computed once a sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mmaccel.diffusion.diffusers_caches import STEPS, Clock, DiffusersCache
from mmaccel.diffusion.diffusers_hooks import Installed
from mmaccel.errors import NotApplicableError
from mmaccel.method import Info, Stage

if TYPE_CHECKING:
    from mmaccel.install import Installer


@dataclass(frozen=True)
class TextKVCache(DiffusersCache):
    """diffusers' own cache of the prompt's keys and values under our handle: the same result, less work.

    Sentence: the prompt is the one of the step before -> every block alike -> all steps but the first -> reuse -> keys
    and values of the prompt. Source: TextKVCache, as shipped by diffusers (2026). Its hooks are written for the blocks
    of NucleusMoE, each of which projects the prompt for itself; `hsa` keeps the projections of the prompt on the
    families that it knows. diffusers tells prompts apart by where they are in memory: embeddings are kept alive here
    while a sampling goes on, so that no two are ever in the same place, and attention arguments are copied, into which
    diffusers writes.
    """

    info: ClassVar[Info] = Info(
        name="text-kv-cache", verb="reuse", stage=Stage.DIFFUSION,
        summary="computes keys and values of the prompt once a sampling (diffusers' own)",
        source="TextKVCache, as shipped by diffusers", year=2026, targets=("diffusion",), slots=(STEPS,),
        lossless=True, licence="Apache-2.0 (diffusers)",
    )  # fmt: skip

    def sites(self, transformer: Any) -> list[str]:
        """The blocks of diffusers' class.

        Raises:
            NotApplicableError: the transformer has none.
        """
        from diffusers.models.transformers.transformer_nucleusmoe_image import NucleusMoEImageTransformerBlock

        found = [
            name for name, module in transformer.named_modules() if isinstance(module, NucleusMoEImageTransformerBlock)
        ]
        if not found:
            raise NotApplicableError(
                f"text-kv-cache: diffusers wrote this cache for the blocks of NucleusMoE, and "
                f"{type(transformer).__name__} has none; hsa keeps the projections of the prompt elsewhere."
            )
        return found

    def apply(self) -> Any:
        """diffusers' function."""
        from diffusers.hooks.text_kv_cache import apply_text_kv_cache

        return apply_text_kv_cache

    def config(self, transformer: Any, clock: Clock) -> Any:  # noqa: ARG002
        """There is nothing to set."""
        from diffusers.hooks.text_kv_cache import TextKVCacheConfig

        config: Any = TextKVCacheConfig()
        config.alive = []
        return config

    def begin(self, config: Any, installed: Installed, steps: int | None) -> None:
        """Prompts of earlier samplings are forgotten."""
        config.alive = []
        super().begin(config, installed, steps)

    def watch(self, installer: Installer, installed: Installed, config: Any) -> None:
        """Keep embeddings alive, and count how often the first block projects them."""
        events, patcher = installer.report.events, installer.patcher
        block = next(module for module, _, _, _ in installed.hooks if module is not installed.transformer)

        def before(_: Any, args: Any, kwargs: Any) -> Any:
            config.alive.append(kwargs.get("encoder_hidden_states"))
            events["steps reused"] = events.get("steps reused", 0) + 1
            return args, {**kwargs, "attention_kwargs": dict(kwargs.get("attention_kwargs") or {})}

        def project(*_: Any) -> None:
            events["steps computed"] = events.get("steps computed", 0) + 1
            events["steps reused"] -= 1

        patcher.before(installed.transformer, before)
        patcher.before(block.encoder_proj, project)
