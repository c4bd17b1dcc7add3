"""What an evaluation found: answers of every setting, and the rows that are made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmaccel.errors import MMAccelError
from mmaccel.measure.quality import bootstrap_difference, bootstrap_mean, bootstrap_ratio
from mmaccel.measure.stages import DENSE

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Cost", "Evaluation", "Outcome", "mean_cost", "merge", "pack", "unpack"]


@dataclass(frozen=True)
class Cost:
    """What one question cost under a setting, as a mean over questions, each counted without padding.

    tokens_in, tokens_out, tokens_last: visual tokens of the prompt, of them in the first decoder layer, and in the last
    one. tokens_per_layer: float64 [layers], all tokens, text included. encoder_flops: those of the vision
    blocks, by torch's counter. prefill_flops: closed form.
    flops_own: what the methods themselves computed, by torch's counter in the batch, its padding included.
    """

    tokens_in: float
    tokens_out: float
    tokens_last: float
    tokens_per_layer: np.ndarray
    encoder_flops: float
    prefill_flops: float
    flops_own: float


@dataclass(frozen=True)
class Outcome:
    """What one setting did on every question, in the order of the questions.

    hits: bool [n], the answer was right. same: bool [n], it was the dense model's. kl: float64 [n], divergence of the
    next-token distribution from the dense model's, nats. answers: the words. seconds: spent in the model, for progress
    and planning only.
    """

    hits: np.ndarray
    same: np.ndarray
    kl: np.ndarray
    answers: list[str]
    cost: Cost
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """Outcomes by spec, "dense" first; `clips` int64 [n] tells which clip a question belongs to, `kinds` its kind."""

    outcomes: dict[str, Outcome]
    clips: np.ndarray
    kinds: list[str]

    def rows(self, *, samples: int = 10_000, seed: int = 0) -> list[dict[str, Any]]:
        """One row a spec, dense first, plain data.

        spec, n (questions), clips; accuracy, difference (to dense) and ratio (to dense), each as {"value", "low",
        "high", "n", "groups", "level"} by a paired bootstrap over clips; agreement (same answer as dense), kl (mean,
        nats), tokens_in, tokens_out, tokens_last, tokens_per_layer, encoder_flops, prefill_flops, flops_own,
        flops (these three), by_kind {kind: accuracy}. `ratio` is None where the dense model is right nowhere.
        """
        dense = self.outcomes[DENSE]
        options: dict[str, Any] = {"groups": self.clips, "samples": samples, "seed": seed}
        rows = []
        for spec, outcome in self.outcomes.items():
            try:
                ratio = bootstrap_ratio(outcome.hits, dense.hits, **options).as_dict()
            except MMAccelError:
                ratio = None
            cost = outcome.cost
            rows.append(
                {
                    "spec": spec,
                    "n": len(outcome.hits),
                    "clips": len(np.unique(self.clips)),
                    "accuracy": bootstrap_mean(outcome.hits, **options).as_dict(),
                    "difference": bootstrap_difference(outcome.hits, dense.hits, **options).as_dict(),
                    "ratio": ratio,
                    "agreement": float(outcome.same.mean()),
                    "kl": float(outcome.kl.mean()),
                    "tokens_in": cost.tokens_in,
                    "tokens_out": cost.tokens_out,
                    "tokens_last": cost.tokens_last,
                    "tokens_per_layer": cost.tokens_per_layer.tolist(),
                    "encoder_flops": cost.encoder_flops,
                    "prefill_flops": cost.prefill_flops,
                    "flops_own": cost.flops_own,
                    "flops": cost.encoder_flops + cost.prefill_flops + cost.flops_own,
                    "by_kind": self._by_kind(outcome),
                }
            )
        return rows

    def dump(self) -> dict[str, Any]:
        """The evaluation as plain data, ready for JSON."""
        outcomes = {
            spec: {
                "hits": pack(one.hits),
                "same": pack(one.same),
                "kl": [float(f"{value:.6g}") for value in one.kl],
                "answers": one.answers,
                "cost": {name: np.asarray(value).tolist() for name, value in vars(one.cost).items()},
                "seconds": one.seconds,
            }
            for spec, one in self.outcomes.items()
        }
        return {"outcomes": outcomes, "clips": self.clips.tolist(), "kinds": self.kinds}

    @classmethod
    def load(cls, data: dict[str, Any]) -> Evaluation:
        """The evaluation that `dump` wrote."""
        n = len(data["clips"])
        outcomes = {}
        for spec, one in data["outcomes"].items():
            cost = Cost(**{**one["cost"], "tokens_per_layer": np.array(one["cost"]["tokens_per_layer"])})
            hits, same, kl = unpack(one["hits"], n), unpack(one["same"], n), np.array(one["kl"])
            outcomes[spec] = Outcome(hits, same, kl, one["answers"], cost, one["seconds"])
        return cls(outcomes, np.array(data["clips"]), data["kinds"])

    def _by_kind(self, outcome: Outcome) -> dict[str, float]:
        kinds = np.array(self.kinds)
        return {kind: float(outcome.hits[kinds == kind].mean()) for kind in dict.fromkeys(self.kinds)}


def merge(parts: Sequence[Evaluation]) -> Evaluation:
    """One evaluation of several on different clips: questions are joined, costs averaged by number of questions.

    Raises:
        MMAccelError: the parts were evaluated under different specs.
    """
    specs = list(parts[0].outcomes)
    if any(list(part.outcomes) != specs for part in parts):
        raise MMAccelError("evaluations of different specs cannot be merged.")
    merged = {spec: _joined([part.outcomes[spec] for part in parts]) for spec in specs}
    return Evaluation(
        merged, np.concatenate([part.clips for part in parts]), [kind for part in parts for kind in part.kinds]
    )


def mean_cost(costs: Sequence[Cost], weights: Sequence[float]) -> Cost:
    """The cost of a question when `weights[i]` questions cost `costs[i]`."""
    shares = (np.array(weights, dtype=np.float64) / sum(weights)).tolist()

    def mean(name: str) -> Any:
        return sum(share * getattr(cost, name) for share, cost in zip(shares, costs, strict=True))

    return Cost(*(mean(name) for name in Cost.__dataclass_fields__))


def _joined(parts: list[Outcome]) -> Outcome:
    return Outcome(
        np.concatenate([part.hits for part in parts]),
        np.concatenate([part.same for part in parts]),
        np.concatenate([part.kl for part in parts]),
        [answer for part in parts for answer in part.answers],
        mean_cost([part.cost for part in parts], [len(part.hits) for part in parts]),
        sum(part.seconds for part in parts),
    )


def pack(flags: np.ndarray) -> str:
    """Bools as hexadecimal text, so that a row can hold one an answer."""
    return np.packbits(flags.astype(bool)).tobytes().hex()


def unpack(text: str, n: int) -> np.ndarray:
    """The n bools of `pack`."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=n).astype(bool)
