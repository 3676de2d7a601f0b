"""`vlprune compress`: everything, from a checkpoint to ONNX files and a report."""

from typing import Any

import typer

from vlprune.cli import options as o
from vlprune.cli.show import show
from vlprune.errors import RequestError


# Parameters of the verb that have other names in the library.
RENAMED = {"ratio": "ratios", "provider": "providers", "bench_batch": "bench_batches"}
RENAMED |= {"mope_stage": "mope", "mope_pairs": "mope"}


def compress(
    context: typer.Context,
    output: o.Output,
    model: o.OptionalModel = None,
    recipe: o.Recipe = None,
    ratio: o.Ratio = o.RATIOS,
    method: o.Method = "multiflow",
    pattern: o.Pattern = "unstructured",
    permute: o.Permute = False,
    round_widths: o.RoundWidths = True,
    mope_stage: o.MopeStage = None,
    mope_pairs: o.MopePairs = None,
    family: o.Family = None,
    calibration: o.Calibration = None,
    calibration_samples: o.CalibrationSamples = None,
    data: o.Data = None,
    tasks: o.Tasks = None,
    finetune: o.Finetune = "full",
    max_steps: o.MaxSteps = None,
    epochs: o.Epochs = None,
    lr: o.LearningRate = None,
    batch_size: o.BatchSize = None,
    gradient_checkpointing: o.GradientCheckpointing = False,
    compile: o.Compile = False,
    distill: o.Distill = None,
    image_size: o.ImageSize = None,
    export: o.Export = "none",
    precision: o.Precision = None,
    fuse: o.Fuse = None,
    pack: o.Pack = "none",
    values: o.Values = "fp32",
    target: o.Target = "auto",
    pack_threshold: o.PackThreshold = None,
    provider: o.Providers = o.CPU,
    bench_batch: o.BenchBatches = o.BATCHES,
    samples: o.Samples = None,
    device: o.Device = "auto",
    threads: o.Threads = None,
    seed: o.Seed = 0,
    skip_broken: o.SkipBroken = False,
    resume: o.Resume = False,
    json: o.Json = False,
) -> None:
    """Prune MODEL, fine-tune and export it, and report the cost.

    Any model but blip-tiny and blip-base-random needs --calibration and --data. All options may come from --recipe.

    \b
    Examples:
      vlprune compress blip-tiny --ratio 0.9 --export onnx --pack sparse --output run
      vlprune compress blip-tiny --method mope --ratio 0.5 --export onnx --output run
      vlprune compress blip --ratio 0.63,0.75,0.9 --calibration cc3m.json --data retrieval=train.json,test.json -o run
      vlprune compress --recipe run/recipe.yaml --output again
    """
    options: dict[str, Any] = {
        "ratios": list(ratio),
        "method": method,
        "pattern": pattern,
        "permute": permute,
        "round_widths": round_widths,
        "mope": o.mope(stage=mope_stage, pairs=mope_pairs),
        "family": family,
        "calibration": calibration,
        "calibration_samples": calibration_samples,
        "data": o.sources(data),
        "tasks": o.as_list(tasks),
        "finetune": finetune,
        "max_steps": max_steps,
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "gradient_checkpointing": gradient_checkpointing,
        "compile": compile,
        "distill": None if distill is None else list(distill),
        "image_size": image_size,
        "export": None if export == "none" else export,
        "providers": list(provider),
        "bench_batches": list(bench_batch),
        "samples": samples,
        "precision": o.as_list(precision),
        "fuse": fuse,
        "pack": pack,
        "values": values,
        "target": target,
        "pack_threshold": pack_threshold,
        "device": device,
        "threads": threads,
        "seed": seed,
        "skip_broken": skip_broken,
    }
    if recipe is not None:
        from vlprune import recipe as recipes

        told = {RENAMED.get(name, name) for name in o.typed(context)} & options.keys()
        options = recipes.merge(recipes.read(recipe), options, told)
        model = model or options.pop("model", None)
        options.pop("model", None)
    if model is None:
        raise RequestError("missing argument 'MODEL': give it on the command line, or in a --recipe")
    from vlprune import pipeline
    from vlprune.report.terminal import print_report

    report = pipeline.compress(model, output=output, resume=resume, **options)
    show(report, json, print_report)
