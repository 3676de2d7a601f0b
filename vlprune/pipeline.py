"""compress(): the stages in order; and each verb that runs some of them on a run directory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlprune import names
from vlprune.data import CAPTION_SOURCES, IMAGE_SOURCES, accepted, accepted_by
from vlprune.errors import MachineError, Problems, RequestError
from vlprune.models import FAMILIES, MODELS
from vlprune.pruning import get_method
from vlprune.pruning.budgets import checked_ratio
from vlprune.pruning.patterns import Pattern
from vlprune.recipe import OLDER
from vlprune.report.manifest import write_manifest
from vlprune.run import Run
from vlprune.runtime import operators
from vlprune.runtime.session import check_provider
from vlprune.structured import STRUCTURED
from vlprune.structured.plan import PATTERN


if TYPE_CHECKING:
    from vlprune.stages import Stages

__all__ = ["bench", "compress", "export", "finetune", "prune", "unpack", "validate"]

CALIBRATION_IMAGES = 1024


def compress(
    model: str,
    *,
    output: Path | str,
    ratios: list[float],
    method: str = "multiflow",
    pattern: str = "unstructured",
    permute: bool = False,
    round_widths: bool = True,
    mope: dict[str, Any] | None = None,
    family: str | None = None,
    calibration: str | None = None,
    calibration_samples: int | None = None,
    data: dict[str, str] | None = None,
    tasks: list[str] | None = None,
    finetune: str = "full",
    max_steps: int | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    distill: list[float] | None = None,
    image_size: int | None = None,
    export: str | None = None,
    providers: list[str] | None = None,
    bench_batches: list[int] | None = None,
    samples: int | None = None,
    precision: list[str] | None = None,
    fuse: bool | None = None,
    pack: str = "none",
    values: str = "fp32",
    target: str = "auto",
    pack_threshold: float | None = None,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    skip_broken: bool = False,
    resume: bool = False,
    finetune_seed: int | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Prune a model once, fine-tune it per task, export to ONNX, validate, report.

    Args:
        model: alias, hub id, folder or `.pth` file.
        output: run directory.
        ratios: fractions of the prunable weights to remove, in (0, 1).
        method: a name of `vlprune.pruning.METHODS` (masks) or `vlprune.structured.STRUCTURED` (whole units go).
        pattern: of masks: "unstructured", "n:m" or "rxc".
        permute: n:m patterns: reorder hidden units and dimensions of heads first, so that more of the weights is kept;
            the model computes the same.
        round_widths: structured methods leave widths that are multiples of 8.
        mope: what mope measures: "stage" ("pretraining": the model as given; "task": fine-tuned for each task) and
            numbers of `vlprune.training.mope.MopeOptions`; None = the defaults.
        family: of a `.pth` file.
        calibration: images for the one calibration pass, with captions unless the model reads no text; the embedded
            scenes for embedded models only.
        calibration_samples: images of the pass, default 1024.
        data: task -> data set; the embedded scenes for embedded models only.
        tasks: which to run; None = those with data.
        finetune: "none", "heads" or "full".
        max_steps: of fine-tuning.
        epochs: of fine-tuning.
        lr: peak learning rate of fine-tuning.
        batch_size: of fine-tuning; a smaller one than 32 also holds for calibration and evaluation.
        gradient_checkpointing: fine-tuning keeps less in memory, and computes it again.
        compile: fine-tuning compiles the layers.
        distill: weights of similarity, feature and hidden losses, by which models pruned by a structured method are
            fine-tuned for retrieval to resemble the dense one (`vlprune.training.distill`); [] = no distillation;
            None = what belongs to the method: 1, 1000, 1 for mope, none for the others.
        image_size: pixels; position embeddings are interpolated.
        export: "onnx" or None.
        providers: ONNX Runtime providers to validate and time on.
        bench_batches: batch sizes to time.
        samples: test samples per task at most.
        precision: of the ONNX graphs: "fp16", "int8-static", "int8-dynamic" beside "fp32", which is always written.
        fuse: write graphs, too, whose nodes are joined into ONNX Runtime's larger ones, and those of fp16 so; None =
            where they are measured on CUDA.
        pack: "sparse" = write packed graphs of the pruned variants, too, whose Linears skip the zeros (CPU only).
        values: weights in packed graphs: "fp32" exact, "fp16" rounded and half the size.
        target: instruction set that decides which layers are packed: "auto" = this machine's, "avx512", "avx2",
            "portable".
        pack_threshold: share of zeros from which a layer is packed, None = by the target.
        device: "auto", "cpu" or "cuda", for PyTorch.
        threads: of PyTorch and ONNX Runtime on the CPU.
        seed: of everything random.
        skip_broken: leave broken records out and count them.
        resume: keep the finished stages of a killed run.
        finetune_seed: of the fine-tuning, None = `seed`.
        dry_run: stop before anything of this machine is looked at: no file, no provider, no device.

    Returns:
        dict[str, Any]: report.json; the recipe with all its defaults where nothing was run.
    """
    problems = Problems()
    recipe: dict[str, Any] = {}
    with problems:
        recipe |= _recipe(
            model, ratios, method, pattern, family, calibration, calibration_samples, data, tasks, image_size, device,
            threads, seed, skip_broken,
        )  # fmt: skip
    tuned = _finetune_recipe(finetune, max_steps, epochs, lr, gradient_checkpointing, compile)
    recipe |= {
        "finetune": tuned | ({} if finetune_seed is None else {"seed": finetune_seed}),
        "batch_size": batch_size,
        "export": export,
        "providers": providers or ["cpu"],
        "bench_batches": bench_batches or [1, 8],
        "samples": samples,
    }
    with problems:
        recipe |= _structured_recipe(method, round_widths, mope, distill)
        _check_compile(recipe)
    with problems:
        recipe |= _permute_recipe(method, pattern, permute)
    with problems:
        recipe |= {"precision": _precisions(precision)}
        if len(recipe["precision"]) > 1 and not export:
            raise RequestError(f"--precision {','.join(precision or [])} is of ONNX graphs: add --export onnx")
    recipe |= {"fuse": "cuda" in recipe["providers"] if fuse is None else fuse}
    with problems:
        recipe |= _pack_recipe(pack, values, target, pack_threshold)
        _check_packing(method, pack)
    with problems:
        if pack != "none" and not export:
            raise RequestError(f"--pack {pack} packs ONNX graphs: add --export onnx")
    with problems:
        if fuse and not export:
            raise RequestError("--fuse joins nodes of ONNX graphs: add --export onnx")
    problems.settle()
    if dry_run:
        return recipe
    for provider in recipe["providers"]:
        check_provider(provider)
    stages = _start(Path(output), recipe, resume)
    _prune(stages)
    _train_and_score(stages)
    if export:
        _export(stages)
        _validate(stages)
        _bench(stages)
    _samples(stages)
    return stages.report()


def prune(
    model: str,
    *,
    output: Path | str,
    ratios: list[float],
    method: str = "multiflow",
    pattern: str = "unstructured",
    permute: bool = False,
    round_widths: bool = True,
    mope: dict[str, Any] | None = None,
    family: str | None = None,
    calibration: str | None = None,
    calibration_samples: int | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    skip_broken: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """Calibrate once and write the masks of every ratio; the first stage of `compress`, same arguments.

    Args:
        model: see `compress`.
        output: see `compress`.
        ratios: see `compress`.
        method: see `compress`.
        pattern: see `compress`.
        permute: see `compress`.
        round_widths: see `compress`.
        mope: see `compress`.
        family: see `compress`.
        calibration: see `compress`.
        calibration_samples: see `compress`.
        batch_size: see `compress`.
        image_size: see `compress`.
        device: see `compress`.
        threads: see `compress`.
        seed: see `compress`.
        skip_broken: see `compress`.
        resume: see `compress`.

    Returns:
        dict[str, Any]: report.json.
    """
    recipe = _recipe(
        model, ratios, method, pattern, family, calibration, calibration_samples, None, None, image_size, device,
        threads, seed, skip_broken, needs_data=False,
    )  # fmt: skip
    recipe |= {
        "finetune": _finetune_recipe("none", None, None, None),
        "batch_size": batch_size,
        "export": None,
        "providers": ["cpu"],
        "bench_batches": [1, 8],
        "samples": None,
        **OLDER,
        **_structured_recipe(method, round_widths, mope, None),
        **_permute_recipe(method, pattern, permute),
    }
    if "training" in _needs(method) or recipe["mope"].get("stage") == "task":
        raise RequestError(f"{method} prunes for each task here, while it is trained: use vlprune compress")
    stages = _start(Path(output), recipe, resume)
    _prune(stages)
    return stages.report()


def finetune(
    run: Path | str,
    *,
    finetune: str = "full",
    data: dict[str, str] | None = None,
    tasks: list[str] | None = None,
    max_steps: int | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    device: str = "auto",
    threads: int | None = None,
    seed: int | None = None,
    skip_broken: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """Fine-tune the dense and the pruned models of a run per task, and score all variants in PyTorch.

    Args:
        run: run directory with masks.
        finetune: see `compress`.
        data: added to the run's data.
        tasks: see `compress`.
        max_steps: see `compress`.
        epochs: see `compress`.
        lr: see `compress`.
        batch_size: see `compress`.
        gradient_checkpointing: see `compress`.
        compile: see `compress`.
        device: see `compress`.
        threads: see `compress`.
        seed: of the fine-tuning, None = the run's.
        skip_broken: see `compress`.
        resume: see `compress`.

    Returns:
        dict[str, Any]: report.json.
    """
    chosen = _finetune_recipe(finetune, max_steps, epochs, lr, gradient_checkpointing, compile)
    chosen |= {} if seed is None else {"seed": seed}
    changes: dict[str, Any] = {"finetune": chosen, "batch_size": batch_size}
    changes |= {"device": device, "threads": threads, "skip_broken": skip_broken}
    _check_device(device)
    stages = _reopen(run, data, tasks, resume, changes)
    _train_and_score(stages)
    _samples(stages)
    return stages.report()


def export(
    run: Path | str,
    *,
    data: dict[str, str] | None = None,
    tasks: list[str] | None = None,
    precision: list[str] | None = None,
    fuse: bool | None = None,
    pack: str = "none",
    values: str = "fp32",
    target: str = "auto",
    pack_threshold: float | None = None,
    threads: int | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Write the ONNX graphs of a run's fine-tuned variants (of all where none is), each compared with PyTorch.

    Args:
        run: run directory.
        data: added to the run's data; real inputs for the comparison.
        tasks: see `compress`.
        precision: see `compress`.
        fuse: see `compress`; None = no.
        pack: see `compress`.
        values: see `compress`.
        target: see `compress`.
        pack_threshold: see `compress`.
        threads: see `compress`.
        resume: see `compress`.

    Returns:
        dict[str, Any]: report.json.
    """
    changes: dict[str, Any] = {"threads": threads, "export": "onnx", "precision": _precisions(precision)}
    changes["fuse"] = bool(fuse)
    changes |= _pack_recipe(pack, values, target, pack_threshold)
    stages = _reopen(run, data, tasks, resume, changes)
    _export(stages)
    return stages.report()


def unpack(path: Path | str) -> list[dict[str, Any]]:
    """Write plain ONNX graphs for packed ones.

    Args:
        path: a packed ONNX file, a folder of them, or a run directory.

    Returns:
        list[dict[str, Any]]: see `vlprune.exporters.unpack_files`.
    """
    from vlprune.exporters import unpack_files

    rows = unpack_files(Path(path))
    if (Path(path) / "recipe.yaml").is_file():
        write_manifest(Path(path), Run.open(Path(path), True).recipe["seed"])
    return rows


def validate(
    run: Path | str,
    *,
    data: dict[str, str] | None = None,
    tasks: list[str] | None = None,
    providers: list[str] | None = None,
    bench_batches: list[int] | None = None,
    precision: list[str] | None = None,
    samples: int | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
    skip_broken: bool = False,
    resume: bool = False,
) -> dict[str, Any]:
    """Score and time the exported graphs of a run in ONNX Runtime.

    Args:
        run: run directory with ONNX graphs.
        data: added to the run's data.
        tasks: see `compress`.
        providers: see `compress`.
        bench_batches: see `compress`.
        precision: see `compress`; None = all that the run's graphs were last exported in.
        samples: see `compress`.
        batch_size: samples at once.
        threads: see `compress`.
        skip_broken: see `compress`.
        resume: see `compress`.

    Returns:
        dict[str, Any]: report.json.
    """
    for provider in providers or ["cpu"]:
        check_provider(provider)
    changes: dict[str, Any] = {"providers": providers or ["cpu"], "bench_batches": bench_batches or [1, 8]}
    changes |= {"threads": threads, "skip_broken": skip_broken}
    if samples is not None:
        changes["samples"] = samples
    if precision is not None:
        changes["precision"] = _precisions(precision)
    stages = _reopen(run, data, tasks, resume, changes)
    stages.batch = batch_size or stages.batch
    _validate(stages)
    _samples(stages)
    _bench(stages)
    return stages.report()


def bench(
    run: Path | str,
    *,
    tasks: list[str] | None = None,
    providers: list[str] | None = None,
    bench_batches: list[int] | None = None,
    seconds: float | None = None,
    cuda_graph: bool = False,
    threads: int | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Time the exported graphs of a run in ONNX Runtime, as `validate` does, without scoring them; needs no data.

    Args:
        run: run directory with ONNX graphs.
        tasks: see `compress`.
        providers: see `compress`.
        bench_batches: see `compress`.
        seconds: to time each graph and batch size for, None = 2.
        cuda_graph: on a GPU, record the kernels of a graph once, and start them all at once.
        threads: see `compress`.
        resume: see `compress`.

    Returns:
        dict[str, Any]: report.json.

    Raises:
        RequestError: the time is not positive, or the run has no graphs.
    """
    if seconds is not None and not 0 < seconds < math.inf:
        raise RequestError(f"{seconds} seconds are no time to measure for: give a positive number")
    if cuda_graph and "cpu" in (providers or ["cpu"]):
        raise RequestError("--cuda-graph records what a GPU does: add --provider cuda or tensorrt, without cpu")
    for provider in providers or ["cpu"]:
        check_provider(provider)
    changes: dict[str, Any] = {"providers": providers or ["cpu"], "bench_batches": bench_batches or [1, 8]}
    stages = _reopen(run, None, tasks, resume, {**changes, "threads": threads}, needs_data=False)
    stages.seconds, stages.cuda_graph = seconds, cuda_graph
    _bench(stages)
    return stages.report()


# --- the stages, in order ---------------------------------------------------------------------------------------------


def _prune(stages: Stages) -> None:
    stages.prune()
    if stages.recipe["finetune"]["mode"] == "none" and not stages.model.source.random_weights:
        for variant in stages.variants():
            if variant.ratio is not None:
                stages.keep(variant)


def _train_and_score(stages: Stages) -> None:
    if stages.model.source.random_weights:
        return  # nothing was learned, so there is nothing to recover and no accuracy to show
    for task in stages.tasks:
        for variant in stages.variants():
            if variant.finetuned:
                stages.finetune(variant, task)
            else:
                stages.find(variant, task)
            stages.score(variant, task)


def _export(stages: Stages) -> None:
    for task in stages.tasks:
        for variant in stages.shipped():
            stages.export(variant, task)
        for variant in stages.shipped():
            if stages.packs and variant.ratio is not None:
                stages.pack(variant, task)
            for form in stages.forms:
                stages.convert(variant, task, form)


def _validate(stages: Stages) -> None:
    stages.check_forms()
    if stages.model.source.random_weights:
        return
    for variant, task, provider, form in stages.served():
        stages.validate(variant, task, provider, form)


def _samples(stages: Stages) -> None:
    for task in stages.tasks:
        stages.samples(task)


def _bench(stages: Stages) -> None:
    stages.check_forms()
    for variant, task, provider, form in stages.served():
        if (variant, form) != (stages.dense, "plain"):  # which the others are timed against
            stages.bench(variant, task, provider, form)


# --- recipes ----------------------------------------------------------------------------------------------------------


def _recipe(
    model: str,
    ratios: list[float],
    method: str,
    pattern: str,
    family: str | None,
    calibration: str | None,
    calibration_samples: int | None,
    data: dict[str, str] | None,
    tasks: list[str] | None,
    image_size: int | None,
    device: str,
    threads: int | None,
    seed: int,
    skip_broken: bool,
    needs_data: bool = True,
) -> dict[str, Any]:
    """Resolve and check what every run starts from, before anything heavy happens."""
    info, problems = MODELS.get(model), Problems()
    data = dict(data or {})
    with problems:
        _check_choices(ratios, method, pattern, [*data, *(tasks or [])])
    if info and info.kind == "embedded":
        calibration = calibration or "scenes"
        offered = FAMILIES[names.check("family", family or info.family, FAMILIES)].tasks
        data = dict.fromkeys(tasks or offered, "scenes") | data
    with problems:
        _check_sources(model, calibration, data)
    with problems:
        if method in names.METHODS and _needs(method) & {"input_norm", "captions"} and not calibration:
            what = f"{CAPTION_SOURCES}; for a model that reads no text, {IMAGE_SOURCES}"
            if info:
                what = IMAGE_SOURCES if info.family == "vit" else CAPTION_SOURCES
            raise RequestError(f"{model} needs --calibration for {method}: {what}")
    with problems:
        if needs_data and not data:
            raise RequestError(f"{model} needs --data TASK=PATH: {accepted_by(info.tasks if info else names.TASKS)}")
    for task in tasks or []:
        with problems:
            if needs_data and task in names.TASKS and task not in data:
                raise RequestError(f"--tasks names {task} but there is no --data {task}=PATH: give {accepted(task)}")
    problems.settle()
    return {
        "model": model,
        "family": family,
        "method": method,
        "ratios": [float(ratio) for ratio in ratios],
        "pattern": pattern,
        "calibration": calibration,
        "calibration_samples": calibration_samples or CALIBRATION_IMAGES,
        "data": data,
        "tasks": tasks,
        "image_size": image_size,
        "device": device,
        "threads": threads,
        "seed": seed,
        "skip_broken": skip_broken,
    }


def _needs(method: str) -> frozenset[str]:
    return STRUCTURED[method].needs if method in STRUCTURED else get_method(method).needs


def _structured_recipe(
    method: str, round_widths: bool, mope: dict[str, Any] | None, distill: list[float] | None
) -> dict[str, Any]:
    """Check the options of structured methods."""
    if method not in STRUCTURED:
        if not round_widths or distill:
            raise RequestError(f"{method} makes masks: rounded widths and distillation are for structured methods")
    elif distill and (len(distill) != 3 or not all(0 <= weight < math.inf for weight in distill)):
        raise RequestError(f"distill {distill}: give three weights of 0 or more (similarity, feature, hidden loss)")
    if mope and method != "mope":
        raise RequestError(f"{', '.join(mope)} of mope cannot be chosen for {method}")
    found: dict[str, Any] = {"round_widths": round_widths, "mope": {}, "distill": distill or None}
    if method in STRUCTURED:
        found["pattern"] = PATTERN
    if method == "mope":
        found["mope"] = {"stage": "pretraining", "pairs": 100, "groups": 8} | (mope or {})
        found["distill"] = [1.0, 1000.0, 1.0] if distill is None else found["distill"]
        if found["mope"]["stage"] not in ("pretraining", "task"):
            raise RequestError(f"mope has no stage {found['mope']['stage']!r}: choose pretraining or task")
    return found


def _check_packing(method: str, pack: str) -> None:
    if method in STRUCTURED and pack != "none":
        raise RequestError(f"--pack {pack} packs zeros, and {method} leaves none: its graphs are small as they are")


def _finetune_recipe(
    mode: str,
    max_steps: int | None,
    epochs: int | None,
    lr: float | None,
    gradient_checkpointing: bool = False,
    compile: bool = False,
) -> dict[str, Any]:
    chosen: dict[str, Any] = {"mode": mode, "max_steps": max_steps, "epochs": epochs, "lr": lr}
    how = {"gradient_checkpointing": gradient_checkpointing, "compile": compile}
    return chosen | {name: True for name, wanted in how.items() if wanted}  # older recipes tell of neither


def _permute_recipe(method: str, pattern: str, permute: bool) -> dict[str, Any]:
    if permute and (method in STRUCTURED or Pattern.parse(pattern).kept is None):
        raise RequestError("--permute is for patterns that keep n of m neighbours: add --pattern 2:4 --ratio 0.5")
    return {"permute": permute}


def _precisions(chosen: list[str] | None) -> list[str]:
    """Put precisions in their order; fp32 is what the others are made from."""
    for precision in chosen or []:
        names.check("precision", precision, names.PRECISIONS)
    return [precision for precision in names.PRECISIONS if precision == "fp32" or precision in (chosen or [])]


def _pack_recipe(pack: str, values: str, target: str, threshold: float | None) -> dict[str, Any]:
    """Check the options of packing."""
    names.check("packing", pack, names.PACKINGS)
    names.check("kind of values", values, names.PACKED_VALUES)
    names.check("target", target, names.TARGETS)
    if threshold is not None and not 0 <= threshold <= 1:
        raise RequestError(f"--pack-threshold {threshold} is no share of zeros: give a number from 0 to 1")
    if pack == "none" and (values, target, threshold) != ("fp32", "auto", None):
        raise RequestError("--values, --target and --pack-threshold are for packed graphs: add --pack sparse")
    return {"pack": pack, "values": values, "target": target, "pack_threshold": threshold}


def _check_operators(recipe: dict[str, Any]) -> None:
    """Find out before any work whether packed graphs can be made and run here."""
    if recipe["pack"] != "none":
        import onnxruntime

        operators.register(onnxruntime.SessionOptions())


def _check_compile(recipe: dict[str, Any]) -> None:
    if recipe["finetune"].get("compile") and recipe["distill"]:
        raise RequestError("distillation reads inside the layers, which --compile hides: leave it or --distill out")


def _check_choices(ratios: list[float], method: str, pattern: str, tasks: list[str]) -> None:
    if not ratios or len({checked_ratio(ratio) for ratio in ratios}) < len(ratios):
        raise RequestError(f"ratios {ratios} must name at least one, and none twice")
    names.check("method", method, names.METHODS)
    if method in STRUCTURED and pattern not in ("unstructured", PATTERN):
        raise RequestError(f"pattern {pattern} is for masks, and {method} removes whole units: leave --pattern out")
    for ratio in ratios:
        if method not in STRUCTURED:
            Pattern.parse(pattern).check_ratio(ratio)
    for task in tasks:
        names.check("task", task, names.TASKS)


def _check_sources(model: str, calibration: str | None, data: dict[str, str]) -> None:
    """Keep the embedded scenes away from models that were trained on photographs."""
    info = MODELS.get(model)
    drawn = info is not None and info.kind in ("embedded", "random")
    if "scenes" in (calibration, *data.values()) and not drawn:
        raise RequestError(f"the embedded scenes are no data for {model}: give photographs with captions or questions")


def _check_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise MachineError("--device cuda: PyTorch sees no CUDA device here; use --device cpu, or install a CUDA build")


def _set_up(run: Run) -> Stages:
    """Set threads; let samples that do not fit a small batch not meet in memory elsewhere either."""
    import torch

    from vlprune.stages import Stages  # brings all of transformers and Optimum: a wrong request is answered before

    if run.recipe["threads"]:
        torch.set_num_threads(run.recipe["threads"])
    stages = Stages(run)
    stages.batch = min(stages.batch, run.recipe["batch_size"] or stages.batch)
    return stages


def _start(folder: Path, recipe: dict[str, Any], resume: bool) -> Stages:
    """Begin a run once all that can be refused has been looked at: an earlier run in the folder is lost then."""
    _check_device(recipe["device"])
    _check_operators(recipe)
    stages = _set_up(Run.start(folder, recipe, resume))
    stages.settle(prunes=True)
    stages.run.begin()
    return stages


def _reopen(
    folder: Path | str,
    data: dict[str, str] | None,
    tasks: list[str] | None,
    resume: bool,
    changes: dict[str, Any],
    needs_data: bool = True,
) -> Stages:
    """Open a run for one of its later stages; what the verb was told becomes part of its recipe."""
    run = Run.open(Path(folder), resume)
    run.check_recipe()
    recipe = run.recipe
    recipe.update({key: value for key, value in changes.items() if value is not None or key not in recipe})
    if "pack" in changes:
        recipe["pack_threshold"] = changes["pack_threshold"]  # None is a choice, too
    if "export" in changes or "bench_batches" in changes:  # the verbs that make and run packed graphs
        _check_operators(recipe)
    recipe["data"] = recipe["data"] | (data or {})
    recipe["tasks"] = tasks or recipe["tasks"]
    if needs_data and not recipe["data"]:
        raise RequestError(f"{folder} was pruned without data: give --data TASK=PATH; {accepted_by(names.TASKS)}")
    chosen = [*recipe["data"], *(recipe["tasks"] or [])]
    _check_packing(recipe["method"], recipe["pack"])
    _check_compile(recipe)
    _check_choices(recipe["ratios"], recipe["method"], recipe["pattern"], chosen)
    _check_sources(recipe["model"], recipe["calibration"], recipe["data"])
    stages = _set_up(run)
    stages.settle(prunes=False, data=needs_data)
    run.write_recipe()
    return stages
