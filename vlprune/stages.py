"""The stages of a compression, each reading and writing the run directory.

    statistics -> prune -> finetune -> score (PyTorch) -> export -> pack, convert -> validate (ONNX Runtime) -> bench

A stage's result depends on the recipe and on the stages it needs, nothing else; `Run.stage` decides whether it runs.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch

from vlprune import exporters
from vlprune.data import (
    KINDS,
    CaptionData,
    ClassData,
    Data,
    MissingSplitError,
    VqaData,
    check_images,
    match_labels,
    open_calibration,
    open_data,
    open_images,
)
from vlprune.errors import RequestError
from vlprune.exporters import packed_files, ranges
from vlprune.exporters.flops import flops
from vlprune.exporters.pack import resolve_target
from vlprune.files import atomic_path, disk_errors, read_json
from vlprune.models import load, loading
from vlprune.models.family import Batch, Model, apply_masks, fingerprint, masks_for
from vlprune.names import PRECISIONS
from vlprune.progress import track
from vlprune.pruning import Layer, Pruned, get_method, prune_layers_at
from vlprune.pruning.masks import load_masks, save_masks, sparsity_summary
from vlprune.pruning.patterns import Pattern
from vlprune.pruning.statistics import InputNorms, load_statistics, save_statistics
from vlprune.report.samples import CANDIDATES, choose_samples, image_file, write_thumbnail
from vlprune.report.summary import DYNAMIC
from vlprune.run import Run
from vlprune.runtime.session import load_graphs
from vlprune.runtime.timing import compare
from vlprune.structured import STRUCTURED, permute
from vlprune.structured.plan import PATTERN
from vlprune.structured_stages import Structured
from vlprune.tasks import evaluate
from vlprune.training.finetune import FinetuneOptions, finetune


BATCH = 32  # samples at once in calibration and evaluation
# Forms of the exported graphs: as exported; packed; with joined nodes; else a name of `names.PRECISIONS`. The dense
# graphs are quantised to dynamic int8 while packed ones are measured, and not kept where that was not asked for.
PLAIN, PACKED, FUSED, INT8 = "plain", packed_files.PACKED, "fused", DYNAMIC
BENCH_SECONDS = 2.0  # per graph and batch size; slow graphs take their twelve rounds, however long


@dataclass(frozen=True)
class Variant:
    """One model of a run.

    Attributes:
        id: "dense", "dense-finetuned", "multiflow-0.9", ...
        ratio: fraction removed, None when dense.
        finetuned: trained per task.
    """

    id: str
    ratio: float | None
    finetuned: bool

    @property
    def base(self) -> str:
        """Id before fine-tuning."""
        return self.id.removesuffix("-finetuned")


class Stages:
    """The stages of one run, with what they share: the model, the data.

    Args:
        run: the run directory; its recipe has every option.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.recipe = run.recipe
        self.batch = BATCH
        self.seconds: float | None = None  # of timing, None = BENCH_SECONDS
        self.cuda_graph = False  # of timing on a GPU
        self._quantised: dict[str, tempfile.TemporaryDirectory[str]] = {}
        self._ranges: dict[tuple[str, str], dict[str, ranges.Ranges]] = {}
        self._data: dict[tuple[str, str], Data] = {}
        self._permutation: tuple[permute.Permutation, dict[str, Any]]  # set with `model`, where the recipe says so

    # --- what stages share -----------------------------------------------------------------------------------------

    @cached_property
    def device(self) -> torch.device:
        """Where PyTorch computes."""
        chosen = self.recipe["device"]
        return torch.device("cuda" if chosen == "auto" and torch.cuda.is_available() else chosen.replace("auto", "cpu"))

    @cached_property
    def model(self) -> Model:
        """The model as given, on the CPU."""
        recipe = self.recipe
        model = load(recipe["model"], family=recipe["family"], image_size=recipe["image_size"], seed=recipe["seed"])
        if recipe["permute"]:
            self._permute(model)
        return model

    def _permute(self, model: Model) -> None:
        """Reorder the units as the run has it in its file, or as is best for the pattern."""
        path, pattern, seed = self._permutation_file, self.recipe["pattern"], self.recipe["seed"]
        made_for = {"model": fingerprint(model.layers()), "pattern": pattern, "seed": seed}
        found = permute.load(path, model, made_for) if path.is_file() else None
        if found is None:
            found = permute.search(model, Pattern.parse(pattern), seed)
        self._permutation = found, made_for
        permute.permute(model, found.orders)

    @property
    def _permutation_file(self) -> Path:
        return self.run.folder / "permutation.safetensors"

    @cached_property
    def tasks(self) -> list[str]:
        """The tasks of the run: those asked for, else those with data, else all the model offers."""
        asked = self.recipe["tasks"] or list(self.recipe["data"]) or list(self.model.tasks)
        for task in asked:
            self.model.for_task(task) if task not in self.model.tasks else None  # raises the explanation
        return [task for task in self.model.tasks if task in asked]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the prunable weights as given."""
        return fingerprint(self.model.layers())

    def settle(self, prunes: bool, data: bool = True) -> None:
        """Find what is wrong with the request before any work: the model, its tasks, their data.

        Args:
            prunes: the pattern must fit, and calibration data are needed, unless statistics are there; else the masks
                must be there.
            data: the tasks' data are needed.
        """
        if self.structured:
            self.structured.settle(prunes)
        elif prunes:
            pattern = Pattern.parse(self.recipe["pattern"])
            for layer in self.model.layers():
                pattern.check_shape(layer.name, layer.weight.shape)
        else:
            for ratio in self.recipe["ratios"]:
                self.pruned(ratio)
        for task in self.tasks:
            if data and task in self.recipe["data"]:
                self.data(task, "test")
                if self.trains or "training" in self.needs:
                    self.data(task, "train")
                elif task == "vqa":
                    self._answers(task)
        there = self.run.resume and self._statistics_file.is_file()
        if prunes and self.needs & {"input_norm", "captions"} and not there:
            _ = self.calibration  # opened and looked through

    @cached_property
    def structured(self) -> Structured | None:
        """What is done for a method that removes whole units; None for one that makes masks."""
        return Structured(self) if self.recipe["method"] in STRUCTURED else None

    @property
    def needs(self) -> frozenset[str]:
        """What the method needs besides the weights."""
        return self.structured.method.needs if self.structured else get_method(self.recipe["method"]).needs

    @property
    def trains(self) -> bool:
        """Whether the run fine-tunes; random weights have learned nothing that could be recovered."""
        return self.recipe["finetune"]["mode"] != "none" and not self.model.source.random_weights

    def variants(self) -> list[Variant]:
        """List the variants of the run: dense first, each ratio before and after fine-tuning."""
        found = []
        for base, ratio in [("dense", None), *((self.variant_id(r), r) for r in self.recipe["ratios"])]:
            found.append(Variant(base, ratio, False))
            if self.trains:
                found.append(Variant(f"{base}-finetuned", ratio, True))
        return found

    @property
    def dense(self) -> Variant:
        """The dense variant that exported graphs are held against."""
        return self.shipped()[0]

    def shipped(self) -> list[Variant]:
        """The variants that are exported: the fine-tuned ones, or all when nothing is fine-tuned; dense first."""
        variants = self.variants()
        return [v for v in variants if v.finetuned] or variants

    def served(self) -> Iterator[tuple[Variant, str, str, str]]:
        """List what ONNX Runtime is given to run.

        Yields:
            tuple[Variant, str, str, str]: variant, task, provider and form of the graphs: pruned variants may be
                packed, and stand beside the dense one in int8 then. Dynamic int8 is for the CPU only, and joined
                nodes are none of TensorRT's.
        """
        for provider in self.recipe["providers"]:
            packs = self.packs and provider == "cpu"
            for task in self.tasks:
                for variant in self.shipped():
                    forms = [PLAIN, *self.forms]
                    if provider != "cpu":
                        forms = [form for form in forms if form != INT8]
                    if provider == "tensorrt":
                        forms = [form for form in forms if not self._described(form).get("fused")]
                    if packs:
                        forms.append(INT8 if variant.ratio is None else PACKED)
                    for form in dict.fromkeys(forms):
                        yield variant, task, provider, form

    def variant_id(self, ratio: float) -> str:
        """Name a pruned variant; patterns are spelled so that the name can be a folder."""
        pattern = self.recipe["pattern"]
        suffix = "" if pattern in ("unstructured", PATTERN) else "-" + pattern.replace(":", "of")
        return f"{self.recipe['method']}-{ratio}{suffix}"

    def data(self, task: str, split: str) -> Data:
        """Open the data of a task once; the test split is limited to `samples`."""
        source = self.recipe["data"][task]
        key = (f"{KINDS[task].__name__} {source}", split)
        if key not in self._data:
            limit = self.recipe["samples"] if split == "test" else None
            skip = self.recipe["skip_broken"]
            data = open_data(task, source, split, skip, limit)
            if task == "classification" and isinstance(data, ClassData):
                match_labels(self._labels, data)  # raises the explanation
            self._data[key] = check_images(data, skip)
        return self._data[key]

    @property
    def _labels(self) -> list[str]:
        """What a model that classifies tells apart."""
        model: Any = self.model
        return list(model.labels)

    @cached_property
    def calibration(self) -> CaptionData | ClassData:
        """Open the images of the calibration pass, with captions where the model reads them."""
        recipe = self.recipe
        opened = open_calibration if self._reads else open_images
        data = opened(recipe["calibration"], recipe["skip_broken"], recipe["calibration_samples"])
        return check_images(data, recipe["skip_broken"])

    @property
    def _reads(self) -> bool:
        """Whether the model reads texts."""
        return hasattr(self.model, "caption_batch")

    def calibration_batch(self, model: Any, rows: range) -> Batch:
        """Make a batch of the calibration pass.

        Args:
            model: makes it.
            rows: which images.

        Returns:
            Batch: on the device of the model.
        """
        data, images = self.calibration, [self.calibration.images[i] for i in rows]
        if self._reads and isinstance(data, CaptionData):
            return model.caption_batch(images, [data.captions[i][0] for i in rows], rows)
        return model.class_batch(images, [0] * len(images))  # calibration looks at no label

    def pruned(self, ratio: float) -> Pruned:
        """Load the masks of a ratio."""
        path = self.run.folder / "masks" / f"{self.variant_id(ratio)}.safetensors"
        shapes = {layer.name: tuple(layer.weight.shape) for layer in self.model.layers()}
        loaded, metadata = load_masks(path, shapes)
        if metadata["model"] != self.fingerprint:
            raise RequestError(f"{path} was made for other weights than {self.recipe['model']}: prune again")
        return loaded

    def build(self, variant: Variant, task: str | None = None) -> Model:
        """Make the model of a variant, on the CPU.

        Args:
            variant: which one.
            task: only what this task needs; None = all parts (not for variants that exist per task).

        Returns:
            Model: to be changed as one likes.
        """
        if variant.finetuned and task is not None:
            folder = self.run.folder / "checkpoints" / variant.id / task
            return loading.load_folder(folder, variant.id, None)
        if self.structured and self.structured.per_task and variant.ratio is not None:
            assert task is not None  # there is no such model for all tasks
            return self.structured.load(variant, task)
        model = copy.deepcopy(self.model)
        if variant.ratio is not None and self.structured:
            self.structured.apply(model, variant.ratio)
        elif variant.ratio is not None:
            pruned = self.pruned(variant.ratio)
            apply_masks(model.layers(), pruned.masks, pruned.weights)
        return model if task is None else model.for_task(task)

    def key(self, *names: str) -> dict[str, Any]:
        """Pick the options of the recipe that a stage depends on.

        Args:
            *names: of the options.

        Returns:
            dict[str, Any]: their values.
        """
        return {name: self.recipe[name] for name in names}

    @property
    def model_key(self) -> dict[str, Any]:
        """The options of the recipe that decide what model it is, and its weights."""
        return {**self.key("model", "family", "image_size", "seed"), "weights": self.fingerprint}

    # --- statistics and masks --------------------------------------------------------------------------------------

    @cached_property
    def statistics(self) -> dict[str, torch.Tensor]:
        """Collect the input norms of every layer in one pass, or read them; {} for methods that need none."""
        if "input_norm" not in self.needs:
            return {}
        path = self._statistics_file
        key = {**self.model_key, **self.key("calibration", "calibration_samples", "device")}
        reuse = self.run.resume and path.is_file()
        self.run.stage("statistics", key, partial(self._collect, path), reuse=reuse)
        widths = {layer.name: layer.weight.shape[1] for layer in self.model.layers()}
        return load_statistics(path, widths)[0]

    @property
    def _statistics_file(self) -> Path:
        return self.run.folder / "statistics.safetensors"

    def _collect(self, path: Path) -> dict[str, Any]:
        data = self.calibration
        model = self.model.to(self.device).eval()
        norms = InputNorms({layer.name: (layer.modules, layer.tokens) for layer in model.layers()})
        with norms.collect():
            for start in track(range(0, data.samples, self.batch), "Calibrating"):
                rows = range(start, min(start + self.batch, data.samples))
                model.calibrate(self.calibration_batch(model, rows), norms.valid)
        found = norms.result()
        self.model.to("cpu")
        metadata = {"model": self.fingerprint, "dataset": data.name, "images": data.samples}
        save_statistics(path, found, metadata)
        return {"skipped": data.skipped}

    def prune(self) -> None:
        """Write the masks, or plans, of every ratio: statistics, scores and measurements are shared."""
        recipe, structured = self.recipe, self.structured
        needs = ("statistics",) if self.statistics else ()
        key = {**self.model_key, **self.key("method", "pattern", "ratios")}
        files = [self.run.folder / "masks" / f"{self.variant_id(r)}.safetensors" for r in recipe["ratios"]]
        if structured:
            needs = (*needs, *structured.measure())
            key |= self.key("round_widths")
            files = structured.files()
        reuse = self.run.resume and all(file.is_file() for file in files)
        self.run.stage(f"prune/{recipe['method']}", key, self._prune, needs, reuse)

    def _prune(self) -> dict[str, Any]:
        model = self.model
        modality: dict[str, str] = {layer.name: layer.modality for layer in model.layers()}
        zeros = {layer.name: layer.weight != 0 for layer in model.layers()}
        # Zeros are multiplied like any other number: masked models have the parameters and operations of the dense one.
        same: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}
        same["flops"] = {task: sum(flops(model, task).values()) for task in model.tasks}
        more: dict[str, Any] = {}
        if self.recipe["permute"]:
            order, made_for = self._permutation
            permute.save(self._permutation_file, order, made_for)
            more["permuted"] = {"before": order.before, "after": order.after}
        rows = [self.row(Variant("dense", None, False), sparsity=sparsity_summary(zeros, modality), **same)]
        del zeros
        variants = [Variant(self.variant_id(ratio), ratio, False) for ratio in self.recipe["ratios"]]
        if self.structured:
            found = self.structured.prune()  # nothing where every task has its own
            rows += [self.row(variant, **row) for variant, row in zip(variants, found, strict=False)]
        else:
            rows += [
                self.row(variant, sparsity=sparsity, **same, **more)
                for variant, sparsity in zip(variants, self._masks(modality), strict=True)
            ]
        return {"variants": rows}

    def _masks(self, modality: dict[str, str]) -> Iterator[dict[str, Any]]:
        """Save the masks of every ratio, and tell their sparsity."""
        recipe, norms = self.recipe, self.statistics
        layers = []
        for layer in self.model.layers():
            norm = norms[layer.name].to(self.device) if norms else None
            layers.append(Layer(layer.name, layer.modality, layer.weight.detach().to(self.device), norm))
        results = prune_layers_at(layers, recipe["method"], recipe["ratios"], recipe["pattern"], recipe["seed"])
        for ratio, pruned in track(results, "Pruning", len(recipe["ratios"])):
            summary = sparsity_summary(pruned.masks, modality)
            metadata = {
                **self.key("method", "pattern", "seed"),
                "ratio": ratio,
                "model": self.fingerprint,
                "modality": modality,
                "sparsity": {k: summary[k] for k in ("achieved", "per_modality")},
            }
            save_masks(self.run.folder / "masks" / f"{self.variant_id(ratio)}.safetensors", pruned, metadata)
            del pruned  # before the next masks are made: on a GPU two sets are half the size of the weights
            yield summary

    def row(self, variant: Variant, **figures: Any) -> dict[str, Any]:
        """Make the row of a variant in the report.

        Args:
            variant: which one.
            **figures: "sparsity", "parameters", "flops", and "per_task" where tasks differ.

        Returns:
            dict[str, Any]: see `vlprune.report.schema.Variant`.
        """
        pruned = variant.ratio is not None
        return {
            "id": variant.id,
            "method": self.recipe["method"] if pruned else None,
            "ratio": variant.ratio,
            "pattern": self.recipe["pattern"] if pruned else None,
            "finetuned": variant.finetuned,
            **figures,
        }

    def keep(self, variant: Variant) -> None:
        """Save a pruned model as it is, with all its parts, to be fine-tuned elsewhere."""
        if self.structured and self.structured.per_task:
            return  # kept per task already
        folder = self.run.folder / "checkpoints" / variant.id / "pretrained"
        reuse = self.run.resume and (folder / "model.safetensors").is_file()
        work = partial(self._keep, variant, folder)
        self.run.stage(f"checkpoint/{variant.id}", self.model_key, work, self.pruned_by, reuse)

    def _keep(self, variant: Variant, folder: Path) -> dict[str, Any]:
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            self.build(variant).save(temporary)
        return {}

    @property
    def pruned_by(self) -> tuple[str, ...]:
        """The stage that makes all masks or plans."""
        return (f"prune/{self.recipe['method']}",)

    # --- fine-tuning -----------------------------------------------------------------------------------------------

    def finetune(self, variant: Variant, task: str) -> None:
        """Train one variant for one task, masked weights locked at zero."""
        folder = self.run.folder / "checkpoints" / variant.id / task
        key = {
            **self.model_key,
            **self.key("finetune", "batch_size"),
            "data": self.recipe["data"][task],
            "dense": variant.ratio is None,
        }
        needs = self._made_by(replace(variant, id=variant.base, finetuned=False), task)
        if self.structured and self.structured.teaches(variant, task):
            key |= self.key("distill")
            needs = (*needs, f"finetune/{self.dense.id}/{task}")
        reuse = self.run.resume and (folder / "model.safetensors").is_file()
        work = partial(self._finetune, variant, task, folder)
        self.run.stage(f"finetune/{variant.id}/{task}", key, work, needs, reuse)

    def find(self, variant: Variant, task: str) -> None:
        """Find what a pruned variant is for one task, where tasks differ; for other methods there is nothing to do.

        Args:
            variant: not fine-tuned.
            task: of the run.
        """
        if self.structured and self.structured.per_task and variant.ratio is not None:
            self.structured.find(variant, task)

    def finetune_options(self) -> FinetuneOptions:
        """Tell what the recipe says of training."""
        recipe = self.recipe
        chosen = {"seed": recipe["seed"], **recipe["finetune"]}
        if chosen["mode"] == "none":
            chosen["mode"] = "full"  # of a search, which trains whatever follows it
        device: Literal["cpu", "cuda"] = "cuda" if self.device.type == "cuda" else "cpu"
        return FinetuneOptions(**chosen, batch_size=recipe["batch_size"], device=device)

    def _finetune(self, variant: Variant, task: str, folder: Path) -> dict[str, Any]:
        model = self.build(Variant(variant.base, variant.ratio, False), task)
        masks, teacher = {}, None
        if self.structured:
            teacher = self.structured.teacher(variant, task)
        elif variant.ratio is not None:
            masks = masks_for(model.layers(), self.model.layers(), self.pruned(variant.ratio).masks)
        state = self.run.folder / "training" / variant.id / task
        data = self.data(task, "train")
        label = f"Fine-tuning {variant.id} {task}"
        options = self.finetune_options()
        finetune(model, task, data, masks, options, teacher=teacher, state_dir=state, label=label)
        row = self._finetuned_row(variant, task, model, masks)
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            model.to("cpu").save(temporary)
        shutil.rmtree(state, ignore_errors=True)
        with suppress(OSError):  # not empty, or never made
            state.parent.rmdir()
            state.parent.parent.rmdir()
        return {"variants": [row], "skipped": data.skipped}

    def _finetuned_row(
        self, variant: Variant, task: str, model: Model, masks: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        """The row of a fine-tuned variant is that of its base: training changes no mask, which is checked here."""
        for layer in model.layers():
            if layer.name in masks and bool(layer.weight.detach().cpu()[~masks[layer.name].cpu()].any()):
                raise AssertionError(f"fine-tuning revived pruned weights of {layer.name}")
        made_by = self._made_by(replace(variant, id=variant.base, finetuned=False), task)[0]
        base = next(row for row in self.run.rows(made_by)["variants"] if row["id"] == variant.base)
        return {**base, "id": variant.id, "finetuned": True}

    # --- evaluation ------------------------------------------------------------------------------------------------

    def _made_by(self, variant: Variant, task: str) -> tuple[str, ...]:
        if variant.finetuned:
            return (f"finetune/{variant.id}/{task}",)
        if self.structured and self.structured.per_task and variant.ratio is not None:
            return (self.structured.made_by(variant, task),)
        return self.pruned_by

    def _test_key(self, task: str) -> dict[str, Any]:
        return {**self.model_key, **self.key("samples", "skip_broken"), "data": self.recipe["data"][task]}

    def spec(self, model: Model, task: str) -> dict[str, Any]:
        """Make task.json."""
        options = dict(self.model.options.get(task, {}))
        if task == "vqa":
            options["answers"] = self._answers(task)
        if task == "zero-shot" and isinstance(data := self.data(task, "test"), ClassData):
            options |= {"classes": data.classes, "templates": data.templates}
        return exporters.task_spec(model, task, **options)

    def _answers(self, task: str) -> list[str] | None:
        """Find the closed list of answers; a source without a train split serves as long as nothing is trained."""
        with suppress(MissingSplitError):
            for split in ("test", "train"):
                data = self.data(task, split)
                if isinstance(data, VqaData) and data.answer_list:
                    return data.answer_list
        return None

    def score(self, variant: Variant, task: str) -> None:
        """Compute the task's metrics in PyTorch."""
        work = partial(self._score, variant, task)
        self.run.stage(f"score/{variant.id}/{task}", self._test_key(task), work, self._made_by(variant, task))

    def _score(self, variant: Variant, task: str) -> dict[str, Any]:
        model = self.build(variant, task).to(self.device)
        graphs = exporters.torch_graphs(model, task)
        where = {"runtime": "pytorch", "provider": self.device.type}
        return self._scored(variant, task, graphs, self.spec(model, task), where)

    def _scored(
        self,
        variant: Variant,
        task: str,
        graphs: Any,
        spec: dict[str, Any],
        where: dict[str, str],
        form: str = PLAIN,
    ) -> dict[str, Any]:
        data = self.data(task, "test")
        scores = evaluate(task, graphs, spec, self.model.processor, data, self.batch, self.recipe["seed"])
        row = {
            "variant": variant.id,
            "task": task,
            "dataset": data.name,
            "n": scores.n,
            **where,
            **self._described(form),
            "values": scores.values,
            "ci95": {name: list(bounds) for name, bounds in scores.ci95.items()},
        }
        if data.skipped:
            row["skipped"] = data.skipped
        return {"metrics": [row], "outputs": scores.outputs[:CANDIDATES]}

    # --- ONNX ------------------------------------------------------------------------------------------------------

    def export(self, variant: Variant, task: str) -> None:
        """Write the ONNX graphs of a task and compare each with PyTorch."""
        folder = self._graphs(variant, task)
        needs = self._made_by(variant, task)
        if variant.ratio is not None:  # its sizes are held against the dense graphs'
            needs = (*needs, f"export/{self.dense.id}/{task}")
        reuse = self.run.resume and (folder / "task.json").is_file()
        work = partial(self._export, variant, task, folder)
        self.run.stage(f"export/{variant.id}/{task}", self._test_key(task), work, needs, reuse)

    def _export(self, variant: Variant, task: str, folder: Path) -> dict[str, Any]:
        model = self.build(variant, task)
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            data = self.data(task, "test")
            spec, threads = self.spec(model, task), self.recipe["threads"]
            rows = exporters.export(model, task, spec, temporary, data, variant=variant.id, threads=threads)
        beside = rows
        if variant.ratio is not None:
            beside = self.run.rows(f"export/{self.dense.id}/{task}")["graphs"]
        sizes = {row["graph"]: row["bytes"] for row in beside}
        for row in rows:
            file = f"onnx/{variant.id}/{task}/{row['file']}"
            dense_bytes = sizes[row["graph"]]
            row |= {"variant": variant.id, "task": task, "precision": "fp32", "packed": False}
            row |= {"file": file, "dense_bytes": dense_bytes}
        return {"graphs": rows}

    @property
    def packs(self) -> bool:
        """Whether the run packs its pruned variants."""
        return self.recipe["pack"] != "none"

    def pack(self, variant: Variant, task: str) -> None:
        """Write packed graphs beside the plain ones and compare each with PyTorch."""
        folder = self._graphs(variant, task, PACKED)
        target = resolve_target(self.recipe["target"])
        key = {**self.key("pack", "values", "pack_threshold"), "target": target}
        reuse = self.run.resume and (folder / "task.json").is_file()
        work = partial(self._pack, variant, task, folder, target)
        self.run.stage(f"pack/{variant.id}/{task}", key, work, (f"export/{variant.id}/{task}",), reuse)

    def _pack(self, variant: Variant, task: str, folder: Path, target: str) -> dict[str, Any]:
        recipe, plain = self.recipe, self._graphs(variant, task)
        options = {"values": recipe["values"], "target": target, "threshold": recipe["pack_threshold"]}
        model, data = self.build(variant, task), self.data(task, "test")
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            rows = exporters.pack_task(model, plain, temporary, data, **options, threads=recipe["threads"])
        before = {row["graph"]: row for row in self.run.rows(f"export/{variant.id}/{task}")["graphs"]}
        file = f"onnx/{variant.id}/{task}/{PACKED}"
        return {
            "graphs": [
                {**before[row["graph"]], **row, "packed": True, "file": f"{file}/{row['file']}"}  # same dense_bytes
                for row in rows
            ]
        }

    @property
    def precisions(self) -> list[str]:
        """The precisions that graphs are shipped in beside fp32."""
        return [precision for precision in self.recipe["precision"] if precision != "fp32"]

    @property
    def forms(self) -> list[str]:
        """The forms that all shipped variants have beside the plain one."""
        return [FUSED, *self.precisions] if self.recipe["fuse"] else self.precisions

    def check_forms(self) -> None:
        """Make sure that the graphs are there in the forms of the recipe.

        Raises:
            RequestError: they were not exported in one of them.
        """
        for form in self.forms:
            for variant, task in ((variant, task) for task in self.tasks for variant in self.shipped()):
                if not (self._graphs(variant, task, form) / "task.json").is_file():
                    option = "--fuse" if form == FUSED else f"--precision {','.join(self.precisions)}"
                    raise RequestError(
                        f"{self.run.folder} has no graphs of {variant.id} for {task} in {form}: "
                        f"vlprune export {self.run.folder} {option} --resume"
                    )

    def convert(self, variant: Variant, task: str, form: str) -> None:
        """Write the graphs in another form beside the plain ones and compare each with PyTorch."""
        folder = self._graphs(variant, task, form)
        key = {**self.key("calibration", "calibration_samples", "data", "fuse"), "samples": ranges.SAMPLES}
        reuse = self.run.resume and (folder / "task.json").is_file()
        work = partial(self._convert, variant, task, form, folder)
        self.run.stage(f"convert/{variant.id}/{task}/{form}", key, work, (f"export/{variant.id}/{task}",), reuse)

    def _convert(self, variant: Variant, task: str, form: str, folder: Path) -> dict[str, Any]:
        plain, model, inputs = self._graphs(variant, task), self.build(variant, task), self.inputs(task)
        threads, described = self.recipe["threads"], self._described(form)
        options = {"fuse": described.get("fused", False), "threads": threads}
        if (variant.id, task) not in self._ranges and form not in (INT8, FUSED):  # which need none
            spec = read_json(plain / "task.json")
            self._ranges[variant.id, task] = ranges.measure(plain, spec, model.processor, inputs, threads)
        found = self._ranges.get((variant.id, task), {})
        data = self.data(task, "test")
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            rows = exporters.convert_task(
                model, plain, temporary, described["precision"], data, inputs, found, **options
            )
        before = {row["graph"]: row for row in self.run.rows(f"export/{variant.id}/{task}")["graphs"]}
        file = f"onnx/{variant.id}/{task}/{form}"
        return {"graphs": [{**before[row["graph"]], **row, "file": f"{file}/{row['file']}"} for row in rows]}

    def inputs(self, task: str) -> Data:
        """Open the images and texts that show how large values become inside the graphs of a task; no label is read.

        They are the calibration images; for tasks that ask or claim something of an image, and where there are none,
        the task's training data, if there are any; else its test data.
        """
        if task in ("vqa", "nlvr") or not self.recipe["calibration"]:
            with suppress(MissingSplitError):
                return self.data(task, "train")
        return self.calibration if self.recipe["calibration"] else self.data(task, "test")

    def _described(self, form: str) -> dict[str, Any]:
        """Tell in a row how the graphs compute and store their weights."""
        described = {"precision": form if form in PRECISIONS else "fp32", "packed": form == PACKED}
        if form == FUSED or (form == "fp16" and self.recipe["fuse"]):
            described["fused"] = True
        return {**described, "weights": self.recipe["values"]} if form == PACKED else described

    def _graphs(self, variant: Variant, task: str, form: str = PLAIN) -> Path:
        """The folder of a task's graphs; those in int8 are made here, once per process."""
        folder = self.run.folder / "onnx" / variant.id / task
        if form != INT8 or INT8 in self.precisions:
            return folder if form == PLAIN else folder / form
        if task not in self._quantised:
            with disk_errors(self.run.folder):  # named as what a killed run leaves, see `Run.write_recipe`
                made = tempfile.TemporaryDirectory(prefix=f".{INT8}.", dir=self.run.folder)
                exporters.quantize_task(folder, Path(made.name))
            self._quantised[task] = made
        return Path(self._quantised[task].name)

    def validate(self, variant: Variant, task: str, provider: str, form: str = PLAIN) -> None:
        """Compute the task's metrics in ONNX Runtime on the exported graphs, or on another form of them."""
        name = f"validate/{variant.id}/{task}/{provider}{self._suffix(form)}"
        work = partial(self._validate, variant, task, provider, form)
        self.run.stage(name, self._test_key(task), work, (self._written_by(variant, task, form),))

    def _suffix(self, form: str) -> str:
        return "" if form == PLAIN else f"/{form}"

    def _written_by(self, variant: Variant, task: str, form: str) -> str:
        if form in self.forms:
            return f"convert/{variant.id}/{task}/{form}"
        return f"{'pack' if form == PACKED else 'export'}/{variant.id}/{task}"

    def _beside(self, variant: Variant, form: str) -> str:
        """The form of the dense graphs that a form is timed against: its own precision; fp32 for the dense ones."""
        return PLAIN if variant.ratio is None or form == PACKED else form

    def _validate(self, variant: Variant, task: str, provider: str, form: str) -> dict[str, Any]:
        graphs = load_graphs(self._graphs(variant, task, form), provider, self.recipe["threads"])
        spec = read_json(self._graphs(variant, task) / "task.json")
        where = {"runtime": "onnxruntime", "provider": provider}
        return self._scored(variant, task, graphs, spec, where, form)

    def samples(self, task: str) -> None:
        """Choose test samples that show what the variants scored so far make of them, and keep small images of them."""
        scored = [
            record
            for record in self.run.records()
            if record["name"].startswith(("score/", "validate/")) and record["name"].split("/")[2] == task
        ]
        scored = [record for record in scored if record["rows"].get("outputs")]  # older records have none
        if scored:
            reuse = self.run.resume and (self.run.folder / "samples" / task).is_dir()
            needs = tuple(record["name"] for record in scored)
            work = partial(self._samples, task, [record["rows"] for record in scored])
            self.run.stage(f"samples/{task}", self._test_key(task), work, needs, reuse)

    def _samples(self, task: str, scored: list[dict[str, Any]]) -> dict[str, Any]:
        data = self.data(task, "test")
        # With other data, or other numbers of them, places mean other samples.
        alike = {"dataset": data.name, "n": data.samples, "skipped": data.skipped}
        found = [(row["metrics"][0], row["outputs"]) for row in scored]
        found = [(row, outputs) for row, outputs in found if {"skipped": 0, **row}.items() >= alike.items()]
        rows, shown = choose_samples(task, data, found)
        with atomic_path(self.run.folder / "samples" / task) as temporary:
            temporary.mkdir()
            for image in shown:
                write_thumbnail(data.images[image], temporary / Path(image_file(task, image)).name)
        return {"samples": rows}

    def bench(self, variant: Variant, task: str, provider: str, form: str = PLAIN) -> None:
        """Time every graph of a variant, in one of its forms, against the dense one (see `_beside`)."""
        name = f"bench/{variant.id}/{task}/{provider}{self._suffix(form)}"
        work = partial(self._bench, variant, task, provider, form)
        beside = self._written_by(self.dense, task, self._beside(variant, form))
        needs = (beside, self._written_by(variant, task, form))
        key = self.key("bench_batches", "threads") | ({"seconds": self.seconds} if self.seconds else {})
        key |= {"cuda_graph": True} if self.cuda_graph else {}
        self.run.stage(name, key, work, needs)

    def _bench(self, variant: Variant, task: str, provider: str, form: str) -> dict[str, Any]:
        dense = self._graphs(self.dense, task, self._beside(variant, form))
        folder = self._graphs(variant, task, form)
        graphs = sorted(path.stem for path in folder.glob("*.onnx"))
        cases = [(graph, batch) for graph in graphs for batch in self.recipe["bench_batches"]]
        rows = []
        for graph, batch in track(cases, f"Timing {variant.id} {task}" + ("" if form == PLAIN else f", {form}")):
            timed = compare(
                dense / f"{graph}.onnx",
                folder / f"{graph}.onnx",
                spec=read_json(dense / "task.json"),
                batch=batch,
                provider=provider,
                threads=self.recipe["threads"],
                seconds=self.seconds or BENCH_SECONDS,
                seed=self.recipe["seed"],
                cuda_graph=self.cuda_graph,
            )
            row = {"variant": variant.id, "task": task, "graph": graph, "provider": provider}
            rows.append({**row, **self._described(form), "batch": batch, **timed})
        return {"throughput": rows}

    # --- report ----------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """Write report.json, report.md and manifest.json; remove what was made for measuring only."""
        for folder in self._quantised.values():
            folder.cleanup()
        self._quantised.clear()
        model, source = self.model, self.model.source
        layers = model.layers()
        checkpoint = source.checkpoint + (f" (SHA-256 {source.sha256})" if source.sha256 else "")
        described = {
            "name": self.recipe["model"],
            "family": model.family,
            "checkpoint": checkpoint,
            "parameters": sum(p.numel() for p in model.parameters()),
            "prunable_parameters": sum(layer.weight.numel() for layer in layers),
            "random_weights": source.random_weights,
            "modalities": {layer.name: layer.modality for layer in layers},
        }
        return self.run.report(described, self.recipe["threads"])
