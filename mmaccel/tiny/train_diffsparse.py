"""Train DiffSparse's table of costs for the embedded class-to-image model, on CPU.

Run `python -m mmaccel.tiny.train_diffsparse --out FILE --work SCRATCH`. Phases, each kept in the scratch folder and
resumed from there: teacher, step costs and layer costs (stage 1), merged costs (stage 2), scores.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmaccel.adapters.diffusion import Diffusion
from mmaccel.core.patching import Patcher
from mmaccel.tiny import IMAGE_CALL, class_to_image
from mmaccel.tiny.generators import IMAGE_LABELS
from mmaccel.tiny.progress import timed, versions
from mmaccel.tiny.sparsity_training import CostTable, Pool, sample, soft_cache, train_table, warm_start

__all__ = ["main"]

logger = logging.getLogger(__name__)

_KINDS = ("self-attention", "mlp")
_LEVELS = 5


@torch.no_grad()
def _pool(pipe: Any, path: Path, count: int, seed: int, steps: int, guidance: float) -> Pool:
    if not path.exists():
        generator = torch.Generator().manual_seed(10_007 * (seed + 1))
        shape = (count, pipe.transformer.config.in_channels, *(pipe.transformer.config.sample_size,) * 2)
        noise = torch.randn(shape, generator=generator)
        labels = torch.arange(count) % len(IMAGE_LABELS)
        latents = torch.cat(
            [sample(pipe, some, label, steps, guidance) for some, label in zip(noise.split(16), labels.split(16), strict=True)]
        )
        images = torch.cat([pipe.vae.decode(some).sample for some in latents.split(16)])
        save_file({"noise": noise, "labels": labels, "latents": latents, "images": images}, path)
    return Pool(**load_file(path))


def main(arguments: list[str] | None = None) -> None:
    """Run the phases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder")
    parser.add_argument("--cost", type=float, default=0.46, help="fraction of the blocks' multiply-adds")
    parser.add_argument("--order", type=int, default=1, help="0 holds outputs, 1 carries them on")
    parser.add_argument("--whole-steps", type=int, default=8, help="steps that stage 1 keeps whole")
    parser.add_argument("--delta", type=float, default=10.0, help="warm start of whole steps")
    parser.add_argument("--step-iterations", type=int, default=60)
    parser.add_argument("--layer-iterations", type=int, default=80)
    parser.add_argument("--merged-iterations", type=int, default=160)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--peak", type=float, default=0.3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, int] = {}

    pipe = class_to_image()
    for part in (pipe.transformer, pipe.vae):
        part.requires_grad_(False).eval()
    steps, guidance = IMAGE_CALL["num_inference_steps"], IMAGE_CALL["guidance_scale"]
    layers = len(pipe.transformer.transformer_blocks)
    with timed(seconds, "teacher"):
        pool = _pool(pipe, options.work / "teacher.safetensors", options.images, options.seed, steps, guidance)

    patcher = Patcher()
    cache, plans = soft_cache(pipe, Diffusion(pipe), _KINDS, options.order, patcher)
    common: dict[str, Any] = {
        "steps": steps, "guidance": guidance, "batch": options.batch, "seed": options.seed,
        "cache": cache, "plans": plans, "peak": options.peak,
    }  # fmt: skip
    unit = _LEVELS - 1

    def whole_steps(choices: Tensor) -> Tensor:
        return choices[:, None].expand(-1, layers, -1)

    def by_layer(choices: Tensor) -> Tensor:
        return choices.unflatten(0, (steps, layers))

    first = torch.full((steps,), -1)
    first[0] = 1
    generator = torch.Generator().manual_seed(options.seed)
    step_costs = CostTable(steps, 2, options.whole_steps, first, generator)
    total = round(options.cost * steps * layers * unit)
    fixed = torch.full((steps * layers,), -1)
    fixed[:layers] = unit
    layer_costs = CostTable(steps * layers, _LEVELS, total, fixed, generator)
    losses = {}
    with timed(seconds, "step costs"):
        losses["step costs"] = train_table(
            pipe, step_costs, pool, options.work / "step-costs.pt", spread=whole_steps,
            iterations=options.step_iterations, **common,
        )  # fmt: skip
    whole = step_costs.levels().nonzero()[:, 0].tolist()
    logger.info("whole steps %s", whole)
    with timed(seconds, "layer costs"):
        losses["layer costs"] = train_table(
            pipe, layer_costs, pool, options.work / "layer-costs.pt", spread=by_layer,
            iterations=options.layer_iterations, **common,
        )  # fmt: skip
    warm_start(layer_costs, whole, layers, options.delta)
    with timed(seconds, "merged costs"):
        losses["merged costs"] = train_table(
            pipe, layer_costs, pool, options.work / "merged-costs.pt", spread=by_layer,
            iterations=options.merged_iterations, **common,
        )  # fmt: skip
    patcher.undo()
    levels = layer_costs.levels().unflatten(0, (steps, layers))
    logger.info("levels %s", levels.tolist())
    facts = {
        "method": "diffsparse", "model": type(pipe.transformer).__name__, "steps": steps, "layers": layers,
        "whole": unit, "cost": options.cost, "order": options.order, "seed": options.seed, "delta": options.delta,
        "whole steps after stage 1": whole, "seconds": seconds, "versions": versions(),
        "iterations": [options.step_iterations, options.layer_iterations, options.merged_iterations],
        "loss": {name: float(np.mean(values[-10:])) for name, values in losses.items() if values},
    }  # fmt: skip
    save_file(
        {"table": torch.softmax(-layer_costs.costs.detach().double(), 1).neg().unflatten(0, (steps, layers)).float()},
        options.out,
        {"mmaccel": json.dumps(facts)},
    )


if __name__ == "__main__":
    main()
