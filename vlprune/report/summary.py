"""The figures a reader wants first, gathered from the flat rows of a report."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlprune.names import COSINES, PRECISIONS
from vlprune.report.schema import Metrics, Report, Variant


# The metrics that stand for a task in short tables; other tasks show their first one.
HEADLINES = {
    "retrieval": ("i2t_r1", "t2i_r1"),
    "captioning": ("cider",),
    "vqa": ("accuracy",),
    "zero-shot": ("top1",),
    "classification": ("top1",),
    "nlvr": ("accuracy",),
}

TITLES = {
    "i2t_r1": "text R@1",
    "i2t_r5": "text R@5",
    "i2t_r10": "text R@10",
    "t2i_r1": "image R@1",
    "t2i_r5": "image R@5",
    "t2i_r10": "image R@10",
    "mean_r1": "mean R@1",
    "cider": "CIDEr",
    "exact": "exact match",
    "accuracy": "accuracy",
    "top1": "top-1",
    "top5": "top-5",
} | {f"bleu_{n}": f"BLEU-{n}" for n in range(1, 5)}

DENSE = ("dense-finetuned", "dense")  # the variant that exported graphs are held against: the first there is
DYNAMIC = "int8-dynamic"  # precision of dense graphs that ONNX Runtime quantised
ZEROS = (
    "Unstructured zeros do not make standard ONNX operators faster: they multiply zeros like any other number. "
    "What the zeros gain is size, once the weights are packed."
)
STRUCTURED = (
    "Structured pruning removes whole heads, neurons or layers: the matrices are smaller, so that files are, too, and "
    "any runtime has less to compute. FLOPs are those of one run of every graph of a task at batch size 1 (texts of 35 "
    "tokens where their number is free, no cache): matrix products, convolutions and attention, a multiply-add being "
    "two."
)
PACKED = (
    "Packed graphs (CPU only) skip the zeros. Their throughput ratio is what that gains in speed, fused attentions "
    "included (the operators vlprune.SparseLinear, SparseMlp, HalfLinear and Attention); their size, held against the "
    "dense file's, is what it gains in size."
)
INT8 = (
    "The dense graphs in dynamic int8 (by ONNX Runtime, weights of MatMul and Gemm) are measured beside packed ones; "
    "their files are kept where that precision was asked for. Both are timed in turn with dense fp32: compare ratios, "
    "rather than times."
)
HALF = (
    "Graphs in fp16 keep LayerNorm, softmax, sums and whatever came near the largest number of fp16 on real inputs in "
    "fp32. Their differences to PyTorch are with every result rounded to fp16, as GPUs do; a CPU computes them in fp32 "
    "with rounded weights, so that they are no faster there."
)
FUSED = (
    "Fused graphs compute the same with ONNX Runtime's larger operators: attention, LayerNorm with the sum before it, "
    "activation with the bias before it. report.json tells of each graph what was fused and what was not, and why."
)
STATIC = (
    "Graphs in int8 hold the weights of matrix products per output channel, zeros stay zeros, small weights become "
    "zeros; attention products, convolutions and embeddings stay in fp32."
)
DEVICE = (
    "Times on a GPU are of the device alone, inputs and outputs in its memory; report.json has them with copies from "
    "and to the memory of the host, too."
)
DISTURBED = "Timings marked disturbed get no verdict: other processes took cores in too many rounds."
RANDOM = "The weights are random: sizes and times mean something, accuracy does not, so none is shown."


@dataclass(frozen=True)
class Row:
    """One metric of one task through the stages of one compressed model; None where it was not measured.

    Attributes:
        variant: id of the pruned variant, without "-finetuned".
        task: the task.
        metric: the metric's name.
        dense: score of the model as given.
        dense_finetuned: the same after the recipe that the pruned model got.
        pruned: score right after pruning.
        finetuned: score after fine-tuning.
        onnx: score of the last of these, computed by ONNX Runtime at full precision.
        packed: the same on the packed graphs.
        int8: score of the dense graphs that the packed ones are timed against, quantised to dynamic int8.
    """

    variant: str
    task: str
    metric: str
    dense: float | None
    dense_finetuned: float | None
    pruned: float | None
    finetuned: float | None
    onnx: float | None
    packed: float | None = None
    int8: float | None = None


def summarize(report: Report) -> list[Row]:
    """Gather the headline metrics of every pruned variant.

    Args:
        report: a valid report.

    Returns:
        list[Row]: by variant, task, metric, in the order of the report.
    """
    if report["model"]["random_weights"]:
        return []
    rows = []
    for base in dict.fromkeys(base_id(variant) for variant in report["variants"] if variant["method"]):
        for task in dict.fromkeys(row["task"] for row in report["metrics"]):
            of_task = [row for row in report["metrics"] if row["task"] == task]
            for metric in headline(task, of_task):
                one_shot, tuned = base, f"{base}-finetuned"
                onnx = _score(of_task, tuned, metric, "onnxruntime")
                packed = _score(of_task, tuned, metric, "onnxruntime", packed=True)
                one_shot_packed = _score(of_task, one_shot, metric, "onnxruntime", packed=True)
                quantised = [_score(of_task, v, metric, "onnxruntime", precision=DYNAMIC) for v in DENSE]
                rows.append(
                    Row(
                        variant=base,
                        task=task,
                        metric=metric,
                        dense=_score(of_task, "dense", metric),
                        dense_finetuned=_score(of_task, "dense-finetuned", metric),
                        pruned=_score(of_task, one_shot, metric),
                        finetuned=_score(of_task, tuned, metric),
                        onnx=_score(of_task, one_shot, metric, "onnxruntime") if onnx is None else onnx,
                        packed=one_shot_packed if packed is None else packed,
                        int8=next((score for score in quantised if score is not None), None),
                    )
                )
    return rows


def score_table(report: Report) -> list[dict[str, str]]:
    """Lay out `summarize` for people.

    Args:
        report: a valid report.

    Returns:
        list[dict[str, str]]: one row per pruned variant and headline metric, ready to print: what it is (three texts),
            and its scores times 100.
    """
    packed, int8 = has_packed(report), has_int8(report)
    return [
        {
            "variant": row.variant,
            "task": row.task,
            "metric": title(row.metric),
            "dense": points(row.dense),
            "dense, fine-tuned": points(row.dense_finetuned),
            "pruned": points(row.pruned),
            "pruned, fine-tuned": points(row.finetuned),
            "ONNX": points(row.onnx),
            **({"ONNX, packed": points(row.packed)} if packed else {}),
            **({"dense, int8": points(row.int8)} if int8 else {}),
        }
        for row in summarize(report)
    ]


def precision_table(report: Report) -> list[dict[str, str]]:
    """Lay out what ONNX Runtime scores in each precision, the packed graphs left out.

    Args:
        report: a valid report.

    Returns:
        list[dict[str, str]]: one row per variant, provider and headline metric, ready to print: what it is (four
            texts), and its scores times 100; none where all graphs are in fp32.
    """
    rows = [row for row in report["metrics"] if row["runtime"] == "onnxruntime" and not row["packed"]]
    wanted = precisions(report)
    found = []
    for variant, task, provider in dict.fromkeys((row["variant"], row["task"], row["provider"]) for row in rows):
        of_task = [row for row in rows if (row["variant"], row["task"], row["provider"]) == (variant, task, provider)]
        for metric in headline(task, [row for row in report["metrics"] if row["task"] == task]):
            scores = {p: _score(of_task, variant, metric, "onnxruntime", precision=p) for p in wanted}
            what = {"variant": variant, "task": task, "metric": title(metric), "provider": provider}
            if sum(score is not None for score in scores.values()) > 1:
                found.append(what | {precision: points(score) for precision, score in scores.items()})
    return found


def square_table(report: Report) -> list[dict[str, str]]:
    """Hold (dense, compressed) x (fp32, fp16) against each other, where graphs were timed in both precisions.

    Args:
        report: a valid report.

    Returns:
        list[dict[str, str]]: one row per compressed graph, provider and batch size, ready to print: what it is (three
            texts), milliseconds of the four, and how many times faster each step is that was timed side by side.
    """
    keys = ("variant", "task", "graph", "provider", "batch")
    plain = {
        (row["precision"], *(row[key] for key in keys)): row  # type: ignore[literal-required]
        for row in report["throughput"]
        if not row["packed"] and not (row["precision"] == "fp32" and row.get("fused"))
    }
    found = []
    for (precision, variant, *rest), full in plain.items():
        half = plain.get(("fp16", variant, *rest))
        dense = next((row for v in DENSE if (row := plain.get(("fp16", v, *rest)))), None)
        if precision != "fp32" or not half or not dense:
            continue
        found.append(
            {
                "variant": variant,
                "graph": f"{full['task']} / {full['graph']}",
                "provider": full["provider"],
                "batch": str(full["batch"]),
                "dense fp32 ms": f"{full['dense']['p50_ms']:.2f}",
                "dense fp16 ms": f"{half['dense']['p50_ms']:.2f}",
                "fp32 ms": f"{full['compressed']['p50_ms']:.2f}",
                "fp16 ms": f"{half['compressed']['p50_ms']:.2f}",
                "fp32: times dense": _times(full),
                "fp16: times dense": _times(half),
                "dense: fp16 times fp32": _times(dense),
            }
        )
    return found


def precisions(report: Report) -> list[str]:
    """Tell which precisions the unpacked graphs are in.

    Args:
        report: a valid report.

    Returns:
        list[str]: in their order; fp32 alone where there is no other.
    """
    there = {row["precision"] for row in report["graphs"] if not row["packed"]}
    return [precision for precision in PRECISIONS if precision == "fp32" or precision in there]


def far_graphs(report: Report) -> list[str]:
    """Name the graphs whose precision took them farther from PyTorch than its limit (`vlprune.names.COSINES`).

    Args:
        report: a valid report.

    Returns:
        list[str]: a line each.
    """
    return [
        f"Warning: {row['file']} has a smallest cosine of {row['cosine_min']:.4f} to PyTorch, below the "
        f"{COSINES[row['precision']]} expected of {row['precision']}."
        for row in report["graphs"]
        if not row["packed"] and row["cosine_min"] < COSINES.get(row["precision"], -1)
    ]


def notes(report: Report) -> list[str]:
    """Say what the figures of a report mean.

    Args:
        report: a valid report.

    Returns:
        list[str]: a paragraph on structured pruning, unstructured zeros, packed graphs, dynamic int8, other precisions,
            disturbed timings, as far as it has them; what was exported and not scored; a warning for each graph that
            lost too much; and `gpu_notes`.
    """
    said = {
        STRUCTURED: has_structured(report),
        ZEROS: any(variant["pattern"] == "unstructured" for variant in report["variants"]),
        PACKED: has_packed(report),
        INT8: has_int8(report),
        FUSED: any(row.get("fused") for row in report["graphs"]),
        HALF: "fp16" in precisions(report),
        STATIC: any(precision.startswith("int8") for precision in precisions(report)),
        DISTURBED: any("note" in row for row in report["throughput"]),
    }
    told = [text for text, wanted in said.items() if wanted]
    return told + unscored_graphs(report) + far_graphs(report) + gpu_notes(report)


def unscored_graphs(report: Report) -> list[str]:
    """Say which tasks have graphs that were not scored, as after `vlprune export` alone.

    Args:
        report: a valid report.

    Returns:
        list[str]: a sentence; none where all were, or where there is nothing to score.
    """
    scored = {(row["variant"], row["task"], packing(row)) for row in report["metrics"] if row["runtime"] != "pytorch"}
    tasks = {row["task"]: None for row in report["graphs"] if (row["variant"], row["task"], packing(row)) not in scored}
    if report["model"]["random_weights"] or not tasks:
        return []
    return [
        f"Not scored since they were exported: graphs of {', '.join(tasks)}. Scores in ONNX Runtime, timings and "
        "samples of older graphs are left out: run vlprune validate."
    ]


def gpu_notes(report: Report) -> list[str]:
    """Say what timings on a GPU are of: where nodes ran, whether clocks were lowered, how many layers ran sparse.

    Args:
        report: a valid report.

    Returns:
        list[str]: sentences; none where all timings are of the CPU.
    """
    timed = [row for row in report["throughput"] if "nodes" in row]
    said = [DEVICE] if timed else []
    for row in timed:
        name = (
            f"{row['variant']}, {row['task']} / {row['graph']}, {packing(row)}, {row['provider']}, batch {row['batch']}"
        )
        for side, nodes in row["nodes"].items():
            if "cpu" in nodes:
                said.append(
                    f"{name}: {nodes['cpu']} of {sum(nodes.values())} nodes of the {side} graph run on the CPU."
                )
        if reasons := {reason: None for state in row.get("gpu", []) for reason in state["throttled"]}:
            said.append(f"{name}: the GPU had lowered its clocks ({', '.join(reasons)}).")
        if layers := row.get("sparse_layers"):
            what = "faster" if layers["chosen"] and row["verdict"] == "faster" else "not faster"
            said.append(
                f"{name}: TensorRT runs {layers['chosen']} of {layers['eligible']} layers of the pattern 2:4 on sparse "
                f"tensor cores; {what} than dense."
            )
    return said


def base_id(variant: Variant) -> str:
    """Give the id that a variant had before fine-tuning.

    Args:
        variant: a row of the report.

    Returns:
        str: its id without "-finetuned".
    """
    return variant["id"].removesuffix("-finetuned")


def headline(task: str, rows: list[Metrics]) -> list[str]:
    """Choose the metrics that stand for a task.

    Args:
        task: the task.
        rows: its metric rows.

    Returns:
        list[str]: those of `HEADLINES` that were measured, else the first metric there is.
    """
    measured = list(dict.fromkeys(metric for row in rows for metric in row["values"]))
    return [metric for metric in HEADLINES.get(task, ()) if metric in measured] or measured[:1]


def title(metric: str) -> str:
    """Name a metric for people.

    Args:
        metric: its key.

    Returns:
        str: as papers call it.
    """
    return TITLES.get(metric, metric)


def points(value: float | None) -> str:
    """Print a score times 100, as papers do.

    Args:
        value: a share in 0 to 1 (CIDEr: 0 to 10), None when it was not measured.

    Returns:
        str: one decimal, or a dash.
    """
    return "–" if value is None else f"{100 * value:.1f}"


def packing(row: Mapping[str, Any]) -> str:
    """Name the form of a row's weights for people.

    Args:
        row: of metrics, graphs or throughput.

    Returns:
        str: "plain"; the precision where that is another than fp32, and "fused" where nodes were joined; or "packed"
            and how the values are stored.
    """
    if row["packed"]:
        return f"packed {row.get('weights', '')}".rstrip()
    precision = "" if row["precision"] == "fp32" else row["precision"]
    return ", ".join(filter(None, [precision, "fused" if row.get("fused") else ""])) or "plain"


def has_packed(report: Report) -> bool:
    """Tell whether any graph is packed.

    Args:
        report: a valid report.

    Returns:
        bool: one is.
    """
    return any(row["packed"] for row in report["graphs"])


def has_structured(report: Report) -> bool:
    """Tell whether units were removed from any variant.

    Args:
        report: a valid report.

    Returns:
        bool: they were.
    """
    return any(variant["pattern"] == "structured" for variant in report["variants"])


def cost_table(report: Report) -> list[dict[str, str]]:
    """Hold parameters and operations of structured variants against the dense model's.

    Args:
        report: a valid report.

    Returns:
        list[dict[str, str]]: ready to print, the dense model first, then each variant before fine-tuning (which changes
            neither); none where no units were removed.
    """
    dense = next((variant for variant in report["variants"] if variant["method"] is None), None)
    if dense is None or not has_structured(report):
        return []
    whole = dense.get("flops", {})
    rows = []
    for variant in report["variants"]:
        parts: dict[str, Any] = {variant["id"]: {**variant, "dense_parameters": dense["parameters"]}}
        if "per_task" in variant:
            parts = {f"{variant['id']}, {task}": part for task, part in variant["per_task"].items()}
        for name, part in parts.items() if not variant["finetuned"] else ():
            row = {"variant": name, "parameters": f"{part['parameters'] / 1e6:,.2f} M"}
            flops = part.get("flops", {})
            row |= {f"{task} GFLOPs": f"{count / 1e9:,.3f}" for task, count in flops.items()}
            if variant is not dense:
                row["parameters"] += _share(part["parameters"], part["dense_parameters"])
                for task in flops.keys() & whole.keys():
                    row[f"{task} GFLOPs"] += _share(flops[task], whole[task])
            rows.append(row)
    columns = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name, "–") for name in columns} for row in rows]


def _share(part: int, whole: int) -> str:
    return f" ({100 * part / max(whole, 1):.1f} %)"


def has_int8(report: Report) -> bool:
    """Tell whether dense graphs were measured in dynamic int8 beside packed ones.

    Args:
        report: a valid report.

    Returns:
        bool: they were.
    """
    return has_packed(report) and any(
        row["precision"] == DYNAMIC for row in (*report["metrics"], *report["throughput"])
    )


def side_by_side(report: Report) -> list[dict[str, Any]]:
    """Hold packed graphs and the dense ones in dynamic int8 against each other, by their gains over dense fp32.

    Args:
        report: a valid report.

    Returns:
        list[dict[str, Any]]: one row per packed graph and batch size that int8 was timed for, ready to print: what it
            is, the milliseconds of the three, and how many times faster than dense fp32 the two are.
    """
    timed = {
        tuple(row[key] for key in ("task", "graph", "provider", "batch")): row  # type: ignore[literal-required]
        for row in report["throughput"]
        if row["precision"] == DYNAMIC and row["variant"] in DENSE
    }
    found = []
    for row in report["throughput"]:
        int8 = timed.get((row["task"], row["graph"], row["provider"], row["batch"]))
        if row["packed"] and int8:
            found.append(
                {
                    "variant": row["variant"],
                    "graph": f"{row['task']} / {row['graph']}",
                    "batch": row["batch"],
                    "dense fp32 ms": f"{row['dense']['p50_ms']:.2f}",
                    "int8 ms": f"{int8['compressed']['p50_ms']:.2f}",
                    "packed ms": f"{row['compressed']['p50_ms']:.2f}",
                    "int8, times faster": _times(int8),
                    "packed, times faster": _times(row),
                }
            )
    return found


def ratio(row: Mapping[str, Any]) -> str:
    """Print the ratio of a timing with its interval.

    Args:
        row: of throughput.

    Returns:
        str: dense time / compressed time.
    """
    low, high = row["ratio_ci95"]
    return f"{row['ratio']:.3f} [{low:.3f}, {high:.3f}]"


def _times(row: Mapping[str, Any]) -> str:
    return f"{ratio(row)} (disturbed)" if "note" in row else ratio(row)


def verdict(row: Mapping[str, Any]) -> str:
    """Print the verdict of a timing.

    Args:
        row: of throughput.

    Returns:
        str: the verdict, or that the timing was disturbed too often for one.
    """
    return "disturbed" if "note" in row else str(row["verdict"])


def _score(
    rows: list[Metrics],
    variant: str,
    metric: str,
    runtime: str = "pytorch",
    packed: bool = False,
    precision: str = "fp32",
) -> float | None:
    """First score of a variant at a precision, packed or not, else None."""
    for row in rows:
        wanted = row["precision"] == precision and row["packed"] == packed
        if wanted and row["variant"] == variant and row["runtime"] == runtime and metric in row["values"]:
            return row["values"][metric]
    return None
