"""Prompt lookup: guess the next tokens by what followed the same words earlier in the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from mmaccel.errors import ConflictError
from mmaccel.method import Info, Method, Stage, Touch, knob

if TYPE_CHECKING:
    from mmaccel.install import Installer
    from mmaccel.report import Report
    from mmaccel.targets import Target

_SLOT = "on the decoding loop of generate"


@dataclass(frozen=True)
class PromptLookup(Method):
    """transformers' own prompt-lookup decoding under our handle: `generate` is called as always.

    Sentence: the last words -> their last occurrence in the text -> the tokens behind it are guessed -> one forward
    verifies them. Source: Saxena, prompt-lookup-decoding (2023), as shipped by transformers. Lossless under greedy
    decoding in float32; sampling keeps the distribution, not the random draws. Batch size 1, as in transformers. Text
    models only: in a prompt with images the library also guesses image placeholders, and then stops with an error.
    draft 0 is the identity.
    """

    draft: int = knob(10, "tokens guessed at a time", low=0)
    ngram: int = knob(2, "longest run of words that is looked up", low=1)

    info: ClassVar[Info] = Info(
        name="prompt-lookup", verb="guess", stage=Stage.DECODING,
        summary="guesses tokens by looking the last words up in the prompt (transformers' own)",
        source="Prompt Lookup Decoding, as shipped by transformers", year=2023, targets=("text-lm",),
        slots=(_SLOT,), lossless=True, licence="Apache-2.0 (transformers)",
    )  # fmt: skip

    @property
    def neutral(self) -> bool:
        """Nothing is guessed."""
        return self.draft == 0

    def plan(self, target: Target) -> list[Touch]:
        """`generate`, and the forward that is counted."""
        del target
        return [Touch("generate", "passes prompt_lookup_num_tokens on"), Touch("forward", "counts steps")]

    def install(self, installer: Installer) -> None:
        """Add the arguments that switch transformers' own implementation on."""
        model, report = installer.target.site.target, installer.report
        counter = _Counter(report)
        installer.patcher.after(model, counter.step)

        def around(call: Any, *args: Any, **kwargs: Any) -> Any:
            if self.neutral:
                return call(*args, **kwargs)
            if kwargs.get("assistant_model") is not None or kwargs.get("prompt_lookup_num_tokens") is not None:
                raise ConflictError("this call brings its own drafts; leave them out, or pause prompt-lookup for it.")
            with counter:
                out = call(
                    *args, **kwargs, prompt_lookup_num_tokens=self.draft, max_matching_ngram_size=self.ngram
                )  # fmt: skip
                counter.finish(out, args, kwargs)
            return out

        installer.patcher.wrap(model, "generate", around)


class _Counter:
    """Forwards made and tokens written, over all generate calls of a handle."""

    def __init__(self, report: Report) -> None:
        self.report, self.inside = report, False

    def __enter__(self) -> None:
        self.inside = True

    def __exit__(self, *_: object) -> None:
        self.inside = False

    def step(self, _module: Any, _args: Any, _kwargs: Any, _output: Any) -> None:
        """One forward of the model."""
        if self.inside:
            self._add("forwards", 1)

    def finish(self, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Count what the call wrote."""
        ids = getattr(out, "sequences", out)
        prompt = kwargs.get("input_ids", args[0] if args else None)
        self._add("tokens written", ids.shape[1] - (prompt.shape[1] if prompt is not None else 0))
        events = self.report.events
        events["tokens per forward"] = round(events["tokens written"] / max(1, events["forwards"]), 3)

    def _add(self, name: str, amount: int) -> None:
        self.report.events[name] = self.report.events.get(name, 0) + amount
