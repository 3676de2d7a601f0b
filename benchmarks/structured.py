"""Structured pruning: what it gains in size and time on BLIP-base and CLIP ViT-B/16, and what it costs in accuracy.

python benchmarks/structured.py                      # both parts; writes docs/results/structured.md
python benchmarks/structured.py --speed              # random weights at ratio 0.5: parameters, FLOPs, files, latency
python benchmarks/structured.py --speed --provider cuda
python benchmarks/structured.py --accuracy           # small trained models at 0.3, 0.5, 0.7; takes up where it stopped
python benchmarks/structured.py --accuracy --models flickr8k --seeds 3   # the model of benchmarks/flickr8k.py
python benchmarks/structured.py --quick              # tiny models, few steps: does it run; writes nothing

Figures of parts that were measured before stay in docs/results/structured.json, and in the document made from it.
Targets on the processor: image encoder at batch 8 <= 0.6 x the dense one's time, fp32 and int8, and files <= 0.6 x.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlprune import exporters, load, pipeline
from vlprune.data.scenes import scenes_captions
from vlprune.errors import VlpruneError
from vlprune.exporters.flops import flops
from vlprune.files import atomic_path, read_json, write_json
from vlprune.models.family import Model
from vlprune.pruning import InputNorms
from vlprune.report.environment import environment
from vlprune.report.summary import points, title
from vlprune.runtime.timing import compare
from vlprune.structured import STRUCTURED, cut, plan_by_scores, removed


ROOT = Path(__file__).parents[1]
RATIO, RATIOS = 0.5, (0.3, 0.5, 0.7)
ONE_SHOT = tuple(name for name, method in STRUCTURED.items() if method.finds == "scores")
TARGET = 0.6


@dataclass(frozen=True)
class Case:
    """A trained model, and what is done with it.

    Attributes:
        tasks: fine-tuned and scored one by one.
        metrics: task -> metrics shown.
        options: of `vlprune.pipeline.compress`.
        about: where the model comes from, in words.
    """

    tasks: tuple[str, ...]
    metrics: Mapping[str, tuple[str, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""


R1, R10 = ("i2t_r1", "t2i_r1"), ("i2t_r10", "t2i_r10")
SCENES = "embedded, trained on drawn scenes; fine-tuned as it suggests (100 steps of 32), scored on 500 unseen scenes"
CASES = {
    "blip-tiny": Case(
        ("retrieval", "captioning", "vqa"),
        {"retrieval": R1, "captioning": ("cider",), "vqa": ("accuracy",)},
        {"samples": 500},
        SCENES,
    ),
    "clip-tiny": Case(("retrieval",), {"retrieval": R1}, {"samples": 500}, SCENES),
    "flickr8k": Case(
        ("retrieval", "captioning"),
        {"retrieval": R10, "captioning": ("cider",)},
        {"samples": 1000, "max_steps": 40, "batch_size": 64, "lr": 3e-4, "calibration_samples": 512},
        "a small BLIP trained from scratch on 6,000 photographs by `benchmarks/flickr8k.py`, whose recipe it is "
        "fine-tuned with (40 steps of 64)",
    ),
}


# --- size and time ----------------------------------------------------------------------------------------------------


def norms_of(model: Any, images: int) -> dict[Any, torch.Tensor]:
    """Collect the input norms of all Linears on drawn scenes."""
    data = scenes_captions("train", images)
    norms = InputNorms({layer.name: (layer.modules, layer.tokens) for layer in model.layers()})
    with norms.collect():
        rows = range(images)
        batch = model.caption_batch(list(data.images), [captions[0] for captions in data.captions], rows)
        model.calibrate(batch, norms.valid)
    found = norms.result()
    return {linear: found[layer.name] for layer in model.layers() for linear in layer.modules}


def exported(model: Model, folder: Path, threads: int | None) -> dict[str, int]:
    """Export the graphs of retrieval; bytes of each."""
    folder.mkdir()
    part = model.for_task("retrieval")
    spec = exporters.task_spec(part, "retrieval")
    rows = exporters.export(part, "retrieval", spec, folder, scenes_captions("test", 8), threads=threads)
    return {row["graph"]: row["bytes"] for row in rows}


def quantised(folder: Path) -> Path:
    """Write the image encoder in dynamic int8 beside the task's folder."""
    plain, int8 = folder.with_name(f"{folder.name}-plain"), folder.with_name(f"{folder.name}-int8")
    plain.mkdir()
    int8.mkdir()
    for file in folder.glob("image_encoder.onnx*"):
        shutil.copyfile(file, plain / file.name)
    exporters.quantize_task(plain, int8)
    shutil.rmtree(plain)
    return int8


def size_of(folder: Path) -> int:
    """Bytes of the image encoder in a folder."""
    return sum(file.stat().st_size for file in folder.glob("image_encoder.onnx*"))


def speed(names: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Cut each model by each one-shot method, export it, and time its image encoder against the dense one."""
    rows = []
    for name in names:
        model = load(name)
        groups, towers = model.groups(), model.towers()
        norms = norms_of(model, args.calibration)
        whole, counts = flops(model, "retrieval"), sum(p.numel() for p in model.parameters())
        with tempfile.TemporaryDirectory() as scratch:
            dense = Path(scratch) / "dense"
            bytes_dense = exported(model, dense, args.threads)
            spec = read_json(dense / "task.json")
            int8 = quantised(dense) if "int8-dynamic" in args.precisions else dense
            for method in ONE_SHOT:
                plan = plan_by_scores(STRUCTURED[method], groups, norms, RATIO)
                achieved = removed(plan, groups, towers)["achieved"]
                small = load(name)
                cut(small, plan)
                folder = Path(scratch) / method
                sizes = exported(small, folder, args.threads)
                left = flops(small, "retrieval")
                row = {
                    "model": name,
                    "method": method,
                    "ratio": RATIO,
                    "achieved": achieved,
                    "parameters": sum(p.numel() for p in small.parameters()),
                    "dense_parameters": counts,
                    "gflops": left["image_encoder"] / 1e9,
                    "dense_gflops": whole["image_encoder"] / 1e9,
                    "files_ratio": sum(sizes.values()) / sum(bytes_dense.values()),
                }
                del small
                gc.collect()
                for precision in args.precisions:
                    before, after = (dense, folder) if precision == "fp32" else (int8, quantised(folder))
                    timed = compare(
                        before / "image_encoder.onnx",
                        after / "image_encoder.onnx",
                        spec=spec,
                        batch=args.batch,
                        provider=args.provider,
                        threads=args.threads,
                        seconds=args.seconds,
                    )
                    file_ratio = size_of(after) / size_of(before)
                    rows.append({**row, "file_ratio": file_ratio, "precision": precision, "batch": args.batch, **timed})
                    print(speed_line(rows[-1]), flush=True)
                shutil.rmtree(folder)
    return rows


def speed_line(row: dict[str, Any]) -> str:
    """One measurement as text."""
    low, high = (1 / bound for bound in reversed(row["ratio_ci95"]))
    return (
        f"{row['model']:17s} {row['method']:21s} {row['precision']:12s} removed {row['achieved']:.4f} "
        f"file x {row['file_ratio']:.3f} time x {1 / row['ratio']:.3f} [{low:.3f}, {high:.3f}] {row['verdict']}"
    )


# --- accuracy ---------------------------------------------------------------------------------------------------------


def cases(args: argparse.Namespace) -> Iterator[tuple[str, Case, str, dict[str, Any]]]:
    """The models asked for: name, case, path or alias, and the options that depend on this machine."""
    for name in args.models:
        if name != "flickr8k":
            yield name, CASES[name], name, {}
            continue
        model, data = args.flickr8k / "pretrained", args.data / "flickr8k"
        if not model.is_dir() or not data.is_dir():
            print(f"flickr8k left out: {model} or {data} is not there (run benchmarks/flickr8k.py first)")
            continue
        source = str(data)
        yield name, CASES[name], str(model), {"calibration": source, "data": dict.fromkeys(CASES[name].tasks, source)}


def accuracy(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compress each model by each method and seed; finished stages of an earlier call are kept."""
    found = []
    for name, case, model, here in cases(args):
        for seed in range(args.seeds):
            for method in args.methods:
                options = {**case.options, **here, "tasks": list(case.tasks), **args.changes}
                if args.quick and method == "mope":
                    options["mope"] = {"pairs": 8, "groups": 2}
                run = args.work / f"{name}-{method}-{seed}"
                report = pipeline.compress(
                    model, output=run, ratios=list(args.ratios), method=method, seed=seed, resume=True, **options
                )
                for row in report["metrics"]:
                    wanted = case.metrics[row["task"]]
                    values = {metric: row["values"][metric] for metric in wanted}
                    bounds = {metric: row["ci95"][metric] for metric in wanted if metric in row["ci95"]}
                    told = next(v for v in report["variants"] if v["id"] == row["variant"])
                    found.append(
                        {
                            "model": name,
                            "method": method,
                            "seed": seed,
                            "ratio": told["ratio"],
                            "finetuned": told["finetuned"],
                            "achieved": told["sparsity"]["achieved"],
                            "task": row["task"],
                            "dataset": row["dataset"],
                            "n": row["n"],
                            "values": values,
                            "ci95": bounds,
                        }
                    )
                print(f"{name} {method} seed {seed}: done", flush=True)
    return found


# --- the document -----------------------------------------------------------------------------------------------------


def table(columns: Sequence[str], body: Sequence[Sequence[str]], text: int) -> str:
    """A Markdown table whose first columns are text."""
    rule = ["---" if index < text else "---:" for index in range(len(columns))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, rule, *body])


def hardware(machine: dict[str, Any]) -> str:
    """The machine in a line."""
    gpu = f", {machine['gpu']}" if machine["gpu"] else ""
    return (
        f"{machine['cpu']}, {machine['threads']} threads{gpu}, Python {machine['python']}, torch {machine['torch']}, "
        f"onnxruntime {machine['onnxruntime']}"
    )


def speed_section(part: dict[str, Any], provider: str) -> str:
    """Sizes and times of one provider."""
    body = []
    for row in part["rows"]:
        low, high = (1 / bound for bound in reversed(row["ratio_ci95"]))
        verdict = "disturbed" if "note" in row else row["verdict"]
        body.append(
            [
                row["model"],
                row["method"],
                row["precision"],
                f"{row['achieved']:.3f}",
                f"{row['parameters'] / 1e6:.1f} M ({100 * row['parameters'] / row['dense_parameters']:.0f} %)",
                f"{row['gflops']:.1f} ({100 * row['gflops'] / row['dense_gflops']:.0f} %)",
                f"{row['file_ratio']:.3f}",
                f"{row['files_ratio']:.3f}",
                f"{row['dense']['p50_ms']:.1f}",
                f"{row['compressed']['p50_ms']:.1f}",
                f"{1 / row['ratio']:.3f} [{low:.3f}, {high:.3f}]",
                verdict,
                "reached" if max(1 / row["ratio"], row["file_ratio"]) <= TARGET else "**missed**",
            ]
        )
    columns = [
        "model", "method", "precision", "removed", "parameters", "GFLOPs", "file x", "all files x", "dense ms", "ms",
        "time x", "verdict", f"<= {TARGET}",
    ]  # fmt: skip
    batch = part["rows"][0]["batch"]
    about = (
        f"Random weights of BLIP-base's and CLIP ViT-B/16's shapes, 224 pixels, ratio {RATIO}. Removed: share of the "
        "prunable weights; parameters: all that are left, word embeddings included; GFLOPs, file, ms: of the image "
        f"encoder (ONNX Runtime, batch {batch}), a multiply-add being two; all files: of the task retrieval, fp32. `x` "
        "is the share of the dense graph's at the same precision, of times with its 95 % interval; "
        "int8-dynamic is both sides quantised by ONNX Runtime, which leaves the products inside attentions in fp32: a "
        "cut that keeps heads and takes neurons gains less there. The target is for time and file. A timing is "
        "`disturbed` where other processes took cores in so many rounds that it gets no verdict."
    )
    made = f"Made by `{part['command']}` on {hardware(part['environment'])}."
    return f"## Size and time, {provider}\n\n{made}\n\n{about}\n\n{table(columns, body, 3)}"


def mean(rows: Sequence[dict[str, Any]], metric: str) -> str:
    """The mean over seeds, and their range where there are several."""
    values = [row["values"][metric] for row in rows]
    if not values:
        return "–"
    text = points(sum(values) / len(values))
    return text if len(values) == 1 else f"{text} ({points(min(values))} to {points(max(values))})"


def accuracy_section(part: dict[str, Any]) -> str:
    """One table per model and task: methods by ratios, before and after fine-tuning."""
    rows = part["rows"]
    blocks = [
        "## Accuracy",
        f"Made by `{part['command']}` on {hardware(part['environment'])}.",
        "Scores times 100; one row per method and ratio, `pruned` before and `tuned` after fine-tuning, which takes "
        "the same steps for every method. Scores over several seeds are means, with their range. UPop trains before "
        "that, while it searches, for as many steps again. MoPE ranks by what retrieval among 100 calibration pairs "
        "loses (by embeddings, by BLIP's matching head, by the decoder's likelihood of the true caption), whatever the "
        "task, and is fine-tuned for retrieval with its distillation losses. Widths are multiples of 8.",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        about = CASES[model].about
        blocks += [f"### {model}", f"{about[0].upper()}{about[1:]}."]
        for task in dict.fromkeys(row["task"] for row in rows if row["model"] == model):
            here = [row for row in rows if (row["model"], row["task"]) == (model, task)]
            metrics = list(here[0]["values"])
            columns = ["method", "ratio", *(f"{title(m)} {when}" for m in metrics for when in ("pruned", "tuned"))]
            first = [row for row in here if row["method"] == here[0]["method"]]
            keys: list[tuple[str, float | None, list[dict[str, Any]]]] = [("dense", None, first)]
            for method in dict.fromkeys(row["method"] for row in here):
                ratios = dict.fromkeys(row["ratio"] for row in here if row["ratio"] is not None)
                keys += [(method, ratio, [row for row in here if row["method"] == method]) for ratio in ratios]
            body = []
            for method, ratio, of in keys:
                cells = [
                    mean([row for row in of if (row["ratio"], row["finetuned"]) == (ratio, tuned)], metric)
                    for metric in metrics
                    for tuned in (False, True)
                ]
                body.append([method, "–" if ratio is None else str(ratio), *cells])
            blocks += [f"{task}, {here[0]['dataset']}, n = {here[0]['n']:,}", table(columns, body, 1)]
    return "\n\n".join(blocks)


def document(parts: dict[str, Any]) -> str:
    """The whole document from the figures of all parts."""
    sections = ["# Structured pruning: what it gains, what it costs"]
    sections += [speed_section(parts[key], key.removeprefix("speed/")) for key in parts if key.startswith("speed/")]
    sections += [accuracy_section(parts["accuracy"])] if "accuracy" in parts else []
    return "\n\n".join(sections) + "\n"


def settings() -> argparse.Namespace:
    """Read the options, and fill in what --quick makes small."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", action="store_true", help="only size and time")
    parser.add_argument("--accuracy", action="store_true", help="only accuracy")
    parser.add_argument("--quick", action="store_true", help="tiny models, few steps; writes no document")
    parser.add_argument("--provider", default="cpu", choices=("cpu", "cuda"), help="of ONNX Runtime")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all")
    parser.add_argument("--seconds", type=float, default=30.0, help="to time each graph")
    parser.add_argument("--models", help="of the accuracy part; default: all of " + ", ".join(CASES))
    parser.add_argument("--methods", help="of the accuracy part; default: all of " + ", ".join(STRUCTURED))
    parser.add_argument("--seeds", type=int, default=1, help="of the accuracy part")
    parser.add_argument("--flickr8k", type=Path, help="--work of benchmarks/flickr8k.py")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="has flickr8k")
    parser.add_argument("--work", type=Path, help="runs; default ~/.cache/vlprune/structured")
    parser.add_argument("--json", type=Path, metavar="FILE", help="figures, kept and added to")
    parser.add_argument("--results", type=Path, metavar="FILE", help="the document")
    args = parser.parse_args()
    cache = Path.home() / ".cache" / "vlprune"
    args.flickr8k = args.flickr8k or cache / "flickr8k"
    args.work = args.work or cache / ("structured-quick" if args.quick else "structured")
    args.methods = args.methods.split(",") if args.methods else list(STRUCTURED)
    args.models = args.models.split(",") if args.models else ["clip-tiny"] if args.quick else list(CASES)
    args.precisions = ("fp32",) if args.provider == "cuda" else ("fp32", "int8-dynamic")
    args.batch, args.calibration, args.ratios, args.changes = 8, 8, RATIOS, {}
    if args.quick:
        args.seconds, args.batch, args.calibration, args.ratios = 0.05, 2, 2, (RATIO,)
        args.changes = {"max_steps": 2, "samples": 16, "calibration_samples": 32, "batch_size": 8}
    else:
        args.json = args.json or ROOT / "docs" / "results" / "structured.json"
        args.results = args.results or ROOT / "docs" / "results" / "structured.md"
    args.both = args.speed == args.accuracy
    return args


def main() -> int:
    """Measure what is asked for, add it to the figures, write the document."""
    args = settings()
    if args.threads:
        torch.set_num_threads(args.threads)
    command = " ".join(["python benchmarks/structured.py", *sys.argv[1:]])
    parts: dict[str, Any] = read_json(args.json) if args.json and args.json.is_file() else {}
    try:
        if args.speed or args.both:
            names = ("clip-tiny",) if args.quick else ("blip-base-random", "clip-base-random")
            rows = speed(names, args)
            parts[f"speed/{args.provider}"] = {
                "command": command,
                "environment": environment(args.threads),
                "rows": rows,
            }
        if args.accuracy or args.both:
            again = {(model, method) for model in args.models for method in args.methods}
            kept = [r for r in parts.get("accuracy", {}).get("rows", []) if (r["model"], r["method"]) not in again]
            rows = [*kept, *accuracy(args)]
            parts["accuracy"] = {"command": command, "environment": environment(args.threads), "rows": rows}
    except VlpruneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    text = document(parts)
    print(text)
    if args.json:
        write_json(args.json, parts)
    if args.results:
        with atomic_path(args.results) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
