"""What the stages of a run do otherwise for methods that remove whole units: plans instead of masks, and a cut.

One-shot methods and MoPE's pretraining stage make one plan per ratio for the whole model, as masks are made. UPop, and
MoPE's stage on fine-tuned models, make one per ratio and task, and weights with it: those are kept as checkpoints.

    masks/<variant>.safetensors            a plan (vlprune.structured.plan)
    masks/<variant>/<task>.safetensors     a plan for one task, and
    checkpoints/<variant>/<task>/          what it left, cut, with the weights as the search ended or started with them
    masks/mope-table*.safetensors          what MoPE measured (vlprune.structured.mope)
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlprune.data import CaptionData
from vlprune.errors import RequestError
from vlprune.exporters.flops import flops, meta_copy
from vlprune.files import atomic_path
from vlprune.models import loading
from vlprune.models.family import Group, Model, Tower, fingerprint
from vlprune.structured import (
    STRUCTURED,
    Plan,
    choose,
    cut,
    load_plan,
    mope,
    plan_by_scores,
    removed,
    save_plan,
    upop,
)
from vlprune.structured.plan import ROUND_TO
from vlprune.training.distill import DistillWeights, Teacher
from vlprune.training.mope import MopeOptions, measure, ways_of
from vlprune.training.upop import SearchOptions, search


if TYPE_CHECKING:
    from vlprune.stages import Stages, Variant


class Structured:
    """Plans of one run.

    Args:
        stages: of a run whose method removes units.
    """

    def __init__(self, stages: Stages) -> None:
        self.stages = stages
        self.run = stages.run
        self.recipe = stages.recipe
        self.method = STRUCTURED[stages.recipe["method"]]

    @property
    def round_to(self) -> int:
        """What widths are multiples of."""
        return ROUND_TO if self.recipe["round_widths"] else 1

    @property
    def per_task(self) -> bool:
        """Whether every task gets plans, and weights, of its own."""
        return self.method.finds == "search" or self._measures_tasks

    @property
    def _measures_tasks(self) -> bool:
        return self.method.finds == "evaluation" and self.recipe["mope"]["stage"] == "task"

    @cached_property
    def _towers(self) -> Any:
        return self.stages.model.groups(), self.stages.model.towers()

    def settle(self, prunes: bool) -> None:
        """Refuse what cannot be done, before any work.

        Args:
            prunes: the ratios must be possible; else the plans must be there.

        Raises:
            RequestError: it cannot.
        """
        name, model = self.method.name, self.stages.model
        if not prunes:
            if not self.per_task:
                for ratio in self.recipe["ratios"]:
                    self.plan(ratio)
            return
        if self.method.finds == "search":
            if model.source.random_weights:
                raise RequestError(f"{name} searches while a task is learned, and {self.recipe['model']} is random")
            for task in self.stages.tasks:
                groups = meta_copy(model).for_task(task).groups()
                for ratio in self.recipe["ratios"]:
                    upop.check_ratio(groups, upop.weight_costs(groups), ratio, self.round_to)
        elif self.method.finds == "evaluation":
            if not ways_of(model):
                raise RequestError(
                    f"{name} measures cross-modal retrieval, and {self.recipe['model']} offers only "
                    f"{', '.join(model.tasks)}: choose another --method"
                )
            if self._measures_tasks:
                self._settle_tasks()
            groups, towers = self._towers
            for ratio in self.recipe["ratios"]:
                mope.plan_from(_no_errors(groups, towers), groups, towers, ratio, round_to=self.round_to)
        else:
            groups = self._towers[0]
            same = {g.name: torch.zeros(g.shape[0], dtype=torch.float64) for g in groups}
            pools = {g.name: self.method.pool(g) for g in groups}
            for ratio in self.recipe["ratios"]:
                choose(groups, same, ratio, pools=pools, round_to=self.round_to)

    def _settle_tasks(self) -> None:
        """Refuse tasks whose fine-tuned models cannot be measured."""
        if not self.stages.trains:
            raise RequestError("--mope-stage task measures fine-tuned models, and nothing is fine-tuned here")
        for task in self.stages.tasks:
            data = self.stages.data(task, "train")
            if not isinstance(data, CaptionData) or not ways_of(meta_copy(self.stages.model).for_task(task)):
                raise RequestError(
                    f"--mope-stage task measures retrieval, which a model for {task} cannot do: leave {task} out of "
                    "--tasks, or measure the model as given (--mope-stage pretraining)"
                )

    # --- one plan for all tasks ------------------------------------------------------------------------------------

    def plan(self, ratio: float) -> Plan:
        """Load the plan of a ratio.

        Args:
            ratio: of the run.

        Returns:
            Plan: for the model as given.

        Raises:
            RequestError: it is missing, damaged, or another model's.
        """
        path = self._path(self.stages.variant_id(ratio))
        plan, metadata = load_plan(path, *self._towers)
        if metadata["model"] != self.stages.fingerprint:
            raise RequestError(f"{path} was made for other weights than {self.recipe['model']}: prune again")
        return plan

    def _path(self, *names: str) -> Path:
        return self.run.folder.joinpath("masks", *names[:-1], f"{names[-1]}.safetensors")

    def files(self) -> list[Path]:
        """Where the plans for all tasks are kept.

        Returns:
            list[Path]: none when every task has its own.
        """
        return [] if self.per_task else [self._path(self.stages.variant_id(r)) for r in self.recipe["ratios"]]

    def prune(self) -> list[dict[str, Any]]:
        """Write the plan of every ratio, unless every task gets its own.

        Returns:
            list[dict[str, Any]]: per ratio the parts of its row in the report.
        """
        if self.per_task:
            return []
        groups, towers = self._towers
        table = None
        if self.method.finds == "evaluation":
            table = mope.load_table(self._path("mope-table"), groups, towers, self.stages.fingerprint)
        read = self.stages.statistics
        norms = {linear: read[x.name] for x in self.stages.model.layers() for linear in x.modules} if read else {}
        rows = []
        for ratio in self.recipe["ratios"]:
            if table is not None:
                plan = mope.plan_from(table, groups, towers, ratio, round_to=self.round_to)
            else:
                plan = plan_by_scores(self.method, groups, norms, ratio, self.round_to)
            rows.append(self.described(self.stages.model, plan, self.stages.model.tasks))
            save_plan(self._path(self.stages.variant_id(ratio)), plan, self._metadata(ratio, rows[-1]))
        return rows

    def _metadata(self, ratio: float, row: Mapping[str, Any]) -> dict[str, Any]:
        summary = {key: row["sparsity"][key] for key in ("achieved", "per_modality")}
        told = self.stages.key("method", "seed", "round_widths")
        return {**told, "ratio": ratio, "model": self.stages.fingerprint, "sparsity": summary}

    def described(self, model: Model, plan: Plan, tasks: Sequence[str]) -> dict[str, Any]:
        """Tell what a plan removes and what is left.

        Args:
            model: whole.
            plan: for it.
            tasks: whose operations are counted.

        Returns:
            dict[str, Any]: "sparsity", "parameters" and "flops" of a row in the report.
        """
        found = removed(plan, model.groups(), model.towers())
        group_of: dict[int, str] = {}
        for group in model.groups():
            linears = [*(linear for linear, _ in group.inner), *group.outer]
            group_of |= {id(linear.weight): group.name for linear in linears}
        layers = model.layers()
        per_layer = {x.name: found["per_group"].get(group_of.get(id(x.weight), ""), 0.0) for x in layers}
        light = meta_copy(model)
        cut(light, plan)
        return {
            "sparsity": {key: found[key] for key in ("achieved", "per_modality")} | {"per_layer": per_layer},
            "parameters": sum(p.numel() for p in light.parameters()),
            "flops": {task: sum(flops(light, task).values()) for task in tasks},
        }

    def apply(self, model: Model, ratio: float) -> None:
        """Cut the model as given, in place.

        Args:
            model: a copy of it.
            ratio: of the run.
        """
        cut(model, self.plan(ratio))

    # --- MoPE's table ----------------------------------------------------------------------------------------------

    def measure(self) -> tuple[str, ...]:
        """Measure the modules of the model as given, once for all ratios, where the method asks for it.

        Returns:
            tuple[str, ...]: names of the stages that did.
        """
        if self.method.finds != "evaluation" or self._measures_tasks:
            return ()
        key = {**self.stages.model_key, **self.stages.key("calibration", "calibration_samples", "mope")}
        data = self.stages.calibration
        assert isinstance(data, CaptionData)  # the model reads texts: it can retrieve
        work = partial(self._measure, self.stages.model, data, self._path("mope-table"), "pretraining")
        self.run.stage("measure", key, work, reuse=self.run.resume and self._path("mope-table").is_file())
        return ("measure",)

    def _measure(self, model: Model, data: CaptionData, path: Path, stage: Any) -> dict[str, Any]:
        options = {key: value for key, value in self.recipe["mope"].items() if key != "stage"}
        model.to(self.stages.device)
        table = measure(model, data, MopeOptions(**options, seed=self.recipe["seed"]), stage=stage)
        model.to("cpu")
        mope.save_table(path, table)
        return {"skipped": data.skipped}

    # --- plans and weights per task --------------------------------------------------------------------------------

    def made_by(self, variant: Variant, task: str) -> str:
        """Name the stage that makes a variant's weights for one task.

        Args:
            variant: pruned, not fine-tuned.
            task: of the run.

        Returns:
            str: its name.
        """
        return f"prune/{variant.id}/{task}"

    def find(self, variant: Variant, task: str) -> None:
        """Find plan and weights of a variant for one task.

        Args:
            variant: pruned, not fine-tuned.
            task: of the run.
        """
        needs = self.stages.pruned_by
        if self._measures_tasks:
            needs = (*needs, self._measure_task(task))
        key = {
            **self.stages.model_key,
            **self.stages.key("method", "round_widths", "finetune", "batch_size"),
            "ratio": variant.ratio,
            "data": self.recipe["data"][task],
        }
        folder = self._checkpoint(variant.id, task)
        reuse = self.run.resume and (folder / "model.safetensors").is_file()
        self.run.stage(self.made_by(variant, task), key, partial(self._find, variant, task, folder), needs, reuse)

    def _checkpoint(self, variant: str, task: str) -> Path:
        return self.run.folder / "checkpoints" / variant / task

    def _find(self, variant: Variant, task: str, folder: Path) -> dict[str, Any]:
        stages, ratio = self.stages, variant.ratio
        assert ratio is not None
        state = self.run.folder / "training" / variant.id / task
        if self._measures_tasks:
            model = stages.build(stages.dense, task)  # dense, fine-tuned
            path = self._path(f"mope-table-{task}")
            table = mope.load_table(path, model.groups(), model.towers(), fingerprint(model.layers()))
            plan = mope.plan_from(table, model.groups(), model.towers(), ratio, round_to=self.round_to)
        else:
            model = stages.model.for_task(task)
            options = SearchOptions(stages.finetune_options(), round_to=self.round_to)
            data, label = stages.data(task, "train"), f"Searching {variant.id} {task}"
            plan, _ = search(model, task, data, ratio, options, state_dir=state, label=label)
            model.to("cpu")
        row = self.described(model, plan, [task])
        save_plan(self._path(variant.id, task), plan, {**self._metadata(ratio, row), "task": task})
        whole = sum(p.numel() for p in model.parameters())
        cut(model, plan)
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            model.save(temporary)
        shutil.rmtree(state, ignore_errors=True)
        told = {**row, "dense_parameters": whole}
        return {"variants": [stages.row(variant, **row, per_task={task: told})]}

    def _measure_task(self, task: str) -> str:
        """Measure the fine-tuned dense model of a task, once for all ratios."""
        stages = self.stages
        tuned, name, path = stages.dense, f"measure/{task}", self._path(f"mope-table-{task}")
        key = {**stages.model_key, **self.stages.key("mope"), "data": self.recipe["data"][task]}

        def work() -> dict[str, Any]:
            data = stages.data(task, "train")
            assert isinstance(data, CaptionData)  # see `settle`
            return self._measure(stages.build(tuned, task), data, path, "task")

        reuse = self.run.resume and path.is_file()
        self.run.stage(name, key, work, (f"finetune/{tuned.id}/{task}",), reuse)
        return name

    def load(self, variant: Variant, task: str) -> Model:
        """Load the weights that were found for a task.

        Args:
            variant: pruned, not fine-tuned.
            task: of the run.

        Returns:
            Model: cut.
        """
        return loading.load_folder(self._checkpoint(variant.id, task), variant.id, None)

    # --- distillation ----------------------------------------------------------------------------------------------

    def teaches(self, variant: Variant, task: str) -> bool:
        """Tell whether a variant is fine-tuned to resemble the dense model: distillation compares embeddings.

        Args:
            variant: fine-tuned.
            task: of the run.

        Returns:
            bool: it is.
        """
        return self.recipe["distill"] is not None and task == "retrieval" and variant.ratio is not None

    def teacher(self, variant: Variant, task: str) -> Teacher | None:
        """Give the dense model that a variant is fine-tuned to resemble.

        Args:
            variant: fine-tuned.
            task: of the run.

        Returns:
            Teacher | None: the fine-tuned dense model, where there is distillation.
        """
        if not self.teaches(variant, task):
            return None
        plan_path = self._path(variant.base, task) if self.per_task else self._path(variant.base)
        plan, _ = load_plan(plan_path)
        kept = {tower: layers.nonzero().flatten().tolist() for tower, layers in plan.layers.items()}
        weights = DistillWeights(*self.recipe["distill"])
        return Teacher(self.stages.build(self.stages.dense, task), kept, weights)


def _no_errors(groups: Sequence[Group], towers: Sequence[Tower]) -> mope.Table:
    """A table before anything is measured: whether a ratio can be met does not depend on the errors."""
    none = {g.name: torch.zeros(1 if g.kind == "ffn" else g.shape[0], 2, dtype=torch.float64) for g in groups}
    members = {g.name: [torch.arange(g.shape[0])] for g in groups if g.kind == "ffn"}
    return mope.Table(none, members, {t.name: torch.zeros(t.depth, 2, dtype=torch.float64) for t in towers}, {})
