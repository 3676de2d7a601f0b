"""What pruning, exported graphs and fine-tuning gain on an NVIDIA GPU; every part checks what it measures.

python benchmarks/gpu.py                          # all parts; writes docs/results/gpu.json and gpu.md after each
python benchmarks/gpu.py --resume                 # the parts that are not measured yet
python benchmarks/gpu.py --only prune,finetune    # the parts whose names begin so; --list names them
python benchmarks/gpu.py --only throughput/blip-base-random/structured-0.5 --batches 32
python benchmarks/gpu.py --document               # write gpu.md again from gpu.json; needs no GPU
python benchmarks/gpu.py --quick                  # a tiny model on the CPU: does it run; writes no document

Pruning and fine-tuning need only a CUDA build of PyTorch; what onnxruntime-gpu or TensorRT would run is left out, with
the reason, where they do not start. Models have random weights of BLIP-base's, CLIP ViT-B/16's and ViT-L/14's shapes:
times and memory mean something, accuracy does not. Exported graphs are kept in --work until the model is done. Exit
code 1 when a check fails, 3 when there is no GPU.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlprune import exporters, load
from vlprune.data.scenes import scenes_captions
from vlprune.errors import MachineError, VlpruneError
from vlprune.exporters import ranges
from vlprune.exporters.compare import Difference
from vlprune.files import atomic_path, read_json, write_json
from vlprune.machine import require_device, require_provider, torch_cuda
from vlprune.models.family import apply_masks
from vlprune.pruning import InputNorms, Layer, prune_layers, prune_layers_at
from vlprune.pruning.masks import pack
from vlprune.pruning.statistics import load_statistics, save_statistics
from vlprune.report.environment import environment, versions
from vlprune.runtime.device import Fixed, bind, gpu_state, states
from vlprune.runtime.session import OnnxGraph, check_provider, session
from vlprune.runtime.timing import compare, feeds_for, measure
from vlprune.structured import STRUCTURED, cut, plan_by_scores
from vlprune.training.finetune import FinetuneOptions, finetune


ROOT = Path(__file__).parents[1]
MODELS = ("blip-base-random", "clip-base-random", "clip-large-random")
VARIANTS = ("dense", "structured-0.5", "unstructured-0.9", "2of4")  # the first is what the others are held against
FORMS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32 fused": {"precision": "fp32", "fuse": True},
    "fp16": {"precision": "fp16", "fuse": False},
    "fp16 fused": {"precision": "fp16", "fuse": True},
}
GRAPHS = ("image_encoder", "text_encoder")
TASK = "retrieval"  # whose graphs hold both encoders
RATIOS = [0.63, 0.75, 0.9]
METHODS = ("multiflow", "omp", "lamp")  # the first is timed
TRAININGS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "bf16, gradient checkpointing": {"precision": "bf16", "gradient_checkpointing": True},
    "bf16, compiled": {"precision": "bf16", "compile": True},
}
# Targets.
STRUCTURED_GAIN, FUSED_GAIN, COSINE, COLLECTION, MEMORY = 1.6, 3.0, 0.999, 1.15, 1.3
TARGET_BATCH = 32
COSINES = {"fp32": 0.9999, "fp16": COSINE}  # CUDA computes fp32 in TF32, which rounds

Part = dict[str, Any]


# --- pruning ----------------------------------------------------------------------------------------------------------


def prune(name: str, args: argparse.Namespace) -> Part:
    """Time a calibration pass against the plain forward, and the masks of three ratios; compare them with the CPU's."""
    model = load(name).to(args.device).eval()
    batches = calibration(model, args)
    prunable = model.layers()

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model.calibrate(batch, lambda **masks: nullcontext())

    def collect(batches: Sequence[Any] = batches) -> InputNorms:
        norms = InputNorms({layer.name: (layer.modules, layer.tokens) for layer in prunable})
        with norms.collect():
            for batch in batches:
                model.calibrate(batch, norms.valid)
        return norms

    forward()
    norms = collect().result()
    times: dict[str, list[float]] = {"forward": [], "collect": [], "prune": []}
    for _ in range(args.rounds):
        times["forward"].append(seconds(forward, args))
        times["collect"].append(seconds(collect, args))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "statistics.safetensors"
        save_statistics(file, norms, {"model": name})
        norms = load_statistics(file)[0]
    ready = [Layer(x.name, x.modality, x.weight.detach(), norms[x.name].to(args.device)) for x in prunable]
    weights = sum(layer.weight.nbytes for layer in ready)

    def masks() -> None:
        for _, pruned in prune_layers_at(ready, METHODS[0], RATIOS):
            del pruned

    masks()
    peak = None
    for _ in range(args.rounds):
        before = reset_peak(args)
        times["prune"].append(seconds(masks, args))
        if args.device == "cuda":
            peak = torch.cuda.max_memory_allocated() - before
    here = {method: packed(ready, method) for method in METHODS}
    first = collect(batches[:1]).result()
    model.to("cpu")
    there = collect([{key: value.cpu() for key, value in batches[0].items()}]).result()
    apart = max(float(((first[x] - there[x]).abs() / there[x].clamp_min(1e-6)).max()) for x in first)
    ready = [Layer(x.name, x.modality, x.weight.detach(), norms[x.name]) for x in prunable]
    checks = {f"{m}: masks equal to the CPU's bit for bit": same(here[m], packed(ready, m)) for m in METHODS}
    checks[f"norms of one batch are the CPU's to {apart:.1e}, at most 1e-3"] = apart <= 1e-3
    medians = {f"{what}_s": statistics.median(found) for what, found in times.items()}
    row = {
        "images": sum(len(batch["pixel_values"]) for batch in batches),
        "layers": len(ready),
        "weights": weights // 4,
        **medians,
        "collection": medians["collect_s"] / medians["forward_s"],
        "memory": None if peak is None else 1 + peak / weights,
        "seconds": times,
    }
    return {"rows": [row], "checks": checks}


def calibration(model: Any, args: argparse.Namespace) -> list[dict[str, torch.Tensor]]:
    """Batches of drawn scenes on the device."""
    size = args.calibration_batch
    data = scenes_captions("train", size * args.calibration_batches)
    texts = [captions[0] for captions in data.captions]
    return [
        model.caption_batch(list(data.images[i : i + size]), texts[i : i + size], range(i, i + size))
        for i in range(0, len(texts), size)
    ]


def packed(layers: Sequence[Layer], method: str) -> dict[tuple[float, str], np.ndarray]:
    """The bits of the masks at every ratio."""
    found = {}
    for ratio, pruned in prune_layers_at(layers, method, RATIOS):
        found |= {(ratio, name): pack(mask) for name, mask in pruned.masks.items()}
    return found


def same(one: Mapping[Any, np.ndarray], other: Mapping[Any, np.ndarray]) -> bool:
    """Whether masks are equal."""
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def seconds(function: Callable[[], object], args: argparse.Namespace) -> float:
    """Time a function, to the end of what it started on the GPU."""
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def reset_peak(args: argparse.Namespace) -> int:
    """Measure peak CUDA memory anew; bytes that are in use now."""
    if args.device != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


# --- exported graphs --------------------------------------------------------------------------------------------------


def variant_of(name: str, variant: str) -> Any:
    """Make a model that is dense, cut, or masked."""
    model = load(name)
    if variant == "structured-0.5":
        cut(model, plan_by_scores(STRUCTURED["magnitude-structured"], model.groups(), {}, 0.5))
    elif variant != "dense":
        layers = [Layer(x.name, x.modality, x.weight.detach()) for x in model.layers()]
        two_of_four = variant == "2of4"
        pruned = prune_layers(layers, "local-magnitude", 0.5 if two_of_four else 0.9, "2:4" if two_of_four else
                              "unstructured")  # fmt: skip
        apply_masks(model.layers(), pruned.masks, pruned.weights)
    return model.for_task(TASK)


def graphs(name: str, variant: str, args: argparse.Namespace) -> Path:
    """Export a variant in all forms, unless it is there; the folder of the forms, with real inputs in inputs.npz."""
    home: Path = args.work / name / variant
    if (home / "done.json").is_file():
        return home
    shutil.rmtree(home, ignore_errors=True)
    with atomic_path(home) as folder:
        plain = folder / "fp32"
        plain.mkdir(parents=True)
        model, data = variant_of(name, variant), scenes_captions("test", 16)
        spec = exporters.task_spec(model, TASK)
        rows = {"fp32": exporters.export(model, TASK, spec, plain, data, variant=variant, threads=args.threads)}
        found = ranges.measure(plain, read_json(plain / "task.json"), model.processor, data, args.threads)
        for form, options in FORMS.items():
            if form in args.forms and options:
                (folder / form).mkdir()
                rows[form] = exporters.convert_task(
                    model, plain, folder / form, options["precision"], data, data, found, fuse=options["fuse"],
                    threads=args.threads,
                )  # fmt: skip
        batch = model.caption_batch(list(data.images), [texts[0] for texts in data.captions], range(data.samples))
        inputs = {key: batch[key].numpy() for key in ("pixel_values", "input_ids", "attention_mask")}
        np.savez(folder / "inputs.npz", **inputs)
        write_json(folder / "done.json", rows)
    return home


def cosine(home: Path, form: str, graph: str, args: argparse.Namespace) -> float:
    """Smallest cosine between a form on the GPU and the plain graph on the CPU, over real inputs."""
    sides = [
        OnnxGraph(session(home / folder / f"{graph}.onnx", provider, args.threads), graph)
        for folder, provider in (("fp32", "cpu"), (form, args.provider))
    ]
    with np.load(home / "inputs.npz", allow_pickle=False) as file:
        feeds = {value.name: file[value.name] for value in sides[0].session.get_inputs()}
    difference = Difference()
    expected, got = sides[0](feeds), sides[1](feeds)
    for output, array in expected.items():
        difference.add(array, got[output])
    return difference.cosine_min


def lacking(provider: str) -> str | None:
    """Tell why a provider cannot be measured here."""
    try:
        require_provider(provider)
        check_provider(provider)
    except MachineError as error:
        return str(error)
    return None


def throughput(name: str, variant: str, graph: str, args: argparse.Namespace) -> Part:
    """Time a graph in every form: the dense one against itself in fp32, the others against the dense one alike."""
    if reason := lacking(args.provider):
        return {"skipped": reason}
    homes = {which: graphs(name, which, args) for which in dict.fromkeys(("dense", variant))}
    spec = read_json(homes["dense"] / "fp32" / "task.json")
    exported = {
        form: next(row for row in rows if row["graph"] == graph)
        for form, rows in read_json(homes[variant] / "done.json").items()
    }
    rows: list[dict[str, Any]] = []
    checks = {}
    for form in args.forms:
        against = "fp32" if variant == "dense" else form
        if (variant, form) == ("dense", "fp32"):
            continue
        found = cosine(homes[variant], form, graph, args)
        kind = form.split()[0]
        checks[f"{form}: cosine {found:.6f} to fp32 on the CPU, at least {COSINES[kind]}"] = found >= COSINES[kind]
        files = [homes["dense"] / against / f"{graph}.onnx", homes[variant] / form / f"{graph}.onnx"]
        told = {key: exported[form].get(key) for key in ("bytes", "nonzero_fraction", "fusions", "not_fused")}
        told |= {"kept_fp32": len(exported[form].get("kept_fp32", []))}
        same = {"variant": variant, "graph": graph, "form": form, "against": against, "cosine_min": found, **told}
        first = partial(feeds_for, spec=spec, batch=args.batches[0])
        sides = [bind(file, args.provider, first, args.threads) for file in files]
        nodes = {"dense": sides[0].nodes, "compressed": sides[1].nodes}
        for batch in args.batches:
            row = {**same, "batch": batch, "nodes": nodes}
            try:
                fixed = [Fixed(s.graph, feeds_for(s.graph, spec, batch), args.provider) for s in sides]
                seen = [gpu_state()]
                timed = measure(fixed[0].run, fixed[1].run, batch=batch, seconds=args.seconds)
                seen.append(gpu_state())
                whole = measure(fixed[0].whole, fixed[1].whole, batch=batch, seconds=args.seconds / 2)
            except Exception as error:  # of onnxruntime, most likely memory; other batches may do
                rows.append({**row, "error": " ".join(str(error).split())[:300]})
            else:
                kept = {key: whole[key] for key in ("dense", "compressed", "ratio", "ratio_ci95", "verdict")}
                rows.append({**row, **timed, "end_to_end": kept, **states(*seen)})
            fixed = []
            print(line(rows[-1]), flush=True)
        del sides, fixed
        gc.collect()
    nonzero = exported["fp32"]["nonzero_fraction"]
    wanted = {"2of4": (0.499, 0.501), "unstructured-0.9": (0.099, 0.101)}.get(variant, (0.99, 1.0))
    checks[f"{nonzero:.4f} of the prunable weights are not zero"] = wanted[0] <= nonzero <= wanted[1]
    checks["every batch ran"] = not any("error" in row for row in rows)
    return {"rows": rows, "checks": checks}


def recorded(name: str, args: argparse.Namespace) -> Part:
    """Time the dense and the cut graphs as CUDA graphs, at small batches, where starting kernels takes its time."""
    if reason := lacking(args.provider):
        return {"skipped": reason}
    homes = [graphs(name, variant, args) for variant in VARIANTS[:2]]
    spec, rows = read_json(homes[0] / "fp32" / "task.json"), []
    for graph in GRAPHS:
        for batch in [batch for batch in args.batches if batch <= 8]:
            files = [home / args.forms[-1] / f"{graph}.onnx" for home in homes]
            row = {"variant": VARIANTS[1], "graph": graph, "form": args.forms[-1], "against": args.forms[-1]}
            try:
                timed = compare(
                    files[0], files[1], spec=spec, batch=batch, provider=args.provider, threads=args.threads,
                    seconds=args.seconds, cuda_graph=args.provider == "cuda",
                )  # fmt: skip
                rows.append({**row, "batch": batch, **timed})
            except VlpruneError as error:
                rows.append({**row, "batch": batch, "error": str(error)})
            print(line(rows[-1]), flush=True)
    return {"rows": rows, "checks": {"every graph was recorded": not any("error" in row for row in rows)}}


def tensorrt(name: str, args: argparse.Namespace) -> Part:
    """Time the compressed graphs against the dense one in TensorRT, in fp16, and count the layers it runs sparse."""
    if reason := lacking("tensorrt"):
        return {"skipped": reason}
    rows = []
    for variant in VARIANTS[1:]:
        homes = [graphs(name, which, args) for which in ("dense", variant)]
        spec = read_json(homes[0] / "fp32" / "task.json")
        for graph in GRAPHS:
            row = {"variant": variant, "graph": graph, "form": "fp16", "against": "fp16", "batch": TARGET_BATCH}
            try:
                files = [home / "fp16" / f"{graph}.onnx" for home in homes]
                timed = compare(
                    files[0], files[1], spec=spec, batch=TARGET_BATCH, provider="tensorrt", threads=args.threads,
                    seconds=args.seconds,
                )  # fmt: skip
                rows.append({**row, **timed})
            except VlpruneError as error:
                rows.append({**row, "error": str(error)})
            print(line(rows[-1]), flush=True)
    layers = [row["sparse_layers"]["eligible"] for row in rows if row["variant"] == "2of4" and "sparse_layers" in row]
    checks = {"every engine was built": not any("error" in row for row in rows)}
    return {"rows": rows, "checks": checks | {"TensorRT sees the pattern 2:4": bool(layers) and min(layers) > 0}}


def line(row: Mapping[str, Any]) -> str:
    """One measurement as text."""
    what = f"{row['variant']:17s} {row['graph']:14s} {row['form']:10s} against {row['against']:10s}"
    what += f" batch {row['batch']:<4d}"
    if "error" in row:
        return f"{what} {row['error']}"
    return f"{what} {row['compressed']['p50_ms']:9.3f} ms, {ratio(row)} {row['verdict']}"


# --- fine-tuning ------------------------------------------------------------------------------------------------------


def training(name: str, args: argparse.Namespace) -> Part:
    """Time steps of fine-tuning for retrieval with half of the weights masked."""
    model = load(name).for_task(TASK)
    layers = [Layer(x.name, x.modality, x.weight.detach()) for x in model.layers()]
    masks = prune_layers(layers, "local-magnitude", 0.5).masks
    data = scenes_captions("train", max(64, args.training_batch))
    basis = FinetuneOptions(lr=1e-5, batch_size=args.training_batch, device=args.device)
    rows, checks = [], {}
    for how in args.trainings:
        row: dict[str, Any] = {"how": how, "batch": args.training_batch}
        try:
            taken = []
            for steps in args.steps:  # two trainings: what they differ in has no start in it
                tuned = copy.deepcopy(model)
                before = reset_peak(args)
                info = finetune(tuned, TASK, data, masks, replace(basis, max_steps=steps, **TRAININGS[how]))
                taken.append(info["seconds"])
                peak = torch.cuda.max_memory_allocated() - before if args.device == "cuda" else None
                zero = not any(bool(x.weight.detach().cpu()[~masks[x.name]].any()) for x in tuned.layers())
                del tuned
            step = (taken[1] - taken[0]) / (args.steps[1] - args.steps[0])
            row |= {"steps_per_s": 1 / max(step, 1e-9), "loss": info["loss"], "peak_cuda_bytes": peak}
            checks[f"{how}: masked weights are zero"] = zero
            checks[f"{how}: the loss is near that of fp32"] = math.isclose(
                info["loss"], rows[0].get("loss", math.nan) if rows else info["loss"], rel_tol=0.05, abs_tol=0.02
            )
        except VlpruneError as error:
            row["error"] = str(error)
            checks[f"{how}: {error}"] = False
        rows.append(row)
        print(row, flush=True)
    return {"rows": rows, "checks": checks}


# --- parts ------------------------------------------------------------------------------------------------------------


def parts_of(args: argparse.Namespace) -> dict[str, Callable[[], Part]]:
    """All parts in the order of their worth, should the machine be taken away."""
    found: dict[str, Callable[[], Part]] = {f"prune/{name}": partial(prune, name, args) for name in args.models}
    found |= {f"finetune/{name}": partial(training, name, args) for name in args.models}  # both need only PyTorch
    for name in args.models:
        for variant in VARIANTS:
            for graph in GRAPHS:
                key = f"throughput/{name}/{variant}/{graph}"
                found[key] = partial(throughput, name, variant, graph, args)
        found[f"cuda-graph/{name}"] = partial(recorded, name, args)
        found[f"tensorrt/{name}"] = partial(tensorrt, name, args)
    return found


def run(args: argparse.Namespace, parts: dict[str, Part]) -> bool:
    """Measure what is asked for, writing after each part; whether all checks passed."""
    command = " ".join(["python benchmarks/gpu.py", *sys.argv[1:]])
    planned = parts_of(args)
    chosen = [name for name in planned if not args.only or name.startswith(tuple(args.only))]
    if not chosen:
        raise MachineError(f"no part begins with {', '.join(args.only)}: --list names them")
    sound = True
    for name in chosen:
        if args.resume and parts.get(name, {}).get("checks") and all(parts[name]["checks"].values()):
            continue
        print(f"--- {name}", flush=True)
        start = time.perf_counter()
        try:
            part = planned[name]()
        except Exception as error:  # the other parts may do
            part = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
            print(part["error"], flush=True)
        if "skipped" in part:
            print(f"left out: {part['skipped']}", flush=True)
            if "rows" in parts.get(name, {}):
                continue  # what another machine measured stays
        where = {"command": command, "environment": environment(args.threads), "versions": versions()}
        parts[name] = {**part, **where, "cuda": torch_cuda(), "took_s": round(time.perf_counter() - start, 1)}
        failed = [what for what, passed in part.get("checks", {}).items() if not passed]
        for what in failed:
            print(f"CHECK FAILED: {what}", flush=True)
        sound &= not failed and "error" not in part
        write(args, parts)
        if not args.keep and all(key in parts for key in planned if f"/{name.split('/')[1]}" in key):
            shutil.rmtree(args.work / name.split("/")[1], ignore_errors=True)
        gc.collect()
        reset_peak(args)
    return sound


def write(args: argparse.Namespace, parts: dict[str, Part]) -> None:
    """Write the figures and the document."""
    if args.json:
        write_json(args.json, parts)
    if args.results:
        with atomic_path(args.results) as temporary:
            temporary.write_text(document(parts, list(parts_of(args))), encoding="utf-8")


# --- the document -----------------------------------------------------------------------------------------------------


def table(columns: Sequence[str], body: Sequence[Sequence[str]], text: int) -> str:
    """A Markdown table whose first columns are text."""
    rule = ["---" if index < text else "---:" for index in range(len(columns))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, rule, *body])


def ratio(row: Mapping[str, Any]) -> str:
    """A ratio with its interval."""
    low, high = row["ratio_ci95"]
    return f"{row['ratio']:.2f} [{low:.2f}, {high:.2f}]"


def hardware(part: Part) -> str:
    """What a part was measured on."""
    machine, found = part["environment"], part["versions"]
    packages = [f"{name} {found[name]}" for name in ("torch", "transformers", "onnxruntime-gpu") if name in found]
    card = f"{machine['gpu']}, driver {machine['driver']}" if machine["gpu"] else "no GPU"
    return (
        f"{card}, CUDA {part['cuda']}, {machine['cpu']} with {machine['threads']} threads, "
        f"Python {machine['python']}, {', '.join(packages)}"
    )


def targets(parts: Mapping[str, Part], models: Sequence[str]) -> list[list[str]]:
    """One row per target and model: what was measured, and whether it is enough."""
    body = []

    def add(what: str, limit: str, value: float | None, enough: bool) -> None:
        verdict = "not yet measured" if value is None else "reached" if enough else "**missed**"
        body.append([what, limit, "–" if value is None else f"{value:.4g}", verdict])

    def timed(model: str, variant: str, graph: str, form: str) -> float | None:
        rows = parts.get(f"throughput/{model}/{variant}/{graph}", {}).get("rows", [])
        wanted = [row for row in rows if (row["form"], row["batch"]) == (form, TARGET_BATCH) and "ratio" in row]
        return wanted[0]["ratio"] if wanted else None

    for model in models:
        rows = parts.get(f"prune/{model}", {}).get("rows", [])
        value = rows[0]["collection"] if rows else None
        add(f"{model}: calibration pass / plain forward", f"<= {COLLECTION}", value, (value or 0) <= COLLECTION)
        value = rows[0]["memory"] if rows else None
        add(f"{model}: memory while pruning / weights", f"<= {MEMORY}", value, (value or 0) <= MEMORY)
        for graph in GRAPHS:
            for form in ("fp16", "fp16 fused"):
                value = timed(model, VARIANTS[1], graph, form)
                what = f"{model}, {graph}: 50 % structured / dense, {form}, batch {TARGET_BATCH}"
                add(what, f">= {STRUCTURED_GAIN} x", value, (value or 0) >= STRUCTURED_GAIN)
            value = timed(model, "dense", graph, "fp16 fused")
            what = f"{model}, {graph}: dense fp16 fused / fp32, batch {TARGET_BATCH}"
            add(what, f">= {FUSED_GAIN} x", value, (value or 0) >= FUSED_GAIN)
        cosines = [
            row["cosine_min"]
            for name, part in parts.items()
            if name.startswith(f"throughput/{model}/")
            for row in part.get("rows", [])
            if row["form"].startswith("fp16")
        ]
        value = min(cosines, default=None)
        add(f"{model}: smallest cosine in fp16", f">= {COSINE}", value, (value or 0) >= COSINE)
    return body


def prune_section(parts: Mapping[str, Part]) -> str:
    """Times of calibration and masks."""
    body = []
    for name, part in parts.items():
        for row in part.get("rows", []):
            memory = "–" if row["memory"] is None else f"{row['memory']:.3f}"
            cells = [f"{row[key]:.3f}" for key in ("forward_s", "collect_s", "collection", "prune_s")]
            found = [passed for what, passed in part["checks"].items() if "bit for bit" in what]
            equal = "yes" if all(found) else "**no**"
            weights = f"{row['weights'] / 1e6:.1f} M"
            body.append([name.split("/")[1], weights, str(row["images"]), *cells, memory, equal])
    columns = [
        "model", "weights", "images", "forward s", "with norms s", "x", "three ratios s", "memory x", "masks equal",
    ]  # fmt: skip
    about = (
        f"Forward: one pass over drawn scenes with captions, fp32; three ratios: scores and masks of {METHODS[0]} at "
        f"{', '.join(map(str, RATIOS))}; memory: weights and all that is allocated beside them, in multiples of the "
        f"weights; masks equal: those of {', '.join(METHODS)} are the CPU's bit for bit, from one statistics file."
    )
    return f"{about}\n\n{table(columns, body, 1)}"


def timing_rows(part: Part) -> list[list[str]]:
    """The rows of a table of timings."""
    body = []
    for row in part.get("rows", []):
        what = [row["variant"], row["graph"], row["form"], row["against"], str(row["batch"])]
        if "error" in row:
            body.append([*what, row["error"], *[""] * 6])
            continue
        nodes = row.get("nodes", {}).get("compressed", {})
        throttled = sorted({reason for state in row.get("gpu", []) for reason in state["throttled"]})
        layers = row.get("sparse_layers")
        whole = row.get("end_to_end")
        body.append(
            [
                *what,
                f"{row['dense']['p50_ms']:.3f}",
                f"{row['compressed']['p50_ms']:.3f}",
                f"{row['compressed']['per_s']:,.0f}",
                ratio(row) + (" disturbed" if "note" in row else ""),
                ratio(whole) if whole else "–",
                f"{nodes.get('cpu', 0)} of {sum(nodes.values())}" if nodes else "–",
                "; ".join(throttled + ([f"{layers['chosen']} of {layers['eligible']} sparse"] if layers else [])),
            ]
        )
    return body


def timing_section(parts: Mapping[str, Part]) -> str:
    """Throughput, CUDA graphs or TensorRT: one table per model."""
    columns = [
        "variant", "graph", "form", "against dense", "batch", "dense ms", "ms", "samples/s", "x [95 %]",
        "x with copies", "nodes on CPU", "notes",
    ]  # fmt: skip
    blocks = []
    for model in dict.fromkeys(name.split("/")[1] for name in parts):
        here = [part for name, part in parts.items() if name.split("/")[1] == model]
        blocks += [f"### {model}"]
        if body := [row for part in here for row in timing_rows(part)]:
            blocks += [table(columns, body, 4)]
        blocks += dict.fromkeys(f"Not measured: {part['skipped']}" for part in here if "skipped" in part)
    return "\n\n".join(blocks)


def training_section(parts: Mapping[str, Part]) -> str:
    """Steps per second."""
    body = []
    for name, part in parts.items():
        for row in part.get("rows", []):
            peak = row.get("peak_cuda_bytes")
            told = [f"{row['steps_per_s']:.2f}", "–" if peak is None else f"{peak / 1e9:.2f}", f"{row['loss']:.4f}"]
            body.append([name.split("/")[1], row["how"], *([row["error"], "", ""] if "error" in row else told)])
    about = (
        "Retrieval on drawn scenes, all weights trained, half of them masked; GB: peak beside what was there before."
    )
    return f"{about}\n\n{table(['model', 'how', 'steps/s', 'GB', 'loss'], body, 2)}"


SECTIONS: dict[str, tuple[str, Callable[[Mapping[str, Part]], str]]] = {
    "prune": ("Pruning", prune_section),
    "throughput": ("Throughput in ONNX Runtime", timing_section),
    "cuda-graph": ("CUDA graphs", timing_section),
    "tensorrt": ("TensorRT", timing_section),
    "finetune": ("Fine-tuning", training_section),
}


def document(parts: Mapping[str, Part], planned: Sequence[str]) -> str:
    """The whole document; it says what is not yet measured."""
    models = list(dict.fromkeys(name.split("/")[1] for name in planned))
    missing = [name for name in planned if "rows" not in parts.get(name, {})]
    blocks = ["# On a GPU"]
    if missing:
        what = "Nothing here is measured yet" if len(missing) == len(planned) else "Some of this is not yet measured"
        blocks.append(f"**{what}**: {len(missing)} of {len(planned)} parts, listed at the end.")
    made: dict[str, list[str]] = {}
    for name, part in parts.items():
        made.setdefault(f"`{part['command']}` on {hardware(part)}", []).append(name)
    blocks += [f"Made by {how}: {len(names)} parts." for how, names in made.items()]
    blocks.append(
        "Random weights of BLIP-base's, CLIP ViT-B/16's and ViT-L/14's shapes, 224 pixels, texts of full length. The "
        "graphs are those of retrieval; times are medians by the protocol of `vlprune/runtime/timing.py`, inputs and "
        "outputs in the GPU's memory, dense and compressed in turn. ONNX Runtime multiplies fp32 in TF32 on CUDA, as "
        "it does by default. Unstructured zeros are multiplied like any other number: no gain is expected of them here."
    )
    blocks += ["## Targets", table(["target", "limit", "measured", ""], targets(parts, models), 1)]
    for kind, (title, section) in SECTIONS.items():
        of = {name: part for name, part in parts.items() if name.split("/")[0] == kind and "error" not in part}
        if of:
            blocks += [f"## {title}", section(of)]
    failed = [
        f"* {name}: {what}"
        for name, part in parts.items()
        for what in [
            *(what for what, passed in part.get("checks", {}).items() if not passed),
            *([part["error"]] if "error" in part else []),
        ]
    ]
    checked = sum(len(part.get("checks", {})) for part in parts.values())
    if parts:
        blocks += ["## Checks", f"{checked} checks, {len(failed)} failed.", *(["\n".join(failed)] if failed else [])]
    if missing:
        blocks += ["## Not yet measured", "\n".join(f"* {name}" for name in missing)]
        blocks.append("`python benchmarks/gpu.py --resume` measures them on a machine with a GPU.")
    return "\n\n".join(blocks) + "\n"


# --- the command ------------------------------------------------------------------------------------------------------


def settings() -> argparse.Namespace:
    """Read the options, and fill in what --quick makes small."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model on the CPU; writes no document")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], metavar="PART[,PART...]")
    parser.add_argument("--resume", action="store_true", help="leave out parts whose checks passed before")
    parser.add_argument("--list", action="store_true", help="name the parts and stop")
    parser.add_argument("--document", action="store_true", help="only write the document from the figures")
    parser.add_argument("--batches", type=lambda text: [int(size) for size in text.split(",")], metavar="N[,N...]")
    parser.add_argument("--seconds", type=float, default=1.5, help="to time each pair of graphs")
    parser.add_argument("--threads", type=int, help="CPU threads; default: all")
    parser.add_argument("--work", type=Path, help="exported graphs; default ~/.cache/vlprune/gpu")
    parser.add_argument("--keep", action="store_true", help="keep the exported graphs of finished models")
    parser.add_argument("--json", type=Path, metavar="FILE", help="figures, kept and added to")
    parser.add_argument("--results", type=Path, metavar="FILE", help="the document")
    args = parser.parse_args()
    args.device = args.provider = "cpu" if args.quick else "cuda"
    args.work = args.work or Path.home() / ".cache" / "vlprune" / ("gpu-quick" if args.quick else "gpu")
    args.models, args.forms, args.trainings = MODELS, tuple(FORMS), tuple(TRAININGS)
    args.rounds, args.calibration_batch, args.calibration_batches = 7, 32, 8
    args.training_batch, args.steps = 32, (10, 40)
    if args.quick:
        args.models, args.trainings = ("clip-tiny",), ("fp32", "bf16, gradient checkpointing")
        args.rounds, args.calibration_batch, args.calibration_batches = 1, 4, 1
        args.training_batch, args.steps, args.seconds = 4, (1, 2), 0.02
        args.batches = args.batches or [1]
    else:
        args.batches = args.batches or [1, 8, 32, 128]
        args.json = args.json or ROOT / "docs" / "results" / "gpu.json"
        args.results = args.results or ROOT / "docs" / "results" / "gpu.md"
    return args


def check_machine() -> None:
    """Refuse a machine without a GPU that PyTorch can use."""
    require_device("cuda")
    if not torch.cuda.is_available():
        raise MachineError("PyTorch sees no CUDA device here: use a machine with a GPU, or --quick")


def main() -> int:
    """Measure, print, write.

    Returns:
        int: exit code.
    """
    args = settings()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.list:
        print("\n".join(parts_of(args)))
        return 0
    parts: dict[str, Part] = read_json(args.json) if args.json and args.json.is_file() else {}
    if args.document:
        args.json = None
        write(args, parts)
        return 0
    try:
        if not args.quick:
            check_machine()
        sound = run(args, parts)
    except VlpruneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(document(parts, list(parts_of(args))))
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
