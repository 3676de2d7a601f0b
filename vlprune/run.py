"""The run directory: recipe, stage records, report; what makes a run resumable and repeatable.

Every stage leaves `stages/<name>.json`: the rows it adds to the report, what it cost, a key, which is the hash of all
that decides its result (options, input stages), and an id drawn anew each time it runs. A stage whose record has the
same key need not run again; a record whose input stage has run again since is stale and never reaches the report.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import resource
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from vlprune import __version__
from vlprune.errors import ProblemsError, RequestError
from vlprune.files import atomic_path, disk_errors, read_json, write_json
from vlprune.recipe import OLDER, RECIPE, check
from vlprune.report.environment import environment
from vlprune.report.html import render_html
from vlprune.report.manifest import MANIFEST, write_manifest
from vlprune.report.markdown import render_markdown
from vlprune.report.schema import SCHEMA_VERSION, validate_report
from vlprune.yamlfile import dump_yaml, read_yaml


ROWS = ("variants", "metrics", "graphs", "throughput", "samples")
KINDS = (  # in the order of the report
    "statistics", "measure", "prune", "checkpoint", "finetune", "score", "export", "pack", "convert", "validate",
    "samples", "bench",
)  # fmt: skip
OWN = (
    "stages", "masks", "checkpoints", "onnx", "training", "samples", "statistics.safetensors",
    "permutation.safetensors", "report.json", "report.md", "report.html",
)  # fmt: skip


class Run:
    """One run directory.

    Args:
        folder: it exists.
        recipe: the fully resolved options.
        resume: take over finished stages with the same key.
    """

    def __init__(self, folder: Path, recipe: dict[str, Any], resume: bool) -> None:
        self.folder = folder
        self.recipe = recipe
        self.resume = resume
        self._ids: dict[str, str] = {}

    @classmethod
    def start(cls, folder: Path, recipe: dict[str, Any], resume: bool) -> Run:
        """Plan a run, or take one up again; nothing is written or removed before `begin`.

        Args:
            folder: to be made; one that holds a run will be emptied unless `resume`.
            recipe: the fully resolved options.
            resume: keep finished stages.

        Returns:
            Run: to be begun.

        Raises:
            RequestError: the folder holds something that is no run, or, to be resumed, a run of another model.
        """
        folder = Path(folder)
        if folder.is_dir() and any(folder.iterdir()) and not (folder / "recipe.yaml").is_file():
            raise RequestError(f"{folder} is not empty and no run directory: choose another --output")
        if resume and (folder / "recipe.yaml").is_file():
            earlier = cls.open(folder, resume).recipe
            for key in ("model", "family", "image_size", "seed"):
                if (other := earlier.get(key)) != recipe[key]:
                    raise RequestError(
                        f"{folder} holds a run with {key} = {other!r:.200}, --resume continues only that one: "
                        "leave it out to start afresh, or choose another --output"
                    )
        return cls(folder, recipe, resume)

    def begin(self) -> None:
        """Make the folder, empty it of an earlier run unless resumed, write `recipe.yaml`."""
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.resume:
                for name in (*OWN, MANIFEST):
                    path = self.folder / name
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        self.write_recipe()

    @classmethod
    def open(cls, folder: Path, resume: bool) -> Run:
        """Open an existing run.

        Args:
            folder: a run directory.
            resume: take over finished stages of this verb, too.

        Returns:
            Run: with its recipe.

        Raises:
            RequestError: it has no readable recipe.
        """
        path = Path(folder) / "recipe.yaml"
        try:
            recipe = read_yaml(path)
        except RequestError as error:
            raise RequestError(f"{error}: is {folder} a run directory?") from error
        if not isinstance(recipe, dict) or not {"model", "method", "ratios", "seed"} <= recipe.keys():
            raise RequestError(f"{path} is no recipe of vlprune: is {folder} a run directory?")
        return cls(Path(folder), recipe, resume)

    def check_recipe(self) -> None:
        """Make sure that the recipe as read has all that a stage needs.

        Raises:
            RequestError: an option is missing or of the wrong kind.
        """
        path = self.folder / "recipe.yaml"
        self.recipe, problems = check(OLDER | self.recipe)
        problems += [f"it does not tell {key}" for key in RECIPE if key not in self.recipe]
        if problems:
            raise ProblemsError(str(path), [f"{problem}; prune again" for problem in problems])

    def write_recipe(self) -> None:
        """Write `recipe.yaml`; first remove what a killed run was writing (see `vlprune.files.atomic_path`)."""
        with disk_errors(self.folder):
            for leftover in self.folder.rglob(".*.*"):
                if leftover.is_dir() and not leftover.is_symlink():
                    shutil.rmtree(leftover)
        with atomic_path(self.folder / "recipe.yaml") as temporary:
            temporary.write_text(dump_yaml(self.recipe), encoding="utf-8")

    def stage(
        self,
        name: str,
        key: Mapping[str, Any],
        work: Callable[[], Mapping[str, Any]],
        needs: tuple[str, ...] = (),
        reuse: bool | None = None,
    ) -> dict[str, Any]:
        """Run one stage, unless its result is there.

        Args:
            name: `kind/variant/task...`; its first part is one of `KINDS`.
            key: the options that decide the result.
            work: does it, leaves its files complete, returns rows for the report, and under "skipped" the number of
                broken records it left out.
            needs: names of stages whose results this one reads; they ran before, in this process or an earlier one.
            reuse: take an existing result with the same key; None = as `resume` says.

        Returns:
            dict[str, Any]: the rows.
        """
        inputs = {other: self._id(other) for other in needs}
        text = json.dumps({"key": key, "needs": inputs, "version": __version__}, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()
        path = self._path(name)
        if (self.resume if reuse is None else reuse) and path.is_file():
            record = self._record(name)
            if record["key"] == digest:
                self._ids[name] = record["id"]
                return dict(record["rows"])
        path.unlink(missing_ok=True)
        _reset_peaks()
        start = time.perf_counter()
        rows = dict(work())
        stage = {"name": name, "seconds": round(time.perf_counter() - start, 3), **_peaks()}
        if skipped := rows.pop("skipped", 0):
            stage["skipped"] = skipped
        record = {"name": name, "key": digest, "id": uuid4().hex, "needs": inputs, "stage": stage, "rows": rows}
        write_json(path, record)
        self._ids[name] = str(record["id"])
        return rows

    def _path(self, name: str) -> Path:
        return self.folder / "stages" / f"{name}.json"

    def _id(self, name: str) -> str:
        """The id of a stage that ran before."""
        if name not in self._ids:
            record = self._record(name)
            for other, made in record["needs"].items():
                if self._id(other) != made:
                    raise RequestError(f"{self.folder}: {other} has run again since {name}: run that stage again, too")
            self._ids[name] = record["id"]
        return self._ids[name]

    def _record(self, name: str) -> dict[str, Any]:
        """Read the record of a stage that ran before."""
        path = self._path(name)
        if not path.is_file():
            raise RequestError(f"{self.folder} lacks the result of {name}: run that stage first")
        record = read_json(path)
        kinds = {"name": str, "key": str, "needs": dict, "stage": dict, "rows": dict}
        whole = isinstance(record, dict) and all(isinstance(record.get(key), kind) for key, kind in kinds.items())
        if not whole or record["name"] != name or name.split("/")[0] not in KINDS:
            raise RequestError(f"{path} is no record of a stage: remove it and run that stage again")
        record.setdefault("id", record["key"])
        return dict(record)

    def rows(self, name: str) -> dict[str, Any]:
        """Give the rows of a stage that ran before.

        Args:
            name: of the stage.

        Returns:
            dict[str, Any]: kind of row -> rows.

        Raises:
            RequestError: it has not run.
        """
        return dict(self._record(name)["rows"])

    def records(self) -> list[dict[str, Any]]:
        """Read the stage records that are not stale, in the order of the report.

        Returns:
            list[dict[str, Any]]: one per finished stage.
        """
        folder = self.folder / "stages"
        names = [path.relative_to(folder).with_suffix("").as_posix() for path in sorted(folder.rglob("*.json"))]
        found = {name: self._record(name) for name in names}

        def fresh(record: dict[str, Any]) -> bool:
            inputs = record["needs"].items()
            return all(n in found and found[n]["id"] == made and fresh(found[n]) for n, made in inputs)

        def place(record: dict[str, Any]) -> tuple[int, str]:
            return KINDS.index(record["name"].split("/")[0]), record["name"]

        return sorted(filter(fresh, found.values()), key=place)

    def report(self, model: Mapping[str, Any], threads: int | None) -> dict[str, Any]:
        """Put the report together and write report.json, report.md, report.html and manifest.json.

        Args:
            model: the report's "model".
            threads: CPU threads given, None = all.

        Returns:
            dict[str, Any]: the report.
        """
        records = self.records()
        report: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "model": dict(model), "seed": self.recipe["seed"]}
        for kind in ROWS:
            rows = [row for record in records for row in record["rows"].get(kind, [])]
            if kind == "variants":
                rows = _merged(rows)
            report[kind] = rows
        report["stages"] = [record["stage"] for record in records]
        report["environment"] = environment(threads)
        checked = validate_report(report)
        for name, text in {
            "report.md": render_markdown(checked),
            "report.html": render_html(checked, self.folder),
        }.items():
            with atomic_path(self.folder / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
        write_json(self.folder / "report.json", checked)  # after its pages: where it is, they are
        write_manifest(self.folder, self.recipe["seed"])
        return report


def _merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the rows of a variant: the last counts; one that differs from task to task gets the means over its tasks."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        tasks = {**found.get(row["id"], {}).get("per_task", {}), **row.get("per_task", {})}
        found[row["id"]] = {**row, "per_task": tasks} if tasks else row
    for row in found.values():
        if parts := list(row.get("per_task", {}).values()):
            row["parameters"] = round(sum(part["parameters"] for part in parts) / len(parts))
            row["flops"] = {task: count for part in parts for task, count in part["flops"].items()}
            sparsities = [part["sparsity"] for part in parts]
            row["sparsity"] = {
                "achieved": sum(sparsity["achieved"] for sparsity in sparsities) / len(parts),
                "per_modality": _means([sparsity["per_modality"] for sparsity in sparsities]),
                "per_layer": _means([sparsity["per_layer"] for sparsity in sparsities]),
            }
    return list(found.values())


def _means(parts: list[dict[str, float]]) -> dict[str, float]:
    held = {name: [part[name] for part in parts if name in part] for name in {n: 0 for part in parts for n in part}}
    return {name: sum(values) / len(values) for name, values in held.items()}


def _reset_peaks() -> None:
    """Start measuring peak memory anew, where the system lets us."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peaks() -> dict[str, int | None]:
    """Peak resident and CUDA memory in bytes since the last reset."""
    import torch

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                peak = int(line.split()[1]) * 1024
    cuda = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"peak_rss_bytes": peak, "peak_cuda_bytes": cuda}
