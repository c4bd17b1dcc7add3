"""DiffSparse's learned allocation: a table of costs is trained through the cached sampler by straight-through choices.

"DiffSparse: Accelerating Diffusion Transformers with Learned Token Sparsity" (2026), from a note on the paper.
Inferred: that costs are normalised by the size of their gradients over the whole table, the straight-through estimator
(the choice minus the costs, whose value is taken back), the learning rate, how the step costs are trained (steps that
are not whole take everything from the cache). A softmax over levels was tried first: it forgets which rows matter
more. Ours: step costs begin at whole steps that were measured, Gumbel noise on the costs has every row held at times,
and the costs that do best on images that are not trained on are kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mmaccel.core.cached_modules import Module
from mmaccel.core.module_call import ModuleCall
from mmaccel.core.patching import Patcher
from mmaccel.core.token_cache import Entry, Now, TokenCache
from mmaccel.errors import NotApplicableError
from mmaccel.report import Report
from mmaccel.tiny.progress import load_progress, save_progress
from mmaccel.tokens.levels import LevelPlan, cheapest_levels, rows_of_level

__all__ = ["CostTable", "Pool", "SoftTokenCache", "Student", "distance", "sample", "train_table", "warm_start"]

logger = logging.getLogger(__name__)

_LARGE = 100.0
_SDPA = torch.nn.functional.scaled_dot_product_attention


class _Blend(TorchFunctionMode):
    """Attention to keys and values that are fresh by a weight [B, N] and old by the rest; remembers the blend."""

    def __init__(self, old: tuple[Tensor, Tensor] | None, weight: Tensor | None) -> None:
        super().__init__()
        self.old, self.weight, self.seen = old, weight, ()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass every function on, and this one with blended keys and values."""
        kwargs = kwargs or {}
        if func is not _SDPA:
            return func(*args, **kwargs)
        query, *new = (*args[:3], *(kwargs[name] for name in ("query", "key", "value")[len(args[:3]) :]))
        rest = {name: value for name, value in kwargs.items() if name not in ("query", "key", "value")}
        if self.old is not None and self.weight is not None:
            new = [
                torch.lerp(old, fresh, self.weight[:, None, :, None]) for old, fresh in zip(self.old, new, strict=True)
            ]
        self.seen = tuple(new)
        return func(query, *new, *args[3:], **rest)


class SoftTokenCache(TokenCache):
    """A token cache that computes every row and blends by weights, so that gradients reach the choice of levels.

    `weights` [T, L, S] are one-hot in value; the outputs are those of the `TokenCache` with the same plan.
    """

    weights: Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ranking: Tensor | None = None
        self._keys: dict[str, tuple[Tensor, Tensor]] = {}

    def _look(self, now: Now, module: Module, states: Tensor, count: int, *, first: bool) -> str:  # noqa: ARG002
        if first:
            self._ranking = now.choice.ranking("", states)
            now.choice.look("", states, max(*now.plan.counts(now.at.step, now.tokens), count))
        return ""

    def _module(self, now: Now, asked: ModuleCall, *, first: bool) -> Tensor:
        module, states = asked.module, asked.latent
        if module.joint:
            raise NotApplicableError(
                f"{module.name} sees the prompt's tokens as well; schedules of such are not trained."
            )
        entry = now.entries.get(module.name)
        count = now.plan.rows(now.at.step, module.layer, module.kind, now.tokens) if entry is not None else now.tokens
        self._look(now, module, states, count, first=first)
        weight = None if entry is None else self._weight(now, module, states.shape[0])
        old = self._keys.get(module.name) if entry is not None else None
        with _Blend(old, weight) as blend:
            fresh = asked.whole()
        if module.kind == "self-attention":
            self._keys[module.name] = blend.seen  # type: ignore[assignment]
        time = torch.full((states.shape[0], now.tokens, 1), now.time)
        if entry is None or weight is None:
            now.entries[module.name] = Entry(fresh, time)
            return fresh
        share = weight[..., None]
        result = torch.lerp(self._held(entry, now.time), fresh, share)
        if self.order:
            gap = time - entry.since
            slope = (fresh - entry.output) / torch.where(gap == 0, torch.ones_like(gap), gap)
            entry.slope = torch.lerp(torch.zeros_like(slope) if entry.slope is None else entry.slope, slope, share)
            entry.output = torch.lerp(entry.output, fresh, share)
            entry.since = torch.where(share.detach() > 0.5, time, entry.since)
        else:
            entry.output = result
        return result

    def _weight(self, now: Now, module: Module, batch: int) -> Tensor:
        assert self.weights is not None
        assert self._ranking is not None
        order = (
            self._ranking
            if self._ranking.shape[0] in (1, batch)
            else self._ranking.repeat(batch // len(self._ranking), 1)
        )
        rank = torch.empty_like(order).scatter_(1, order, torch.arange(now.tokens).expand_as(order).contiguous())
        choice = self.weights[now.at.step, module.layer]
        levels = len(choice) - 1
        shares = [(rank < rows_of_level(level, levels, now.tokens)).to(choice.dtype) for level in range(levels + 1)]
        return torch.einsum("s,sbn->bn", choice, torch.stack(shares)).expand(batch, -1)


class CostTable(torch.nn.Module):
    """Costs [R, S] of levels; a level computes `level / (S - 1)` of the tokens. `fixed` [R] rows may not choose."""

    def __init__(self, rows: int, levels: int, total: int, fixed: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        self.costs = torch.nn.Parameter(1e-2 * torch.randn(rows, levels, generator=generator))
        self.total, self.fixed = total, fixed

    def levels(self, noise: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
        """The levels of least cost with the whole budget, int64 [R]; `noise` scales Gumbel noise on the costs."""
        costs = self.costs.detach().double()
        if noise:
            uniform = torch.rand(costs.shape, generator=generator, dtype=torch.float64).clamp(1e-9, 1.0 - 1e-9)
            costs = costs + noise * uniform.log().neg().log()
        return cheapest_levels(costs, torch.arange(costs.shape[1]), self.total, self.fixed)

    def choices(self, levels: Tensor) -> Tensor:
        """One-hot choices [R, S] whose gradient reaches the costs: what would help if chosen becomes cheaper."""
        # a softmax over levels would forget how much more one row matters than another
        return torch.nn.functional.one_hot(levels, self.costs.shape[1]) - self.costs + self.costs.detach()


@dataclass(frozen=True)
class Pool:
    """Noise [B, C, H, W], class numbers [B], and the images [B, 3, H, W] that the full sampler makes of them."""

    noise: Tensor
    labels: Tensor
    images: Tensor


def sample(pipe: Any, noise: Tensor, labels: Tensor, steps: int, guidance: float) -> Tensor:
    """What a `DiTPipeline` makes of noise, as latents [B, C, H, W], with gradients where they are asked for."""
    pipe.scheduler.set_timesteps(steps)
    latents = noise
    empty = torch.full_like(labels, 1000)
    for time in pipe.scheduler.timesteps:
        both = torch.cat([latents, latents])
        velocity = pipe.transformer(
            both, timestep=time.expand(len(both)), class_labels=torch.cat([labels, empty])
        ).sample
        wanted, other = velocity.chunk(2)
        latents = pipe.scheduler.step(other + guidance * (wanted - other), time, latents).prev_sample
    return latents


def _features(vae: Any, images: Tensor) -> list[Tensor]:
    hidden, found = vae.encoder.conv_in(images), []
    for block in vae.encoder.down_blocks:
        hidden = block(hidden)
        found.append(torch.nn.functional.normalize(hidden, dim=1))
    return found


def distance(vae: Any, images: Tensor, wanted: Tensor) -> Tensor:
    """Distance [B] of images [B, 3, H, W]: root mean square of pixels, and of unit features of the autoencoder.

    It stands for LPIPS, whose network is not at hand.
    """
    total = (images - wanted).square().mean((1, 2, 3)).add(1e-8).sqrt()
    for one, two in zip(_features(vae, images), _features(vae, wanted), strict=True):
        total = total + (one - two).square().sum(1).mean((1, 2)).add(1e-8).sqrt()
    return total


def warm_start(table: CostTable, steps: Sequence[int], layers: int, delta: float) -> None:
    """Lower the cost of computing everything at whole steps by `delta`."""
    with torch.no_grad():
        for step in steps:
            table.costs[step * layers : (step + 1) * layers, -1] -= delta


class _Best:
    """The costs that did best on images that are not trained on."""

    def __init__(self, table: CostTable) -> None:
        self.costs, self.score = table.costs.detach().clone(), float("inf")

    def state_dict(self) -> dict[str, Any]:
        """Costs and score."""
        return {"costs": self.costs, "score": self.score}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self.costs, self.score = state["costs"], state["score"]

    def offer(self, table: CostTable, score: float) -> None:
        """Keep the table's costs if `score` is lower."""
        if score < self.score:
            self.costs, self.score = table.costs.detach().clone(), score


def train_table(
    table: CostTable, path: Path, score: Callable[[Tensor, Tensor | None, str], Tensor], *,
    iterations: int, peak: float, seed: int, batch: int, pool: int, noise: float = 0.0,
) -> float:  # fmt: skip
    """Train a table in place and leave the costs in it that validate best; resumes from `path`.

    `score(choices, images, split)` runs the student by choices [R, S] and gives its distances. An iteration depends on
    its number alone. noise: scale of the Gumbel noise on costs, which falls to 0, so that every row is held at times.
    Returns the best distance.
    """
    optimizer = torch.optim.AdamW(table.parameters(), lr=_LARGE * peak, eps=_LARGE, betas=(0.8, 0.95), weight_decay=0.0)
    best = _Best(table)
    parts = {"table": table, "optimizer": optimizer, "best": best}
    begun = load_progress(path, parts)

    def validate(step: int) -> None:
        levels = table.levels()
        with torch.no_grad():
            found = float(score(table.choices(levels), None, "validation").mean())
        best.offer(table, found)
        logger.info("%s %d validation %.4f best %.4f", path.stem, step, found, best.score)
        save_progress(path, step, parts)

    if not begun:
        validate(0)
    recent: list[float] = []
    for step in range(begun, iterations):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        some = torch.randperm(pool, generator=generator)[:batch]
        for group in optimizer.param_groups:
            group["lr"] = _LARGE * peak * (1.0 - 0.9 * step / iterations)
        levels = table.levels(noise * (1.0 - step / iterations), generator)
        loss = score(table.choices(levels), some, "training").mean()
        optimizer.zero_grad()
        loss.backward()
        gradient = table.costs.grad
        assert gradient is not None
        # AdamW divides each entry by its own size, and rows that do not matter would bid as loudly as those that do:
        # entries are divided by the size of the whole table instead
        gradient /= gradient.square().mean().sqrt().clamp_min(1e-12)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % 20 == 0 or step + 1 == iterations:
            logger.info("%s %d loss %.4f", path.stem, step + 1, sum(recent[-20:]) / len(recent[-20:]))
            validate(step + 1)
    with torch.no_grad():
        table.costs.copy_(best.costs)
    return best.score


class Student:
    """The cached sampler of a `DiTPipeline`, run by choices of levels, and how far it is from its teacher.

    order: as of `TokenCache`. Use `undo` when done.
    """

    def __init__(self, pipe: Any, site: Any, pools: dict[str, Pool], steps: int, guidance: float, order: int) -> None:
        self.pipe, self.pools, self.steps, self.guidance = pipe, pools, steps, guidance
        self._plan = LevelPlan.dense(steps, 1)
        self._patcher = Patcher()
        self._cache = SoftTokenCache(site, Report(), "training", lambda _steps, _layers: self._plan, None, order)
        self._cache.install(self._patcher)
        self.undo = self._patcher.undo

    def distances(self, choices: Tensor, images: Tensor | None, split: str) -> Tensor:
        """Distances [B] for choices [T, L, S] on some images of a pool, None for all."""
        pool = self.pools[split]
        noise, labels, wanted = (x if images is None else x[images] for x in (pool.noise, pool.labels, pool.images))
        self._cache.weights = choices
        self._plan = LevelPlan.of_layers(choices.detach().argmax(2), choices.shape[2] - 1)
        latents = sample(self.pipe, noise, labels, self.steps, self.guidance)
        return distance(self.pipe.vae, self.pipe.vae.decode(latents).sample, wanted)
