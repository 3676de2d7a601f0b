"""How long MoPE measures a model: a few evaluations are timed, the rest is extrapolated.

python benchmarks/mope_cost.py                                     # CLIP ViT-B/16 on 50 pairs, CPU
python benchmarks/mope_cost.py --pairs 1000 --device cuda --batch-size 128
python benchmarks/mope_cost.py --quick                             # does it run
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from vlprune import load
from vlprune.data.scenes import scenes_captions
from vlprune.report.environment import environment
from vlprune.training.mope import Evaluation, MopeOptions, neuron_groups, neuron_importance, without


def clock(device: str) -> tuple[float, float]:
    """Seconds on the wall, and of all cores: where others use the machine, the second tells what this costs."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def cost(name: str, options: MopeOptions, device: str, every: int) -> dict[str, object]:
    """Time one head, one neuron group and the removal of one layer in some layers of every tower.

    An evaluation runs the layers from the changed one on: what one layer takes is measured, how many run is known.

    Args:
        name: alias of the model.
        options: pairs, neuron groups, batch size.
        device: "cpu" or "cuda".
        every: layers from one timed layer to the next.

    Returns:
        dict[str, object]: what was timed, and what follows for all modules.
    """
    model = load(name).to(device)
    data = scenes_captions("train", 2 * options.pairs)
    begin = clock(device)
    evaluation = Evaluation(model, data, options)
    importance = neuron_importance(model, evaluation.batches)
    ready = clock(device)
    parts = {
        group.name: neuron_groups(importance[group.name], options)
        if group.kind == "ffn"
        else list(torch.arange(group.shape[0]).split(1))
        for group in model.groups()
    }
    modules, timed = 0, 0
    total = [ready[i] - begin[i] for i in (0, 1)]
    for tower in model.towers():
        evaluation.enter(tower.name)
        ran, spent, due = 0, [0.0, 0.0], 0
        for layer in range(tower.depth):
            ahead = tower.depth - layer
            groups = [g for g in model.groups() if (g.tower, g.layer) == (tower.name, layer)]
            due += ahead * (sum(len(parts[group.name]) for group in groups) + 1)
            modules += sum(len(parts[group.name]) for group in groups) + 1
            if layer % every == 0:
                start = clock(device)
                for group in groups:
                    with without(group, parts[group.name][0]):
                        evaluation.score(layer, group)
                evaluation.score(layer)
                stop = clock(device)
                spent = [spent[i] + stop[i] - start[i] for i in (0, 1)]
                ran, timed = ran + ahead * len(groups) + ahead - 1, timed + len(groups) + 1
            evaluation.advance(layer)
        total = [total[i] + spent[i] / ran * due for i in (0, 1)]
    return {
        "model": name,
        "pairs": evaluation.pairs,
        "device": device,
        "threads": torch.get_num_threads(),
        "modules": modules,
        "timed": timed,
        "preparation_seconds": round(ready[0] - begin[0], 1),
        "extrapolated_seconds": round(total[0]),
        "extrapolated_core_seconds": round(total[1]),
    }


def main() -> None:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="clip-base-random")
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--every", type=int, default=6, help="layers from one timed layer to the next")
    parser.add_argument("--threads", type=int, help="of PyTorch")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="a small model and few pairs")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    name, pairs = ("clip-tiny", 8) if arguments.quick else (arguments.model, arguments.pairs)
    options = MopeOptions(pairs=pairs, batch_size=arguments.batch_size)
    result = cost(name, options, arguments.device, arguments.every)
    print(json.dumps({**result, "environment": environment()}, indent=1))


if __name__ == "__main__":
    main()
