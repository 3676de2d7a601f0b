"""The options of every verb, declared once so that each is spelled alike everywhere, and the parsers of their values.

Parsers raise `RequestError` before anything heavy is imported; no torch here.
"""

import math
import re
import tempfile
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from vlprune import names, recipe
from vlprune.errors import RequestError
from vlprune.fields import Number, check
from vlprune.files import disk_errors


class Ratios(tuple[float, ...]):
    """Fractions of the prunable weights to remove, ascending."""


class Names(tuple[str, ...]):
    """Names from a comma list."""


class Sizes(tuple[int, ...]):
    """Positive integers from a comma list."""


class TaskSource(NamedTuple):
    """One TASK=PATH pair."""

    task: str
    source: str


def _parts(text: str, option: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise RequestError(f"{option} {text!r} has an empty entry: separate values by single commas, as in a,b")
    repeated = [part for part in dict.fromkeys(parts) if parts.count(part) > 1]
    if repeated:
        raise RequestError(f"{option} {text!r} names {repeated[0]} twice: name it once")
    return parts


def parse_ratios(text: str | Ratios) -> Ratios:
    """Parse `--ratio`: one number or a comma list.

    Args:
        text: for example "0.9" or "0.63,0.75,0.9".

    Returns:
        Ratios: ascending.

    Raises:
        RequestError: an entry is no number strictly between 0 and 1, or stands there twice.
    """
    if isinstance(text, Ratios):  # the default value passes through here too
        return text
    ratios = []
    for part in _parts(text, "--ratio"):
        ratio = _checked("--ratio", part, recipe.RATIO)
        if ratio in ratios:
            raise RequestError(f"--ratio {text!r} names {ratio} twice: name it once")
        ratios.append(ratio)
    return Ratios(sorted(ratios))


def parse_tasks(text: str) -> Names:
    """Parse `--tasks`.

    Args:
        text: comma list of task names.

    Returns:
        Names: the tasks, in the order given.
    """
    return Names(names.check("task", part, names.TASKS) for part in _parts(text, "--tasks"))


def parse_providers(text: str | Names) -> Names:
    """Parse `--provider`.

    Args:
        text: comma list of ONNX Runtime providers.

    Returns:
        Names: the providers, in the order given.
    """
    if isinstance(text, Names):
        return text
    return Names(names.check("provider", part, names.PROVIDERS) for part in _parts(text, "--provider"))


def parse_precisions(text: str | Names) -> Names:
    """Parse `--precision`.

    Args:
        text: comma list of precisions.

    Returns:
        Names: the precisions, in the order given.
    """
    if isinstance(text, Names):
        return text
    return Names(names.check("precision", part, names.PRECISIONS) for part in _parts(text, "--precision"))


def parse_names(text: str | Names) -> Names:
    """Parse a comma list whose names are looked at later.

    Args:
        text: comma list.

    Returns:
        Names: the names, in the order given.
    """
    return text if isinstance(text, Names) else Names(_parts(text, "the list"))


def parse_sizes(text: str | Sizes) -> Sizes:
    """Parse `--bench-batch`.

    Args:
        text: comma list of positive integers.

    Returns:
        Sizes: the sizes, in the order given.

    Raises:
        RequestError: an entry is no positive integer.
    """
    if isinstance(text, Sizes):
        return text
    parts = _parts(text, "--bench-batch")
    for part in parts:
        if not re.fullmatch(r"[1-9][0-9]{0,5}", part):
            raise RequestError(
                f"--bench-batch {part!r} is not a whole number of 1 or more: give batch sizes, as in 1,8"
            )
    return Sizes(int(part) for part in parts)


class Weights(tuple[float, ...]):
    """Weights of losses from a comma list; empty = no distillation."""


def parse_distill(text: str) -> Weights:
    """Parse `--distill`.

    Args:
        text: three numbers, or "none".

    Returns:
        Weights: of the similarity, feature and hidden losses.

    Raises:
        RequestError: it is neither.
    """
    if text == "none":
        return Weights()
    weights = Weights(_number(part) for part in text.split(","))
    if len(weights) != 3 or not all(map(recipe.WEIGHT.holds, weights)):
        raise RequestError(
            f"--distill {text!r} is not three numbers of 0 or more, or none: give the weights of the similarity, "
            "feature and hidden losses, as in 1,1000,1"
        )
    return weights


def parse_seconds(text: str) -> float:
    """Parse `--seconds`.

    Args:
        text: a positive number.

    Returns:
        float: the number.

    Raises:
        RequestError: it is none.
    """
    return _checked("--seconds", text, recipe.SECONDS)


def parse_rate(text: str) -> float:
    """Parse `--lr`.

    Args:
        text: a positive number.

    Returns:
        float: the number.

    Raises:
        RequestError: it is none.
    """
    return _checked("--lr", text, recipe.RATE)


def _checked(option: str, text: str, rule: Number) -> float:
    number = _number(text)
    if not rule.holds(number):
        raise RequestError(f"{option} {text!r} {rule.otherwise}")
    return number


def _number(text: str) -> float:
    """Read a number, NaN for what is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def parse_data(text: str) -> TaskSource:
    """Parse one `--data`.

    Args:
        text: TASK=PATH.

    Returns:
        TaskSource: the pair.

    Raises:
        RequestError: no "=", no path, or an unknown task.
    """
    task, equals, source = text.partition("=")
    if not equals or not source.strip():
        raise RequestError(f"--data {text!r} is not TASK=PATH: write for example --data retrieval=captions_folder")
    return TaskSource(names.check("task", task.strip(), names.TASKS), source.strip())


def sources(pairs: list[TaskSource] | None) -> dict[str, str]:
    """Join the `--data` options.

    Args:
        pairs: what was given, None when nothing was.

    Returns:
        dict[str, str]: task -> source.

    Raises:
        RequestError: a task is named twice.
    """
    joined: dict[str, str] = {}
    for task, source in pairs or []:
        if task in joined:
            raise RequestError(f"--data names {task} twice ({joined[task]} and {source}): give one source per task")
        joined[task] = source
    return joined


def as_list(chosen: Names | None) -> list[str] | None:
    """Turn a parsed comma list into what the library takes.

    Args:
        chosen: the names, None when the option was left out.

    Returns:
        list[str] | None: the same names.
    """
    return None if chosen is None else list(chosen)


def parse_pattern(text: str) -> str:
    """Parse `--pattern`.

    Args:
        text: "unstructured", "n:m" (n of m kept along the input) or "rxc" (blocks of r rows and c columns).

    Returns:
        str: `text`.

    Raises:
        RequestError: anything else.
    """
    return str(check(recipe.mask_pattern, "--pattern", text))


def check_method(name: str) -> str:
    """Refuse an unknown pruning method.

    Args:
        name: what was typed.

    Returns:
        str: `name`.
    """
    return names.check("method", name, names.METHODS)


def check_model(name: str) -> str:
    """Refuse a MODEL that is no known alias, no file or folder, and cannot be a hub id or path either.

    Args:
        name: what was typed.

    Returns:
        str: `name`.
    """
    if recipe.is_place(name):
        return name
    from vlprune.models import names as aliases

    return names.check("model", name, aliases())


def check_optional_model(name: str | None) -> str | None:
    """Refuse what `check_model` refuses; a recipe may name the model instead.

    Args:
        name: what was typed, None for nothing.

    Returns:
        str | None: `name`.
    """
    return None if name is None else check_model(name)


def typed(context: typer.Context) -> set[str]:
    """Tell which parameters were typed, rather than left at their defaults.

    Args:
        context: of the verb.

    Returns:
        set[str]: their names in Python.
    """
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def check_path(path: Path) -> Path:
    """Refuse a path where nothing is.

    Args:
        path: what was typed.

    Returns:
        Path: `path`.

    Raises:
        RequestError: there is no such file or folder.
    """
    if not path.exists():
        raise RequestError(f"{path}: no such file or folder")
    return path


def check_run(path: Path) -> Path:
    """Refuse what is not a run directory.

    Args:
        path: what was typed.

    Returns:
        Path: `path`.

    Raises:
        RequestError: not a folder, or one that no `compress` or `prune` has written.
    """
    if not check_path(path).is_dir() or not (path / "recipe.yaml").is_file():
        raise RequestError(
            f"{path} is not a run directory (no recipe.yaml): give the --output of vlprune compress or prune"
        )
    return path


def check_providers(chosen: Names) -> Names:
    """Refuse providers that cannot start here, before anything heavy is imported.

    Args:
        chosen: names of providers.

    Returns:
        Names: `chosen`.
    """
    from vlprune.machine import require_provider

    for provider in chosen:
        require_provider(provider)
    return chosen


def check_device(device: str) -> str:
    """Refuse a GPU that PyTorch cannot have, before it is imported.

    Args:
        device: "auto", "cpu" or "cuda".

    Returns:
        str: `device`.
    """
    from vlprune.machine import require_device

    require_device(device)
    return device


def check_output(path: Path) -> Path:
    """Refuse a folder that cannot be written to, before any work.

    Args:
        path: folder to be written; it may not exist yet.

    Returns:
        Path: `path`.

    Raises:
        RequestError: it is a file, or the nearest existing folder above it takes no files.
    """
    with disk_errors(path):
        if path.exists() and not path.is_dir():
            raise RequestError(f"cannot write {path} (it is a file): choose another --output")
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        if not existing.is_dir():
            raise NotADirectoryError(20, "a part of it is a file")
        try:
            # Permission bits do not tell a read-only or special file system apart: try.
            with tempfile.TemporaryFile(dir=existing):
                pass
        except FileNotFoundError as error:  # what /proc and its like answer
            raise RequestError(f"cannot write {path} ({error.strerror}): choose another --output") from error
    return path


def mope(**chosen: int | str | None) -> dict[str, int | str] | None:
    """Gather the options of mope that were given.

    Args:
        **chosen: by name, None = not given.

    Returns:
        dict[str, int | str] | None: None when none was.
    """
    return {name: value for name, value in chosen.items() if value is not None} or None


def _complete_model(incomplete: str) -> list[str]:
    from vlprune.models import names as aliases

    return [name for name in aliases() if name.startswith(incomplete)]


def _complete_method(incomplete: str) -> list[str]:
    return [name for name in names.METHODS if name.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Argument(
        callback=check_model,
        autocompletion=_complete_model,
        metavar="MODEL",
        help="Alias (see vlprune models), hub id, Hugging Face folder, or original .pth file (with --family).",
        show_default=False,
    ),
]
OptionalModel = Annotated[
    str | None,
    typer.Argument(
        callback=check_optional_model,
        autocompletion=_complete_model,
        metavar="[MODEL]",
        help="Alias (see vlprune models), hub id, Hugging Face folder, or original .pth file (with --family); may "
        "stand in the recipe instead.",
        show_default=False,
    ),
]
Recipe = Annotated[
    Path | None,
    typer.Option(
        "--recipe",
        metavar="FILE",
        help="Options from a YAML file, as every run writes one; those on the command line win. All that is wrong with "
        "it is told at once: a summary, then a line per problem.",
        show_default=False,
    ),
]
RecipeFile = Annotated[
    Path, typer.Argument(callback=check_path, metavar="FILE", help="A recipe.yaml.", show_default=False)
]
Run = Annotated[Path, typer.Argument(callback=check_run, metavar="RUN", help="Run directory.", show_default=False)]
AnyPath = Annotated[
    Path,
    typer.Argument(
        callback=check_path,
        metavar="PATH",
        help="Checkpoint, mask file, ONNX file, bundle or run directory.",
        show_default=False,
    ),
]
Report = Annotated[
    Path,
    typer.Argument(
        callback=check_path, metavar="RUN_OR_REPORT", help="Run directory, or a report.json.", show_default=False
    ),
]
ReportOutput = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="A .html or .md file. [default: report.html beside report.json]",
        show_default=False,
    ),
]  # fmt: skip
NoSamples = Annotated[
    bool, typer.Option("--no-samples", help="Leave out the test samples: their images, texts and outputs.")
]
Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", callback=check_output, metavar="DIR", help="Run directory to write.", show_default=False
    ),
]
Ratio = Annotated[
    Ratios,
    typer.Option(
        "--ratio",
        parser=parse_ratios,
        metavar="R[,R...]",
        help="Fractions of the weights to remove.",
    ),
]
Method = Annotated[
    str,
    typer.Option(
        "--method", callback=check_method, autocompletion=_complete_method, help="Pruning method (see vlprune methods)."
    ),
]
Pattern = Annotated[
    str, typer.Option("--pattern", parser=parse_pattern, help="unstructured, n:m, or rxc blocks.", metavar="PATTERN")
]
Permute = Annotated[
    bool,
    typer.Option(
        "--permute", help="n:m patterns: reorder hidden units first, so that more of the weights' magnitude is kept."
    ),
]
RoundWidths = Annotated[
    bool,
    typer.Option(
        "--round-widths/--no-round-widths", help="Structured methods: leave widths that are multiples of 8, or any."
    ),
]
MopeStage = Annotated[
    recipe.MopeStage | None,
    typer.Option(
        "--mope-stage",
        help="mope: measure the model as given (pretraining, the default), or fine-tuned for each task.",
        show_default=False,
    ),
]
MopePairs = Annotated[
    int | None,
    typer.Option(
        "--mope-pairs", min=recipe.PAIRS.low, metavar="N", help="mope: evaluate on N images with captions; default 100."
    ),
]
Distill = Annotated[
    Weights | None,
    typer.Option(
        "--distill",
        parser=parse_distill,
        metavar="S,F,H",
        help="Structured methods: fine-tune for retrieval to resemble the dense model, with these weights of the "
        "similarity, feature and hidden losses, or none; default 1,1000,1 for mope, none for the others.",
    ),
]
Family = Annotated[str | None, typer.Option("--family", help="Model family of an original .pth file, as in blip.")]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration", metavar="SOURCE", help="Captioned images for the one calibration pass: folder or caption JSON."
    ),
]
CalibrationSamples = Annotated[
    int | None,
    typer.Option("--calibration-samples", min=recipe.COUNT.low, metavar="N", help="Use at most N calibration images."),
]
Data = Annotated[
    list[TaskSource] | None,
    typer.Option(
        "--data",
        parser=parse_data,
        metavar="TASK=PATH",
        help="Data of one task: folder, file, or train,test pair; repeatable.",
    ),
]
Tasks = Annotated[
    Names | None,
    typer.Option(
        "--tasks",
        parser=parse_tasks,
        metavar="TASK[,TASK...]",
        help="Only these tasks; all the model offers if left out.",
    ),
]
Finetune = Annotated[
    recipe.FinetuneMode,
    typer.Option(
        "--finetune", help="What to train after pruning: nothing, all but the sparse encoders, or all weights."
    ),
]
Export = Annotated[recipe.Export, typer.Option("--export", help="Write ONNX graphs and measure them.")]
Precision = Annotated[
    Names | None,
    typer.Option(
        "--precision",
        parser=parse_precisions,
        metavar="P[,P...]",
        help="Precisions of the ONNX graphs: fp16, int8-static, int8-dynamic, beside fp32, which is always there.",
    ),
]
Fuse = Annotated[
    bool | None,
    typer.Option(
        "--fuse/--no-fuse",
        help="Write graphs of ONNX Runtime's larger operators, too, and those of fp16 so; by default where --provider "
        "has cuda.",
        show_default=False,
    ),
]
Pack = Annotated[
    names.Packing,
    typer.Option("--pack", help="sparse: write packed graphs, too, whose layers skip the zeros (CPU only)."),
]
Values = Annotated[
    names.PackedValues,
    typer.Option("--values", help="Weights in packed graphs: fp32 is exact, fp16 rounds and takes less space."),
]
Target = Annotated[
    names.Target,
    typer.Option("--target", help="Instruction set that decides which layers are packed; auto: this machine's."),
]
PackThreshold = Annotated[
    float | None,
    typer.Option(
        "--pack-threshold",
        min=0,
        max=1,
        metavar="SHARE",
        help="Pack layers with at least this share of zeros; by default an estimate of what pays on the target.",
    ),
]
Unpack = Annotated[
    bool, typer.Option("--unpack", help="Write plain ONNX graphs from packed ones: RUN, a folder of them, or a file.")
]
RunOrPacked = Annotated[
    Path,
    typer.Argument(
        callback=check_path,
        metavar="RUN",
        help="Run directory; with --unpack also a packed ONNX file or a folder of them.",
        show_default=False,
    ),
]
Providers = Annotated[
    Names,
    typer.Option(
        "--provider",
        parser=parse_providers,
        callback=check_providers,
        metavar="P[,P...]",
        help="ONNX Runtime providers: cpu, cuda, tensorrt.",
    ),
]
MaxSteps = Annotated[
    int | None, typer.Option("--max-steps", min=recipe.COUNT.low, metavar="N", help="Stop fine-tuning after N steps.")
]
Epochs = Annotated[
    int | None, typer.Option("--epochs", min=recipe.COUNT.low, metavar="N", help="Passes over the training data.")
]
LearningRate = Annotated[
    float | None,
    typer.Option("--lr", parser=parse_rate, metavar="RATE", help="Peak learning rate of the cosine schedule."),
]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", min=recipe.COUNT.low, metavar="N", help="Samples per step.")
]
GradientCheckpointing = Annotated[
    bool,
    typer.Option(
        "--gradient-checkpointing", help="Fine-tune with less memory: what layers compute is computed again, not kept."
    ),
]
Compile = Annotated[bool, typer.Option("--compile", help="Fine-tune with torch.compile, which needs a C++ compiler.")]
ImageSize = Annotated[
    int | None,
    typer.Option(
        "--image-size", min=recipe.SIDE.low, metavar="PIXELS", help="Interpolate the position embeddings to this side."
    ),
]
Device = Annotated[
    recipe.Device,
    typer.Option("--device", callback=check_device, help="Where PyTorch computes."),
]
Seed = Annotated[
    int,
    typer.Option("--seed", min=recipe.SEED.low, max=recipe.SEED.high, metavar="N", help="Seed of everything random."),
]
RunSeed = Annotated[
    int | None,
    typer.Option("--seed", min=recipe.SEED.low, max=recipe.SEED.high, metavar="N", help="Seed of the fine-tuning."),
]
Samples = Annotated[
    int | None,
    typer.Option("--samples", min=recipe.COUNT.low, metavar="N", help="Evaluate on at most N samples per task."),
]
SkipBroken = Annotated[bool, typer.Option("--skip-broken", help="Count and report broken records instead of stopping.")]
Resume = Annotated[bool, typer.Option("--resume", help="Keep the finished stages of an interrupted run.")]
Threads = Annotated[int | None, typer.Option("--threads", min=recipe.COUNT.low, metavar="N", help="CPU threads.")]
BenchBatches = Annotated[
    Sizes,
    typer.Option(
        "--bench-batch",
        parser=parse_sizes,
        metavar="N[,N...]",
        help="Batch sizes of the throughput table.",
    ),
]
Batches = Annotated[  # `bench` has no other batches
    Sizes,
    typer.Option(
        "--batch",
        "--bench-batch",
        parser=parse_sizes,
        metavar="N[,N...]",
        help="Batch sizes of the throughput table.",
    ),
]
Seconds = Annotated[
    float | None,
    typer.Option(
        "--seconds",
        parser=parse_seconds,
        metavar="S",
        help="Time each graph and batch size for about S seconds; 2 by default.",
    ),
]
CudaGraph = Annotated[
    bool, typer.Option("--cuda-graph", help="On a GPU, record the kernels of a graph once and start them all at once.")
]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable results on stdout.")]

Limits = Annotated[
    Path | None,
    typer.Option("--limits", metavar="FILE", help="Limits in a YAML file; options win over it.", show_default=False),
]
Baseline = Annotated[
    Path | None,
    typer.Option(
        "--baseline",
        metavar="RUN_OR_REPORT",
        help="Earlier report: scores are compared with those of the same variant in it.",
        show_default=False,
    ),
]
Variants = Annotated[
    Names | None,
    typer.Option(
        "--variant",
        parser=parse_names,
        metavar="ID[,ID...]",
        help="Judge these; by default the fine-tuned compressed variants, or all compressed ones where there is none.",
    ),
]
Against = Annotated[
    Names | None,
    typer.Option(
        "--against",
        parser=parse_names,
        metavar="REFERENCE[,...]",
        help="Compare scores with dense, dense-finetuned, baseline; by default with the baseline, where one is given, "
        "else with every dense variant there is.",
    ),
]
Forms = Annotated[
    Names | None,
    typer.Option(
        "--form",
        parser=parse_names,
        metavar="FORM[,FORM...]",
        help="Judge graphs in these forms: plain, packed, fused, fp16, int8-static, int8-dynamic.",
    ),
]
_NESTED = "a value, or NAME=VALUE pairs by task, graph, provider..."
MinSparsity = Annotated[
    str | None,
    typer.Option("--min-sparsity", metavar="SHARE", help=f"Share of weights removed, at least: {_NESTED}"),
]
MaxMetricDrop = Annotated[
    str | None,
    typer.Option(
        "--max-metric-drop", metavar="POINTS", help=f"What scores may lose, in points or percent (5%): {_NESTED}"
    ),
]
MaxBytes = Annotated[
    str | None,
    typer.Option("--max-bytes", metavar="SIZE", help=f"Size of a task's graphs at most, as in 20MB: {_NESTED}"),
]
MinThroughputRatio = Annotated[
    str | None,
    typer.Option(
        "--min-throughput-ratio",
        metavar="RATIO",
        help=f"Dense time / compressed time, for all of its confidence interval: {_NESTED}",
    ),
]
MaxAbsDiff = Annotated[
    str | None,
    typer.Option("--max-abs-diff", metavar="DIFF", help=f"Difference of ONNX Runtime to PyTorch at most: {_NESTED}"),
]
RequiredProviders = Annotated[
    Names | None,
    typer.Option(
        "--required-providers",
        parser=parse_names,
        metavar="P[,P...]",
        help="ONNX Runtime providers that must have scored every task.",
    ),
]
Junit = Annotated[
    Path | None, typer.Option("--junit", metavar="FILE", help="Write JUnit XML, too.", show_default=False)
]
ReportA = Annotated[
    Path,
    typer.Argument(callback=check_path, metavar="A", help="Run directory, or a report.json.", show_default=False),
]
ReportB = Annotated[
    Path, typer.Argument(callback=check_path, metavar="B", help="What A is compared with.", show_default=False)
]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a pull request.")]

RATIOS = Ratios((0.9,))
CPU = Names(("cpu",))
BATCHES = Sizes((1, 8))
