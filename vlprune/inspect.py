"""What is in a file or folder that vlprune reads or writes. Nothing read is executed, or believed unchecked."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlprune.errors import MachineError, RequestError
from vlprune.files import read_json
from vlprune.runtime.operators import DOMAIN, isa, library


if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto, ValueInfoProto
    from torch import Tensor


KNOWN = (
    "a Hugging Face folder, .safetensors (weights, masks, statistics, errors), .pth, .onnx, a bundle, an exported task "
    "or a run"
)
PICKLES = (".pth", ".pt", ".bin")
BUNDLES = (".zst",)
TOP = 5  # modules that are shown from either end of a table of errors
HEAT = "·▁▂▃▄▅▆▇█"


def inspect(path: Path | str) -> dict[str, Any]:
    """Describe a checkpoint, mask or plan file, statistics file, ONNX file, bundle, exported task or run directory.

    Args:
        path: the file or folder.

    Returns:
        dict[str, Any]: `path`, `kind`, `bytes`, and what the kind has to tell: single values, {name: value}, and lists
            of rows, all as JSON has them. Sparsities are fractions of zeros (of removed weights, for masks), in [0, 1].

    Raises:
        RequestError: there is nothing at `path`, it is of no known kind, or it is broken.
    """
    path = Path(path)
    if not path.exists():
        raise RequestError(f"there is no file or folder {path}: check the path")
    if path.is_dir():
        kind, read = _folder_kind(path)
    elif path.suffix == ".safetensors":
        kind, read = _safetensors_kind(path)
    elif path.suffix == ".onnx":
        kind, read = "ONNX graph", _onnx
    elif path.suffix in BUNDLES:
        kind, read = "bundle", _bundle
    elif path.suffix in PICKLES:
        kind, read = "PyTorch weights", _pickle
    else:
        raise RequestError(f"{path} is nothing that inspect knows: give {KNOWN}")
    return {"path": str(path), "kind": kind, "bytes": _size(path)} | read(path)


def _folder_kind(folder: Path) -> tuple[str, Any]:
    if (folder / "recipe.yaml").is_file():
        return "run", _run
    if (folder / "config.json").is_file():
        return "checkpoint", _checkpoint
    if (folder / "task.json").is_file():
        return "exported task", _task
    raise RequestError(f"{folder} has no recipe.yaml, config.json or task.json: give {KNOWN}")


# --- safetensors, PyTorch ---------------------------------------------------------------------------------------------


def _safetensors_kind(path: Path) -> tuple[str, Any]:
    from vlprune.pruning import masks, statistics
    from vlprune.structured import mope, plan

    kinds = {
        masks.KIND: ("masks", _masks),
        statistics.KIND: ("statistics", _statistics),
        plan.KIND: ("structured plan", _plan),
        mope.KIND: ("module-wise errors", _errors),
    }
    return kinds.get(_kind(path), ("weights", _weights))


def _kind(path: Path) -> str:
    """What a safetensors file of ours says it is, "" for others."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return str((file.metadata() or {}).get("kind", ""))
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{path} is no intact safetensors file ({_plain(error)}): copy or make it again") from error


def _masks(path: Path) -> dict[str, Any]:
    from vlprune.pruning.masks import load_masks, sparsity_summary

    pruned, metadata = load_masks(path)
    if not 0 <= metadata["ratio"] <= 1:
        raise RequestError(f"{path}: its metadata has ratio = {metadata['ratio']}: make it again")
    modality = _modalities(metadata.get("modality"), pruned.masks)
    found = sparsity_summary(pruned.masks, modality)
    return {
        **{key: _plain(metadata[key]) for key in ("method", "pattern", "model")},
        "ratio": metadata["ratio"],
        "seed": metadata["seed"],
        "parameters": sum(mask.numel() for mask in pruned.masks.values()),
        "changed_weights": len(pruned.weights),
        "sparsity": {"achieved": found["achieved"]} | (found["per_modality"] if set(modality.values()) != {""} else {}),
        "layers": [
            {
                "layer": _plain(name),
                "modality": modality[name] or None,
                "shape": list(mask.shape),
                "sparsity": found["per_layer"][name],
            }
            for name, mask in pruned.masks.items()
        ],
    }


def _plan(path: Path) -> dict[str, Any]:
    """A structured plan: how many heads, dimensions, neurons and layers are kept. Who keeps all may be left out."""
    from vlprune.structured import load_plan

    plan, metadata = load_plan(path)
    claimed = metadata.get("sparsity")
    claimed = claimed if isinstance(claimed, dict) else {}
    modalities = claimed.get("per_modality")
    shares = {"achieved": claimed.get("achieved")} | (modalities if isinstance(modalities, dict) else {})
    groups = []
    for name, kept in plan.units.items():
        left = [int(kept.sum())] if kept.ndim == 1 else [int(kept.any(1).sum()), int(kept.sum(1).max())]
        groups.append(_units(_plain(name), left, list(kept.shape)))
    return {
        **{key: _plain(metadata[key]) for key in ("method", "pattern", "model")},
        **({"task": _plain(metadata["task"])} if "task" in metadata else {}),
        "ratio": metadata["ratio"],
        "seed": metadata["seed"],
        "sparsity": {_plain(name): _number(share) for name, share in shares.items()},
        "groups": groups,
        "towers": [
            {
                "tower": _plain(name),
                "layers": int(kept.sum()),
                "of": len(kept),
                "removed": (~kept).nonzero().flatten().tolist(),
            }
            for name, kept in plan.layers.items()
        ],
    }


def _units(name: str, left: Sequence[int], full: Sequence[int]) -> dict[str, Any]:
    """A row of heads and head widths, or of neurons."""
    row: dict[str, Any] = {"group": name, "heads": None, "width": None, "neurons": None}
    columns = ("heads", "width") if len(full) == 2 else ("neurons",)
    row |= {column: f"{n} of {most}" for column, n, most in zip(columns, left, full, strict=True)}
    return row | {"kept": _fraction(math.prod(left), math.prod(full))}


def _modalities(claimed: Any, names: Iterable[str]) -> dict[str, str]:
    """Modality of each layer as the file's metadata tells, "" where it does not."""
    claimed = claimed if isinstance(claimed, dict) else {}
    return {name: _plain(claimed.get(name) or "") for name in names}


def _statistics(path: Path) -> dict[str, Any]:
    from vlprune.pruning.statistics import load_statistics

    norms, metadata = load_statistics(path)
    about = {_plain(key): _plain(value) for key, value in metadata.items() if isinstance(value, str | int)}
    rows = [
        {
            "layer": _plain(name),
            "inputs": norm.numel(),
            "smallest": float(norm.min()),
            "median": float(norm.median()),
            "largest": float(norm.max()),
        }
        for name, norm in norms.items()
    ]
    return {"metadata": about, "input_norms": rows}


def _errors(path: Path) -> dict[str, Any]:
    """MoPE's table: the modules whose removal hurts most and least, and the heat of all."""
    from vlprune.structured.mope import load_table

    found = load_table(path)
    heat, rows = [], []
    for errors_of in (found.units, found.layers):  # each with a scale of its own: a layer is more than a head
        most = [max(float(errors[:, i].max()) for errors in errors_of.values()) for i in (0, 1)]
        for name, errors in errors_of.items():
            what = "neurons" if name in found.members else "layer" if name in found.layers else "head"
            lost, gained = errors.T.tolist()
            heat.append(
                {
                    "module": _plain(name),
                    "of": what if what == "neurons" else f"{what}s",
                    "recall_lost": _heat(lost, most[0]),
                    "most": max(lost),
                    "loss_gained": _heat(gained, most[1]),
                }
            )
            rows += [
                {"module": _plain(name), "unit": f"{what} {i}", "recall_lost": lost[i], "loss_gained": gained[i]}
                for i in range(len(lost))
            ]
    rows.sort(key=lambda row: (-row["recall_lost"], -row["loss_gained"]))
    ends = {"hurts_most": rows[:TOP], "hurts_least": rows[: -TOP - 1 : -1]}
    numbers = {key: value for key, value in found.metadata.items() if _number(value) is not None}
    metadata = {_plain(key): numbers.get(key, _plain(value)) for key, value in found.metadata.items()}
    return {"metadata": metadata, **ends, "heat": heat}


def _heat(values: Sequence[float], most: float) -> str:
    """One character per value, from a dot (nothing, or less) to a full block (the most there is)."""
    return "".join(HEAT[min(8, math.ceil(8 * max(value, 0) / most))] if most > 0 else HEAT[0] for value in values)


def _weights(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    def tensors() -> Iterator[tuple[str, Tensor]]:
        try:
            with safe_open(path, framework="pt") as file:
                for name in sorted(file.keys()):  # one at a time: the file may be larger than memory
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise RequestError(f"{path} cannot be read ({_plain(error)}): copy or make it again") from error

    return _listed(tensors())


def _pickle(path: Path) -> dict[str, Any]:
    from torch import Tensor

    from vlprune.models.loading import torch_load

    loaded = torch_load(path)
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not any(isinstance(value, Tensor) for value in state.values()):
        raise RequestError(f"{path} holds no tensors by name: only state dictionaries can be inspected")
    return _listed((str(name), value) for name, value in state.items() if isinstance(value, Tensor))


def _listed(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """Describe tensors one by one, and sum them up per part, the first word of their names."""
    rows, total, zeros = [], Counter[str](), Counter[str]()
    for name, tensor in tensors:
        name = _plain(name)
        zero = _zeros(tensor)
        part = name.split(".")[0]
        total[part] += tensor.numel()
        zeros[part] += zero
        rows.append(
            {
                "tensor": name,
                "type": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "zeros": _fraction(zero, tensor.numel()),
            }
        )
    return {
        "parameters": total.total(),
        "zeros": _fraction(zeros.total(), total.total()),
        "parts": [{"part": p, "parameters": total[p], "zeros": _fraction(zeros[p], total[p])} for p in total],
        "tensors": rows,
    }


def _checkpoint(folder: Path) -> dict[str, Any]:
    from vlprune.models.loading import load_folder

    model = load_folder(folder, str(folder), None)
    rows, total, zeros = [], Counter[str](), Counter[str]()
    for layer in model.layers():
        weight = layer.weight
        zero = _zeros(weight)
        total[layer.modality] += weight.numel()
        zeros[layer.modality] += zero
        rows.append(
            {
                "layer": layer.name,
                "modality": layer.modality,
                "shape": list(weight.shape),
                "uses": len(layer.modules),
                "sparsity": _fraction(zero, weight.numel()),
            }
        )
    return {
        "family": model.family,
        "tasks": ", ".join(model.tasks),
        "image_size": model.processor.image_size,
        "random_weights": model.source.random_weights,
        "parameters": sum(p.numel() for p in model.parameters()),
        "prunable_parameters": total.total(),
        "sparsity": _sparsity(zeros, total),
        **_cut(model),
        "layers": rows,
    }


def _cut(model: Any) -> dict[str, Any]:
    """What is left of a model that structured pruning has cut; nothing for others."""
    from vlprune.structured import full_shape, sizes

    if not sizes(model):
        return {}
    return {
        "towers": [{"tower": tower.name, "layers": tower.depth} for tower in model.towers()],
        "groups": [_units(group.name, group.shape, full_shape(model, group)) for group in model.groups()],
    }


# --- ONNX -------------------------------------------------------------------------------------------------------------


def _onnx(path: Path) -> dict[str, Any]:
    import numpy as np
    from onnx import TensorProto

    model = _read_onnx(path)
    graphs = list(_graphs(model))
    operators: Counter[str] = Counter()
    readers: dict[str, set[str]] = {}
    for node in (node for graph in graphs for node in graph.node):
        operator = _plain(f"{node.domain}::{node.op_type}" if node.domain else node.op_type)
        operators[operator] += 1
        for name in node.input:
            readers.setdefault(name, set()).add(operator)

    rows, types = [], Counter[str]()
    everything, total, zeros = Counter[str](), Counter[str](), Counter[str]()
    weight_bytes = 0
    packed = _packed_weights(graphs)
    for tensor in (tensor for graph in graphs for tensor in getattr(graph, "initializer", ())):
        kind = TensorProto.DataType.Name(tensor.data_type) if tensor.data_type in TensorProto.DataType.values() else "?"
        values = _values(path, tensor)
        name, shape = packed.get(tensor.name, (tensor.name, list(tensor.dims)))
        size, zero = math.prod(shape), 0
        if values is not None:
            zero = max(size - int(np.count_nonzero(values)), 0)
            weight_bytes += values.nbytes
        types[kind] += 1
        if not name:
            continue  # tells where the values of a packed weight belong
        everything["parameters"] += size
        everything["zeros"] += zero
        if len(shape) < 2:
            continue
        modality = _onnx_modality(name)
        if modality:
            total[modality] += size
            zeros[modality] += zero
        rows.append(
            {
                "weight": _plain(name),
                "modality": modality,
                "read_by": ", ".join(sorted(readers.get(tensor.name, ()))),
                "shape": shape,
                "sparsity": None if values is None else _fraction(zero, size),
            }
        )
    packs = any(name.startswith(f"{DOMAIN}::") for name in operators)
    return {
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "ir_version": model.ir_version,
        "producer": _plain(f"{model.producer_name} {model.producer_version}".strip()),
        "metadata": {_plain(entry.key): _plain(entry.value) for entry in model.metadata_props},
        "inputs": {_plain(value.name): _value_type(value) for value in model.graph.input},
        "outputs": {_plain(value.name): _value_type(value) for value in model.graph.output},
        "operators": dict(operators.most_common()),
        **({"operator_library": _operator_library()} if packs else {}),
        "initializers": dict(types),
        "sparse_initializers": len(model.graph.sparse_initializer),
        "parameters": everything["parameters"],
        "weight_bytes": weight_bytes,
        "zeros": _fraction(everything["zeros"], everything["parameters"]),
        "sparsity": _sparsity(zeros, total) if total else {},
        "weights": rows,
    }


def _read_onnx(path: Path) -> ModelProto:
    """Parse an ONNX file, external data left where it is."""
    import onnx

    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except Exception as error:  # protobuf's own exceptions share no class
        raise RequestError(f"{path} is no intact ONNX file ({_plain(error)}): export it again") from error
    if not model.ir_version or not model.opset_import or not model.graph.node:  # an empty file parses, too
        raise RequestError(f"{path} is no intact ONNX file (it holds no graph): export it again")
    return model


def _graphs(model: ModelProto) -> Iterator[Any]:
    """The graph, its functions, and the graphs of branches and loops."""
    waiting: list[Any] = [model.graph, *model.functions]
    while waiting:
        graph = waiting.pop(0)
        yield graph
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            waiting += [attribute.g] if attribute.HasField("g") else []
            waiting += attribute.graphs


def _operator_library() -> str:
    """Tell whether graphs with operators of vlprune's own can run here."""
    try:
        return f"{isa()} ({library()})"
    except MachineError as error:
        return f"none: {error}"


def _packed_weights(graphs: Iterable[Any]) -> dict[str, tuple[str, list[int]]]:
    """Initializers of packed weights: the weight's name and shape for its values, no name for the rest of it."""
    found: dict[str, tuple[str, list[int]]] = {}
    for node in (node for graph in graphs for node in graph.node):
        if node.domain != DOMAIN or node.op_type not in ("SparseLinear", "SparseMlp"):
            continue
        sizes = {attribute.name: attribute.i for attribute in node.attribute}
        widths = ["in_features", "out_features"]
        if node.op_type == "SparseMlp":
            widths.insert(1, "hidden_features")
        for layer, (inputs, outputs) in enumerate(pairwise(widths)):
            names = list(node.input[1 + 5 * layer : 5 + 5 * layer])  # values, indices, rows, counts; then the bias
            if len(names) == 4:
                found |= {name: ("", []) for name in names[1:]}
                shape = [max(sizes.get(name, 0), 0) for name in (outputs, inputs)]
                found[names[0]] = (names[0].removesuffix("/values"), shape)
    return found


def _values(path: Path, tensor: TensorProto) -> Any:
    """The values of an initializer as an array, not copied where possible; None for types numpy lacks."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    broken = f"{path}: initializer {_plain(tensor.name)!r}"
    if any(size < 0 for size in tensor.dims):
        raise RequestError(f"{broken} claims the shape {list(tensor.dims)}: export it again")
    try:
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        plain = dtype.kind in "biuf"  # no strings, no packed or 8-bit floats
        if not plain:
            return None
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        where = {entry.key: entry.value for entry in tensor.external_data}
        file = _inside(path.parent, where.get("location", ""))
        count, offset = math.prod(tensor.dims), int(where.get("offset", 0))
        if file is None or offset < 0 or offset + count * dtype.itemsize > file.stat().st_size:
            raise RequestError(
                f"{broken} has its data at {_plain(where.get('location', ''))!r}, which is missing, too small or "
                "outside the folder: copy the folder again"
            )
        return np.memmap(file, dtype, "r", offset, (count,)) if count else np.zeros(0, dtype)
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise RequestError(f"{broken} is broken ({_plain(error)}): export it again") from error


def _inside(folder: Path, location: str) -> Path | None:
    """A file below the folder, links followed; None for anything else."""
    file = (folder / location).resolve()
    return file if location and file.is_relative_to(folder.resolve()) and file.is_file() else None


def _onnx_modality(name: str) -> str | None:
    """Modality of a prunable weight. A file has no module tree; the exporter's names repeat the PyTorch model's."""
    for modality in ("vision", "text"):
        if name.startswith(f"{modality}_") and ".encoder.layer" in name:
            return modality
    return None


def _value_type(value: ValueInfoProto) -> str:
    from onnx import TensorProto

    tensor = value.type.tensor_type
    known = tensor.elem_type in TensorProto.DataType.values()
    kind = TensorProto.DataType.Name(tensor.elem_type).lower() if known else "?"
    sizes = [
        size.dim_param or (str(size.dim_value) if size.HasField("dim_value") else "?") for size in tensor.shape.dim
    ]
    return _plain(f"{kind} [{', '.join(sizes)}]")


# --- bundles ----------------------------------------------------------------------------------------------------------


def _bundle(path: Path) -> dict[str, Any]:
    """What a bundle holds, once all of its hashes have been found right; its graphs are not opened."""
    import tempfile

    from vlprune.bundle.unpack import unpack

    with tempfile.TemporaryDirectory(prefix="vlprune-") as folder:
        manifest, identity = unpack(path, Path(folder))
    size, files = path.stat().st_size, manifest["files"]
    forms: dict[str, Counter[str]] = {}
    for tensor in manifest["weights"]["tensors"]:
        form = f"{tensor['stored']}, {tensor['coding']}" + (", not zero only" if tensor["masked"] else "")
        stored = files[f"weights/{tensor['sha256']}"]["bytes"]
        forms.setdefault(form, Counter()).update(tensors=1, stored=stored, rebuilt=tensor["bytes"])
    keys = ("task", "family", "variant", "precision", "packed", "values", "embeddings", "signed", "example")
    return {
        "bundle": identity,
        **{key: manifest[key] if isinstance(manifest[key], bool) else _plain(manifest[key]) for key in keys},  # type: ignore[literal-required]
        "model": {_plain(key): _plain(value) for key, value in manifest["model"].items()},
        "dense_bytes": manifest["dense_bytes"],
        "ratio": _fraction(size, manifest["dense_bytes"]),
        "recipe_sha256": manifest["recipe_sha256"],
        "versions": {_plain(name): _plain(version) for name, version in manifest["versions"].items()},
        "scores": [
            {
                **{key: _plain(row.get(key)) for key in ("variant", "runtime", "dataset", "n")},
                **{_plain(name): _number(value) for name, value in dict(row.get("values") or {}).items()},
            }
            for row in manifest["metrics"]
        ],
        "weights": [{"form": form, **counts} for form, counts in sorted(forms.items())],
        "files": {name: entry["bytes"] for name, entry in files.items() if not name.startswith("weights/")},
    }


# --- folders ----------------------------------------------------------------------------------------------------------


def _task(folder: Path) -> dict[str, Any]:
    spec = read_json(folder / "task.json")
    if not isinstance(spec, dict):
        raise RequestError(f"{folder}/task.json is no task description: export the task again")
    rows = []
    for path in sorted(folder.glob("*.onnx")):
        graph = _onnx(path)
        rows.append(
            {
                "graph": _plain(path.stem),
                "bytes": _size(path),
                "operators": sum(graph["operators"].values()),
                "parameters": graph["parameters"],
                "sparsity": graph["sparsity"].get("achieved"),
            }
        )
    about = {_plain(key): value if isinstance(value, int) else _plain(value) for key, value in spec.items()}
    return {"task": about, "graphs": rows, "files": _files(folder)}


def _run(folder: Path) -> dict[str, Any]:
    from vlprune.pruning import masks, tensorfile
    from vlprune.run import Run
    from vlprune.structured import mope, plan

    run = Run.open(folder, resume=True)
    found: dict[str, list[dict[str, Any]]] = {"masks": [], "plans": [], "errors": []}
    for path in sorted((folder / "masks").rglob("*.safetensors")):
        kind, name = _kind(path), _plain(path.relative_to(folder / "masks").with_suffix(""))
        if kind == mope.KIND:
            found["errors"].append({"errors": name, "bytes": _size(path)})
            continue
        what = "plans" if kind == plan.KIND else "masks"
        with tensorfile.opened(path, plan.KIND if what == "plans" else masks.KIND) as file:
            metadata = file.header.get("metadata")
        claimed = metadata.get("sparsity") if isinstance(metadata, dict) else None
        achieved = claimed.get("achieved") if isinstance(claimed, dict) else None
        found[what].append({what: name, "bytes": _size(path), "sparsity": _number(achieved)})
    try:
        stages = [
            {"stage": _plain(r["stage"]["name"]), "seconds": _number(r["stage"]["seconds"])} for r in run.records()
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RequestError(f"{folder}/stages holds a broken record ({_plain(error)}): run without --resume") from error
    models = []
    for kind in ("checkpoints", "onnx"):
        for task in sorted(path for path in (folder / kind).glob("*/*") if path.is_dir()):
            row = {"model": _plain(task.parent.name), "task": _plain(task.name), "as": kind}
            models.append({**row, "bytes": _size(task), "files": sum(1 for _ in _walk(task))})
    return {
        "recipe": {_plain(key): _plain(value) for key, value in run.recipe.items()},
        "report": (folder / "report.json").is_file(),
        "stages": stages,
        **{what: rows for what, rows in found.items() if rows or (what == "masks" and not found["plans"])},
        "models": models,
    }


def _files(folder: Path) -> dict[str, int]:
    return {_plain(path.relative_to(folder)): path.stat().st_size for path in sorted(_walk(folder))}


# --- small things -----------------------------------------------------------------------------------------------------


def _walk(folder: Path) -> Iterator[Path]:
    """Plain files below a folder; links are not followed."""
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def _size(path: Path) -> int:
    """Bytes of a file or of a folder's files; an ONNX file's external data beside it counts."""
    if path.is_dir():
        return sum(file.stat().st_size for file in _walk(path))
    beside = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (beside.stat().st_size if path.suffix == ".onnx" and beside.is_file() else 0)


def _zeros(tensor: Tensor) -> int:
    import torch

    if tensor.is_floating_point() and tensor.itemsize == 1:  # torch cannot compare 8-bit floats
        tensor = tensor.float()
    return tensor.numel() - int(torch.count_nonzero(tensor))


def _sparsity(zeros: Mapping[str, int], total: Mapping[str, int]) -> dict[str, float]:
    achieved = _fraction(sum(zeros.values()), sum(total.values()))
    return {"achieved": achieved} | {name: _fraction(zeros[name], total[name]) for name in total}


def _fraction(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _number(value: Any) -> float | None:
    sound = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if sound else None


def _plain(value: Any) -> str:
    """Text from a file, made harmless for a terminal: one line, printable, of bearable length."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = ", ".join(map(str, value[:20])) + (", ..." if len(value) > 20 else "")
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return text if len(text) <= 200 else f"{text[:200]}..."
