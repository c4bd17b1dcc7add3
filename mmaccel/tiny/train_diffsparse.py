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

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmaccel.adapters.diffusion import Diffusion
from mmaccel.core.patching import Patcher
from mmaccel.core.velocity_record import Measured, VelocityRecord
from mmaccel.tiny import IMAGE_CALL, class_to_image
from mmaccel.tiny.generators import IMAGE_LABELS
from mmaccel.tiny.progress import timed, versions
from mmaccel.tiny.sparsity_training import CostTable, Pool, Student, sample, train_table, warm_start
from mmaccel.tokens.gaps import early_weights, held_errors, levels_of_steps

__all__ = ["main"]

logger = logging.getLogger(__name__)

_LEVELS = 5


@torch.no_grad()
def _pools(pipe: Any, path: Path, counts: dict[str, int], seed: int, steps: int, guidance: float) -> dict[str, Pool]:
    if not path.exists():
        kept: dict[str, Tensor] = {}
        for number, (split, count) in enumerate(counts.items()):
            generator = torch.Generator().manual_seed(10_007 * (seed + 1) + number)
            shape = (count, pipe.transformer.config.in_channels, *(pipe.transformer.config.sample_size,) * 2)
            noise = torch.randn(shape, generator=generator)
            labels = torch.arange(count) * 5 % len(IMAGE_LABELS)
            parts = zip(noise.split(16), labels.split(16), strict=True)
            latents = torch.cat([sample(pipe, *part, steps, guidance) for part in parts])
            images = torch.cat([pipe.vae.decode(some).sample for some in latents.split(16)])
            kept |= {f"{split}.noise": noise, f"{split}.labels": labels, f"{split}.images": images}
        save_file(kept, path)
    kept = load_file(path)
    return {split: Pool(*(kept[f"{split}.{name}"] for name in ("noise", "labels", "images"))) for split in counts}


@torch.no_grad()
def _measured(pipe: Any, site: Any, pool: Pool, steps: int, guidance: float, order: int) -> Tensor:
    """How far velocities would be off if they were held, float64 [b, a, t] of `held_errors`."""
    found: list[Measured] = []
    patcher = Patcher()
    VelocityRecord(site, lambda _: True, lambda _, measured: found.append(measured)).install(patcher)
    sample(pipe, pool.noise, pool.labels, steps, guidance)
    patcher.undo()
    return held_errors(found[0].gram, found[0].times, order, found[0].lengths * early_weights(steps))


def main(arguments: list[str] | None = None) -> None:
    """Run the phases and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder")
    parser.add_argument("--cost", type=float, default=0.46, help="fraction of the blocks' multiply-adds")
    parser.add_argument("--order", type=int, default=1, help="0 holds outputs, 1 carries them on")
    parser.add_argument("--whole-steps", type=int, default=9, help="steps that stage 1 keeps whole")
    parser.add_argument("--delta", type=float, default=10.0, help="warm start of whole steps")
    parser.add_argument("--step-iterations", type=int, default=10)
    parser.add_argument("--layer-iterations", type=int, default=10)
    parser.add_argument("--merged-iterations", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--validation-images", type=int, default=12)
    parser.add_argument("--peak", type=float, default=0.2)
    parser.add_argument("--merged-peak", type=float, default=0.03)
    parser.add_argument("--noise", type=float, default=0.3, help="of costs in stage 1")
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
    site = Diffusion(pipe)
    counts = {"training": options.images, "validation": options.validation_images}
    with timed(seconds, "teacher"):
        pools = _pools(pipe, options.work / "teacher.safetensors", counts, options.seed, steps, guidance)
        errors = _measured(pipe, site, pools["validation"], steps, guidance, options.order)
    begin = levels_of_steps(errors, torch.tensor([1.0, 0.0], dtype=torch.float64), options.whole_steps, options.order)
    logger.info("measured whole steps %s", begin.nonzero()[:, 0].tolist())

    student = Student(pipe, site, pools, steps, guidance, options.order)
    unit = _LEVELS - 1
    common: dict[str, Any] = {
        "peak": options.peak, "seed": options.seed, "batch": options.batch, "pool": options.images,
        "noise": options.noise,
    }  # fmt: skip

    def by_step(choices: Tensor, images: Tensor | None, split: str) -> Tensor:
        return student.distances(choices[:, None].expand(-1, layers, -1), images, split)

    def by_layer(choices: Tensor, images: Tensor | None, split: str) -> Tensor:
        return student.distances(choices.unflatten(0, (steps, layers)), images, split)

    first = torch.full((steps,), -1)
    first[0] = 1
    generator = torch.Generator().manual_seed(options.seed)
    step_costs = CostTable(steps, 2, options.whole_steps, first, generator)
    with torch.no_grad():
        step_costs.costs[:, 1] -= begin
    scores = {}
    with timed(seconds, "step costs"):
        scores["step costs"] = train_table(
            step_costs, options.work / "step-costs.pt", by_step, iterations=options.step_iterations, **common
        )
    whole = step_costs.levels().nonzero()[:, 0].tolist()
    logger.info("whole steps %s", whole)
    total = round(options.cost * steps * layers * unit)
    fixed = torch.full((steps, layers), -1)
    fixed[whole] = unit
    layer_costs = CostTable(steps * layers, _LEVELS, total, fixed.flatten(), generator)
    with timed(seconds, "layer costs"):
        scores["layer costs"] = train_table(
            layer_costs, options.work / "layer-costs.pt", by_layer, iterations=options.layer_iterations, **common
        )
    layer_costs.fixed = torch.full((steps * layers,), -1)
    layer_costs.fixed[:layers] = unit
    warm_start(layer_costs, whole, layers, options.delta)
    with timed(seconds, "merged costs"):
        scores["merged costs"] = train_table(
            layer_costs,
            options.work / "merged-costs.pt",
            by_layer,
            iterations=options.merged_iterations,
            **{**common, "peak": options.merged_peak, "noise": 0.0},
        )
    student.undo()
    levels = layer_costs.levels().unflatten(0, (steps, layers))
    logger.info("seconds %s levels %s", seconds, levels.tolist())
    facts = {
        "method": "diffsparse", "model": type(pipe.transformer).__name__, "steps": steps, "layers": layers,
        "whole": unit, "cost": options.cost, "order": options.order, "seed": options.seed, "delta": options.delta,
        "whole steps after stage 1": whole, "versions": versions(),
        "iterations": [options.step_iterations, options.layer_iterations, options.merged_iterations],
        "distance": scores,
    }  # fmt: skip
    save_file(
        {"table": layer_costs.costs.detach().unflatten(0, (steps, layers)).contiguous()},
        options.out,
        {"mmaccel": json.dumps(facts)},
    )


if __name__ == "__main__":
    main()
