"""Score the graphs of the embedded models in every precision on a CPU, and hold joined graphs against plain ones.

python benchmarks/precision.py                           # blip-tiny and clip-tiny, 500 test samples; about 20 minutes
python benchmarks/precision.py --quick                   # clip-tiny, 40 test samples
python benchmarks/precision.py --json docs/results/precision.json --seconds 2   # and time every graph, too

Of each precision the table tells what it costs in points of the score, and the smallest cosine to PyTorch. "fp16,
rounded" is the fp16 graph with every result rounded to fp16, as a GPU gives it; on a CPU ONNX Runtime computes it in
fp32. Exit code 1 when fp16 or static int8 loses more than a point, or a joined graph differs from the plain one by more
than 1e-4.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from vlprune import load, pipeline
from vlprune.data import open_data
from vlprune.exporters.compare import compare
from vlprune.exporters.half import rounding
from vlprune.exporters.pack import load as load_graph
from vlprune.files import read_json, write_json
from vlprune.names import PRECISIONS
from vlprune.report.environment import environment
from vlprune.report.summary import HEADLINES, title
from vlprune.runtime.session import OnnxGraph, load_graphs, open_bytes
from vlprune.tasks import evaluate


ROUNDED = "fp16, rounded"
LIMIT = 0.01  # of a score in 0 to 1: a point
EQUAL = 1e-4  # largest difference of joined graphs, relative where an output has values above 1


def measure(model: str, run: Path, ratio: float, samples: int, threads: int | None) -> dict[str, Any]:
    """Prune a model once, export it in every form, score each.

    Args:
        model: alias of an embedded model.
        run: run directory to make.
        ratio: fraction of the weights to remove.
        samples: test samples per task.
        threads: CPU threads.

    Returns:
        dict[str, Any]: `scores`, a row per variant, task, metric and form, and `joined`, one per joined graph.
    """
    pipeline.prune(model, output=run, ratios=[ratio], threads=threads)
    options: dict[str, Any] = {"precision": list(PRECISIONS[1:]), "threads": threads}
    report = pipeline.export(run, fuse=False, **options)
    cosines: dict[tuple[str, str, str], float] = {}
    for row in report["graphs"]:
        key = (row["variant"], row["task"], row["precision"])
        cosines[key] = min(row["cosine_min"], cosines.get(key, 1.0))
    processor = load(model).processor
    scores = []
    for folder in sorted(run.glob("onnx/*/*")):
        variant, task = folder.parent.name, folder.name
        spec, data = read_json(folder / "task.json"), open_data(task, "scenes", "test", limit=samples)
        halves = {file.stem: rounding(load_graph(file)) for file in (folder / "fp16").glob("*.onnx")}
        forms = {form: load_graphs(folder / form, threads=threads) for form in PRECISIONS[1:]}
        forms = {"fp32": load_graphs(folder, threads=threads), **forms}
        forms[ROUNDED] = {
            name: OnnxGraph(open_bytes(half.SerializeToString(), threads=threads), name)
            for name, half in halves.items()
        }
        whole: dict[str, float] = {}
        for form, graphs in forms.items():
            found = evaluate(task, graphs, spec, processor, data)
            whole = whole or found.values
            for metric in HEADLINES[task]:
                row = {"model": model, "variant": variant, "task": task, "metric": metric, "form": form, "n": found.n}
                row |= {"value": found.values[metric], "change": found.values[metric] - whole[metric]}
                key = (variant, task, form.split(",")[0])
                scores.append({**row, "ci95": list(found.ci95[metric]), "cosine_min": cosines[key]})
    return {"scores": scores, "joined": joined(model, run, processor, threads)}


def joined(model: str, run: Path, processor: Any, threads: int | None) -> list[dict[str, Any]]:
    """Join the nodes of a run's graphs and compare each graph with the plain one.

    Args:
        model: its name.
        run: with plain graphs.
        processor: of the model.
        threads: CPU threads.

    Returns:
        list[dict[str, Any]]: a row per graph.
    """
    report = pipeline.export(run, precision=["fp32"], fuse=True, threads=threads, resume=True)
    rows = []
    for folder in sorted(run.glob("onnx/*/*/fused")):
        variant, task = folder.parts[-3:-1]
        sides = [load_graphs(place, threads=threads) for place in (folder.parent, folder)]
        data = open_data(task, "scenes", "test", limit=20)
        found = compare(sides[0], sides[1], read_json(folder / "task.json"), processor, data, 1.0)
        for row in report["graphs"]:
            if row.get("fused") and (row["variant"], row["task"]) == (variant, task) and row["precision"] == "fp32":
                same = {key: row[key] for key in ("variant", "task", "graph", "fusions", "not_fused")}
                rows.append({"model": model, **same, "difference": found[row["graph"]].relative})
    return rows


def main() -> int:
    """Measure, print, write.

    Returns:
        int: exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="clip-tiny and 40 test samples only")
    parser.add_argument("--models", nargs="+", default=["blip-tiny", "clip-tiny"], metavar="MODEL")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seconds", type=float, help="time each graph at batch 1 and 8 for S seconds", metavar="S")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    args = parser.parse_args()
    models, samples = (["clip-tiny"], 40) if args.quick else (args.models, args.samples)
    found: dict[str, Any] = {"environment": environment(args.threads), "scores": [], "joined": [], "throughput": []}
    with tempfile.TemporaryDirectory() as scratch:
        for model in models:
            run = Path(scratch) / model
            for kind, rows in measure(model, run, args.ratio, samples, args.threads).items():
                found[kind] += rows
            if args.seconds:
                options: dict[str, Any] = {"precision": list(PRECISIONS[1:]), "fuse": True, "threads": args.threads}
                pipeline.export(run, resume=True, **options)
                timed = pipeline.bench(run, bench_batches=[1, 8], seconds=args.seconds, threads=args.threads)
                found["throughput"] += [{"model": model, **row} for row in timed["throughput"]]
    show(found)
    if args.json:
        write_json(args.json, found)
    lost = [r for r in found["scores"] if r["form"] in ("fp16", ROUNDED, "int8-static") and r["change"] < -LIMIT]
    apart = [row for row in found["joined"] if row["difference"] > EQUAL]
    print(f"\nfp16 and int8-static within a point: {'no' if lost else 'yes'}; joined graphs equal: {not apart}")
    return 1 if lost or apart else 0


def show(found: dict[str, Any]) -> None:
    """Print the tables.

    Args:
        found: scores, joined, throughput.
    """
    forms = ["fp32", "fp16", ROUNDED, "int8-static", "int8-dynamic"]
    print("| model | variant | task | score | n | " + " | ".join(forms) + " |")
    print("| --- | --- | --- | --- | ---: |" + " ---: |" * len(forms))
    rows = {
        tuple(row[key] for key in ("model", "variant", "task", "metric", "n", "form")): row for row in found["scores"]
    }
    for model, variant, task, metric, n in dict.fromkeys(key[:5] for key in rows):
        cells = []
        for form in forms:
            row = rows[model, variant, task, metric, n, form]
            change = "" if form == "fp32" else f" ({100 * row['change']:+.1f}, {row['cosine_min']:.5f})"
            cells.append(f"{100 * row['value']:.1f}{change}")
        print(f"| {model} | {variant} | {task} | {title(metric)} | {n} | " + " | ".join(cells) + " |")
    print("\n| model | variant | graph | joined | left as they were | largest difference |")
    print("| --- | --- | --- | --- | ---: | ---: |")
    for row in found["joined"]:
        made = ", ".join(f"{count} {name}" for name, count in row["fusions"].items())
        graph = f"{row['task']} / {row['graph']}"
        end = f"{len(row['not_fused'])} | {row['difference']:.1e} |"
        print(f"| {row['model']} | {row['variant']} | {graph} | {made} | {end}")
    for row in found["throughput"]:
        form = ", ".join(filter(None, [row["precision"], "joined" if row.get("fused") else ""]))
        times = f"{row['dense']['p50_ms']:.2f} ms / {row['compressed']['p50_ms']:.2f} ms = {row['ratio']:.2f}"
        low, high = row["ratio_ci95"]
        what = f"{row['model']} {row['variant']} {row['task']} / {row['graph']}, {form}, batch {row['batch']}"
        print(f"{what}: {times} [{low:.2f}, {high:.2f}] {row.get('note') and 'disturbed' or row['verdict']}")


if __name__ == "__main__":
    sys.exit(main())
