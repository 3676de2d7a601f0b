"""The keys of report.json, schema version 1, and the check that a report has them.

Flat rows, easy to load into a table; every row names its variant. `validate_report` reads the classes below, so they
are the only place where a key is declared.
"""

from collections.abc import Iterator
from pathlib import PurePosixPath
from types import NoneType, UnionType
from typing import Any, Literal, NotRequired, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

from vlprune.errors import RequestError


SCHEMA_VERSION = 1
FINITE = 1e18  # no figure of a report is larger

Verdict = Literal["faster", "slower", "no measurable difference"]


class Model(TypedDict):
    """The model as given.

    Attributes:
        name: what the user called it.
        family: for example "blip".
        checkpoint: where the weights came from, with their SHA-256 where there is a file.
        parameters: number of weights, shared ones counted once.
        prunable_parameters: those in prunable layers, shared ones counted once.
        random_weights: the weights are random: speed and memory mean something, accuracy does not.
        modalities: prunable layer -> its modality, in the order of the model.
    """

    name: str
    family: str
    checkpoint: str
    parameters: int
    prunable_parameters: int
    random_weights: bool
    modalities: NotRequired[dict[str, str]]


class Sparsity(TypedDict):
    """Fractions of prunable weights that are removed, in [0, 1]: set to zero, or physically gone.

    Attributes:
        achieved: over all prunable layers.
        per_modality: the same per modality.
        per_layer: the same per layer of the dense model, 1 where a whole layer is gone.
    """

    achieved: float
    per_modality: dict[str, float]
    per_layer: dict[str, float]


class TaskVariant(TypedDict):
    """What a variant is for one task, where the method makes another model for each.

    Attributes:
        sparsity: see `Variant`, of the parts that the task needs.
        parameters: see `Variant`, of the parts that the task needs.
        flops: see `Variant`, this task only.
        dense_parameters: of the same parts of the dense model.
    """

    sparsity: Sparsity
    parameters: int
    flops: dict[str, int]
    dense_parameters: int


class Variant(TypedDict):
    """One model that was measured.

    Attributes:
        id: "dense", "dense-finetuned", "multiflow-0.9", "multiflow-0.9-finetuned", ...
        method: pruning method, None when dense.
        ratio: fraction of the prunable weights that was to be removed, None when dense.
        pattern: "unstructured", "n:m", "rxc" for masks, "structured" where whole units are gone; None when dense.
        finetuned: it was trained for each task after pruning.
        sparsity: what was reached.
        parameters: weights still physically there (masked ones are, surgically removed ones are not).
        flops: task -> floating-point operations of one run of every graph of the task, at batch size 1 and without a
            cache, texts of 35 tokens where their number is free, counted by torch.utils.flop_counter: matrix products,
            convolutions and attention, a multiply-add being two. Masked weights are multiplied like any others.
        per_task: task -> the figures above, which are then their means over tasks.
        permuted: units were reordered for the pattern (`--permute`): mean share of the magnitude of the weights that
            read them which it keeps, before and after.
    """

    id: str
    method: str | None
    ratio: float | None
    pattern: str | None
    finetuned: bool
    sparsity: Sparsity
    parameters: int
    flops: NotRequired[dict[str, int]]
    per_task: NotRequired[dict[str, TaskVariant]]
    permuted: NotRequired[dict[str, float]]


class Metrics(TypedDict):
    """Scores of one variant on one task.

    Attributes:
        variant: a variant's id.
        task: a name of `vlprune.tasks.TASKS`.
        dataset: name of the test data.
        n: number of test samples (images, or questions).
        runtime: what computed the outputs.
        provider: "cpu", "cuda", "tensorrt".
        precision: "fp32", "fp16", "int8-static", "int8-dynamic".
        packed: the weights were read from a packed file.
        values: metric -> score, higher is better; shares in 0 to 1, cider in 0 to 10 (papers print both times 100).
        ci95: metric -> [low, high], 95 % bootstrap interval over samples, in the unit of the value.
        skipped: broken records left out (`--skip-broken`).
        weights: how a packed file stores them, "fp32" or "fp16"; `precision` is that of the computation.
        fused: nodes were joined into ONNX Runtime's larger ones; left out where they were not.
    """

    variant: str
    task: str
    dataset: str
    n: int
    runtime: Literal["pytorch", "onnxruntime"]
    provider: str
    precision: str
    packed: bool
    values: dict[str, float]
    ci95: dict[str, list[float]]
    skipped: NotRequired[int]
    weights: NotRequired[str]
    fused: NotRequired[bool]


class Graph(TypedDict):
    """One exported ONNX graph.

    Attributes:
        variant: a variant's id.
        task: the task it serves.
        graph: its name, as in "image_encoder".
        precision: see `Metrics`.
        packed: the weights are packed.
        file: path inside the run directory, with "/".
        bytes: size of the file and its external data.
        dense_bytes: size of the dense model's same graph, exported the same way.
        nonzero_fraction: share of nonzero entries among the weights of prunable layers, in [0, 1].
        max_abs_diff: largest |ONNX Runtime - PyTorch| over all outputs and probes.
        cosine_min: smallest cosine between the two, over outputs and samples.
        weights: how a packed file stores them, "fp32" or "fp16"; `precision` is that of the computation.
        linears: how many Linears a packed file has, those made one node counted once.
        linears_packed: how many of them are packed; packing.json beside the file tells why others are not.
        kept_fp32: nodes that stay in fp32 in a graph of another precision, and why.
        fused: see `Metrics`.
        fusions: operator -> how many of it were made by joining nodes.
        not_fused: nodes that were looked at and not joined, and why.
    """

    variant: str
    task: str
    graph: str
    precision: str
    packed: bool
    file: str
    bytes: int
    dense_bytes: int
    nonzero_fraction: float
    max_abs_diff: float
    cosine_min: float
    weights: NotRequired[str]
    linears: NotRequired[int]
    linears_packed: NotRequired[int]
    kept_fp32: NotRequired[list[str]]
    fused: NotRequired[bool]
    fusions: NotRequired[dict[str, int]]
    not_fused: NotRequired[list[str]]


class Timing(TypedDict):
    """Latency of one graph in milliseconds, and samples per second at the median."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    per_s: float


class EndToEnd(TypedDict):
    """As the timing of the device alone, with the copies from and to the memory of the host; see `Throughput`."""

    dense: Timing
    compressed: Timing
    ratio: float
    ratio_ci95: list[float]
    verdict: Verdict


class Gpu(TypedDict):
    """The state of a GPU at one moment, as far as it tells it.

    Attributes:
        sm_mhz: clock of the cores.
        memory_mhz: clock of the memory.
        power_w: watts drawn.
        temperature_c: degrees Celsius.
        throttled: why its clocks were lowered; empty where they were not.
    """

    sm_mhz: NotRequired[float]
    memory_mhz: NotRequired[float]
    power_w: NotRequired[float]
    temperature_c: NotRequired[float]
    throttled: list[str]


class SparseLayers(TypedDict):
    """Layers of weights in the pattern 2:4, as TensorRT's build log counts them.

    Attributes:
        eligible: those that sparse tensor cores could run.
        chosen: those that run there; for the others the dense kernels were faster.
    """

    eligible: int
    chosen: int


class Throughput(TypedDict):
    """One graph timed against the dense model's, same export and provider.

    Attributes:
        variant: a variant's id.
        task: the task the graph serves.
        graph: its name.
        provider: "cpu", "cuda", "tensorrt".
        precision: see `Metrics`.
        packed: the compressed side reads packed weights.
        batch: samples per run.
        dense: the dense side at the same precision; in fp32 where the other side is packed, or dense itself.
        compressed: the compressed side; the dense model itself in rows that tell what a precision gains.
        ratio: dense time / compressed time; above 1 the compressed graph is faster.
        ratio_ci95: its 95 % interval: the range over six measurements or more, on a CPU of graphs opened anew.
        verdict: what the interval says; it contains 1 -> "no measurable difference".
        rounds: undisturbed rounds that the figures come from.
        dropped: rounds thrown away because other processes took cores.
        note: why there is no verdict, where there is none.
        weights: how the compressed side stores them where it is packed, "fp32" or "fp16".
        fused: see `Metrics`; of the compressed side, and of the dense one unless that side is dense itself.
        end_to_end: the same measured with the copies between host and device; the times above are the device's alone.
        nodes: "dense" and "compressed" -> provider -> nodes of the graph that it ran; of a provider other than cpu.
        cuda_graph: all kernels were recorded once and started together.
        gpu: its state before and after the measurement.
        sparse_layers: of the compressed side, where the provider is TensorRT.
    """

    variant: str
    task: str
    graph: str
    provider: str
    precision: str
    packed: bool
    batch: int
    dense: Timing
    compressed: Timing
    ratio: float
    ratio_ci95: list[float]
    verdict: Verdict
    rounds: NotRequired[int]
    dropped: NotRequired[int]
    note: NotRequired[str]
    weights: NotRequired[str]
    fused: NotRequired[bool]
    end_to_end: NotRequired[EndToEnd]
    nodes: NotRequired[dict[str, dict[str, int]]]
    cuda_graph: NotRequired[bool]
    gpu: NotRequired[list[Gpu]]
    sparse_layers: NotRequired[SparseLayers]


class Output(TypedDict):
    """What one variant made of a sample.

    Attributes:
        variant: see `Metrics`.
        runtime: see `Metrics`.
        provider: see `Metrics`.
        precision: see `Metrics`.
        packed: see `Metrics`.
        weights: see `Metrics`.
        text: the caption, answer, class, or text found; "" where an image was to be found.
        image: thumbnail of the image found.
        correct: 1 right, 0 wrong, between them by the official VQA accuracy; captions are neither.
        rank: of the first right candidate, 1 = first.
    """

    variant: str
    runtime: Literal["pytorch", "onnxruntime"]
    provider: str
    precision: str
    packed: bool
    weights: NotRequired[str]
    text: str
    image: NotRequired[str]
    correct: NotRequired[float]
    rank: NotRequired[int]


class Sample(TypedDict):
    """One test sample, chosen by `vlprune.report.samples`, with the outputs of every variant that was scored on it.

    Attributes:
        task: see `Metrics`.
        dataset: see `Metrics`.
        sample: its place in the test data, from 0.
        images: thumbnails (JPEG) of the images that the model was given: paths inside the run directory, with "/".
        question: the question, sentence or text that it was given, else "".
        expected: what is right: the captions, answers, class, "true" or "false"; empty where an image was to be found.
        image: thumbnail of the image that was to be found.
        outputs: one per row of `metrics` on this task, as far as outputs were kept.
        differs: models disagree on it (the fine-tuned ones, where there are any).
        differing: on how many of the candidates they disagree.
        candidates: how many test samples this one was chosen from: the first ones.
    """

    task: str
    dataset: str
    sample: int
    images: list[str]
    question: str
    expected: list[str]
    image: NotRequired[str]
    outputs: list[Output]
    differs: bool
    differing: int
    candidates: int


class Stage(TypedDict):
    """What one stage cost.

    Attributes:
        name: kind/variant/task...
        seconds: wall clock.
        peak_rss_bytes: peak resident memory.
        peak_cuda_bytes: peak CUDA memory, None without CUDA.
        skipped: broken records of its data left out (`--skip-broken`).
    """

    name: str
    seconds: float
    peak_rss_bytes: int
    peak_cuda_bytes: int | None
    skipped: NotRequired[int]


class Environment(TypedDict):
    """The machine: versions, ONNX Runtime providers, names of processor and GPU (None without one), threads used."""

    python: str
    torch: str | None
    onnxruntime: str | None
    providers: list[str]
    cpu: str
    gpu: str | None
    driver: str | None
    threads: int


class Report(TypedDict):
    """report.json.

    Attributes:
        schema_version: 1.
        model: the model as given.
        seed: seed of the run.
        variants: one row per model measured.
        metrics: one row per variant, task, runtime; empty when the weights are random.
        graphs: one row per ONNX file.
        throughput: one row per graph, provider and batch size.
        samples: a few test samples per task; reports from before this key lack it.
        stages: one row per stage, in order.
        environment: the machine.
    """

    schema_version: int
    model: Model
    seed: int
    variants: list[Variant]
    metrics: list[Metrics]
    graphs: list[Graph]
    throughput: list[Throughput]
    samples: NotRequired[list[Sample]]
    stages: list[Stage]
    environment: Environment


def validate_report(report: Any, where: str = "report") -> Report:
    """Check that a report has exactly the declared keys, finite numbers, and rows that fit together.

    Args:
        report: what was read or is about to be written.
        where: name of the report for the message, for example its path.

    Returns:
        Report: the same object.

    Raises:
        RequestError: the first few problems, in one line.
    """
    problems = list(_mismatches(report, Report, ""))
    if not problems:
        problems = list(_contradictions(report))
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise RequestError(f"{where} is not a valid report: {shown}")
    return report


def _mismatches(value: Any, expected: Any, path: str) -> Iterator[str]:
    """Yield where `value` departs from the type `expected`."""
    origin = get_origin(expected)
    if is_typeddict(expected):
        if not isinstance(value, dict):
            yield f"{path or 'it'} is no object"
            return
        for key in sorted(expected.__required_keys__ - value.keys()):
            yield f"{_join(path, key)} is missing"
        hints = get_type_hints(expected)
        for key, item in value.items():
            if key in hints:
                yield from _mismatches(item, hints[key], _join(path, key))
            else:
                yield f"{_join(path, key)} is unknown"
    elif origin is list:
        if not isinstance(value, list | tuple):  # JSON makes lists of both
            yield f"{path} is no list"
            return
        for index, item in enumerate(value):
            yield from _mismatches(item, get_args(expected)[0], f"{path}[{index}]")
    elif origin is dict:
        if not isinstance(value, dict):
            yield f"{path} is no object"
            return
        for key, item in value.items():
            yield from _mismatches(item, get_args(expected)[1], _join(path, str(key)))
    elif origin in (Union, UnionType):
        options = [option for option in get_args(expected) if option is not NoneType]
        if value is not None:
            yield from _mismatches(value, options[0], path)
    elif origin is Literal:
        if value not in get_args(expected):
            yield f"{path} is {value!r}, not one of {', '.join(get_args(expected))}"
    elif expected is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            yield f"{path} is no number"
        elif not -FINITE < value < FINITE:
            yield f"{path} is {value:.3}" if isinstance(value, float) else f"{path} is too large"
    elif not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        yield f"{path} is {value!r:.60}, no {expected.__name__}"
    elif expected is int and not -FINITE < value < FINITE:
        yield f"{path} is too large"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _contradictions(report: Report) -> Iterator[str]:
    """Yield what is well-formed but cannot be."""
    if report["schema_version"] != SCHEMA_VERSION:
        yield f"schema_version is {report['schema_version']}, this vlprune reads {SCHEMA_VERSION}"
    ids = [variant["id"] for variant in report["variants"]]
    for name in sorted({name for name in ids if ids.count(name) > 1}):
        yield f"variant {name} is there twice"
    for variant in report["variants"]:
        sparsity = variant["sparsity"]
        fractions = [sparsity["achieved"], *sparsity["per_modality"].values(), *sparsity["per_layer"].values()]
        if not all(0 <= fraction <= 1 for fraction in fractions):
            yield f"variant {variant['id']} has a sparsity outside 0 to 1"
    named: dict[str, list[str]] = {
        "metrics": [row["variant"] for row in report["metrics"]],
        "graphs": [row["variant"] for row in report["graphs"]],
        "throughput": [row["variant"] for row in report["throughput"]],
    }
    for section, names in named.items():
        for index, name in enumerate(names):
            if name not in ids:
                yield f"{section}[{index}] names the unknown variant {name!r}"
    for index, metrics in enumerate(report["metrics"]):
        for metric, interval in metrics["ci95"].items():
            if metric not in metrics["values"]:
                yield f"metrics[{index}] has an interval for {metric} but no value"
            elif len(interval) != 2 or interval[0] > interval[1]:
                yield f"metrics[{index}].ci95.{metric} is not [low, high]"
    for index, graph in enumerate(report["graphs"]):
        if _leaves(graph["file"]):
            yield f"graphs[{index}].file leaves the run directory"
        for key in ("bytes", "dense_bytes", "max_abs_diff"):
            if graph[key] < 0:  # type: ignore[literal-required]
                yield f"graphs[{index}].{key} is negative"
        if not 0 <= graph["nonzero_fraction"] <= 1:
            yield f"graphs[{index}].nonzero_fraction is outside 0 to 1"
    for index, timed in enumerate(report["throughput"]):
        if len(timed["ratio_ci95"]) != 2 or timed["ratio_ci95"][0] > timed["ratio_ci95"][1]:
            yield f"throughput[{index}].ratio_ci95 is not [low, high]"
    for index, sample in enumerate(report.get("samples", [])):
        parts = (sample, *sample["outputs"])
        if any(map(_leaves, [*sample["images"], *(part["image"] for part in parts if "image" in part)])):
            yield f"samples[{index}] names an image outside the run directory"
        if any(output["variant"] not in ids for output in sample["outputs"]):
            yield f"samples[{index}] names an unknown variant"
    if report["model"]["random_weights"] and report["metrics"]:
        yield "metrics are given although the weights are random"


def _leaves(file: str) -> bool:
    path = PurePosixPath(file)
    return path.is_absolute() or ".." in path.parts
