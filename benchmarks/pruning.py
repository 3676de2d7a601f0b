"""What pruning costs: one calibration pass and the masks of three ratios, against the plain forward pass.

python benchmarks/pruning.py                  # blip-base-random, 4 batches of 8 images (224 px) and texts (30 tokens)
python benchmarks/pruning.py --quick          # one batch of 2, one round
python benchmarks/pruning.py --method lamp    # another method
python benchmarks/pruning.py --json FILE      # write the figures

Both passes run in one fresh process, in turns; its peak memory covers loading the model, both passes and the masks.
Targets: pruning (pass, scores, three sets of masks) <= 1.5 x the plain forward time + 5 s; peak <= 2.5 x the model in
float32. Other work on the machine disturbs the times: the table tells how far the rounds lie apart.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any


RATIOS = [0.63, 0.75, 0.9]
SIZES = {"batches": 4, "batch": 8, "tokens": 30, "rounds": 3}
QUICK = {"batches": 1, "batch": 2, "tokens": 30, "rounds": 1}


def measure(method: str, batches: int, batch: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Time forward passes and prunings in turns, in this process."""
    import torch

    from vlprune.models import load
    from vlprune.pruning import InputNorms, Layer, prune_layers_at, sparsity_summary

    model = load("blip-base-random")
    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(batches):
        lengths = torch.randint(tokens // 2, tokens + 1, (batch,), generator=generator)
        lengths[0] = tokens
        data.append(
            {
                "pixel_values": torch.randn(batch, 3, 224, 224, generator=generator),
                "input_ids": torch.randint(1000, 30000, (batch, tokens), generator=generator),
                "attention_mask": (torch.arange(tokens) < lengths[:, None]).long(),
            }
        )
    prunable = model.layers()
    times: dict[str, list[float]] = {"forward": [], "collect": [], "prune": []}
    achieved = {}

    def forward() -> None:
        with torch.no_grad():
            for one in data:
                model.calibrate(one, lambda **masks: nullcontext())

    def prune() -> None:
        start = time.perf_counter()
        norms = InputNorms({layer.name: (layer.modules, layer.tokens) for layer in prunable})
        with norms.collect():
            for one in data:
                model.calibrate(one, norms.valid)
        a = norms.result()
        times["collect"].append(time.perf_counter() - start)
        start = time.perf_counter()
        layers = [Layer(layer.name, layer.modality, layer.weight, a[layer.name]) for layer in prunable]
        for ratio, pruned in prune_layers_at(layers, method, RATIOS):
            achieved[ratio] = sparsity_summary(pruned.masks, {x.name: x.modality for x in prunable})["achieved"]
            del pruned
        times["prune"].append(time.perf_counter() - start)

    with torch.no_grad():
        model.calibrate(data[0], lambda **masks: nullcontext())  # warm up
    for _ in range(rounds):
        start = time.perf_counter()
        forward()
        times["forward"].append(time.perf_counter() - start)
        prune()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "prunable": sum(layer.weight.numel() for layer in prunable),
        "achieved": achieved,
        "seconds": times,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "threads": torch.get_num_threads(),
    }


def summarise(measured: dict[str, Any]) -> dict[str, Any]:
    """Set the medians against the targets."""
    seconds = measured["seconds"]
    totals = [collect + prune for collect, prune in zip(seconds["collect"], seconds["prune"], strict=True)]
    forward, total = statistics.median(seconds["forward"]), statistics.median(totals)
    size = 4 * measured["parameters"]
    return {
        "forward_s": forward,
        "collect_s": statistics.median(seconds["collect"]),
        "prune_s": statistics.median(seconds["prune"]),
        "total_s": total,
        "total_limit_s": 1.5 * forward + 5,
        "total_within_limit": total <= 1.5 * forward + 5,
        "model_bytes": size,
        "peak_over_model": measured["peak_rss_bytes"] / size,
        "peak_limit": 2.5,
        "peak_within_limit": measured["peak_rss_bytes"] <= 2.5 * size,
    }


def show(figures: dict[str, Any]) -> None:
    """Print the table."""
    result, measured, sizes = figures["result"], figures["measured"], figures["sizes"]
    print(
        f"blip-base-random, {figures['method']} at {', '.join(map(str, RATIOS))}: {sizes['batches']} batches of "
        f"{sizes['batch']} images (224 px) and texts ({sizes['tokens']} tokens), {sizes['rounds']} rounds, "
        f"{measured['threads']} threads, {figures['environment']['cpu']}"
    )
    print(f"{'':34}{'median':>10}{'lowest':>10}{'highest':>10}")
    seconds = measured["seconds"]
    totals = [collect + prune for collect, prune in zip(seconds["collect"], seconds["prune"], strict=True)]
    for name, values in (
        ("plain forward, s", seconds["forward"]),
        ("forward with input norms, s", seconds["collect"]),
        ("scores and masks, three ratios, s", seconds["prune"]),
        ("pruning in all, s", totals),
    ):
        print(f"{name:34}{statistics.median(values):10.2f}{min(values):10.2f}{max(values):10.2f}")
    verdict = {True: "within", False: "ABOVE"}
    print(f"limit of 1.5 x forward + 5 s{result['total_limit_s']:16.2f}  {verdict[result['total_within_limit']]}")
    print(
        f"peak memory{measured['peak_rss_bytes'] / 2**20:33.0f} MiB = {result['peak_over_model']:.2f} x the model "
        f"({result['model_bytes'] / 2**20:.0f} MiB), limit 2.5: {verdict[result['peak_within_limit']]}"
    )
    achieved = ", ".join(f"{ratio}: {value:.8f}" for ratio, value in measured["achieved"].items())
    print(f"sparsity achieved: {achieved} of {measured['prunable']} weights")


def main() -> None:
    """Measure in a fresh process, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small configuration: does it run")
    parser.add_argument("--method", default="multiflow")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # what the fresh process is told
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(**json.loads(args.measure))))
        return

    # Imported here, so that the fresh process loads no more than it measures.
    from vlprune.files import write_json
    from vlprune.report.environment import environment

    sizes = QUICK if args.quick else SIZES
    command = [sys.executable, __file__, "--measure", json.dumps({"method": args.method, **sizes})]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    measured = json.loads(output.splitlines()[-1])
    figures = {
        "method": args.method,
        "ratios": RATIOS,
        "sizes": sizes,
        "result": summarise(measured),
        "measured": measured,
        "environment": environment(),
    }
    show(figures)
    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    main()
