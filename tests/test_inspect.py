import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from transformers import BlipConfig

from vlprune.cli.main import main
from vlprune.errors import RequestError
from vlprune.files import write_json
from vlprune.inspect import inspect
from vlprune.models.blip import Blip, new
from vlprune.models.family import Source
from vlprune.models.processor import Processor, word_tokenizer
from vlprune.pruning import Pruned, save_masks, save_statistics, tensorfile
from vlprune.pruning.masks import KIND
from vlprune.runtime import operators
from vlprune.structured import Plan, cut, save_plan
from vlprune.structured.mope import Table, save_table


MASK_METADATA = {"method": "multiflow", "ratio": 0.75, "pattern": "unstructured", "seed": 3, "model": "abc"}


@pytest.fixture(scope="session")
def model() -> Blip:
    tokenizer = word_tokenizer(["a", "red", "circle"])
    dec, enc, sep, pad = tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]", "[SEP]", "[PAD]"])
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    ids = {"bos_token_id": dec, "enc_token_id": enc, "sep_token_id": sep, "eos_token_id": sep, "pad_token_id": pad}
    config = BlipConfig(
        vision_config={**sizes, "patch_size": 8, "image_size": 16},
        text_config={
            **sizes,
            **ids,
            "vocab_size": len(tokenizer),
            "encoder_hidden_size": 8,
            "max_position_embeddings": 12,
        },
        image_text_hidden_size=4,
    )
    return new(config, Processor(tokenizer, 16, dec, enc), Source("small", "drawn"), seed=0)


def graph_of(
    weights: dict[str, Any], nodes: list[onnx.NodeProto] | None = None, properties: dict[str, str] | None = None
) -> ModelProto:
    """x [batch, 4] through one MatMul per matrix."""
    if nodes is None:
        names = ["x", *(f"y{i}" for i in range(len(weights)))]
        nodes = [helper.make_node("MatMul", [names[i], w], [names[i + 1]]) for i, w in enumerate(weights)]
    tensors = [w if isinstance(w, TensorProto) else numpy_helper.from_array(w, name) for name, w in weights.items()]
    ends = [[helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 4])] for n in ("x", nodes[-1].output[0])]
    model = helper.make_model(
        helper.make_graph(nodes, "graph", *ends, tensors),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
        producer_name="vlprune",
        producer_version="0.1.0",
    )
    helper.set_model_props(model, properties or {})
    return model


def half() -> np.ndarray:
    """A [4, 4] matrix with 12 zeros."""
    matrix = np.zeros((4, 4), np.float32)
    matrix[0] = 1
    return matrix


# --- what is there ----------------------------------------------------------------------------------------------------


def test_checkpoint_has_sparsity_per_modality_and_layer(model: Blip, tmp_path: Path) -> None:
    layers = {layer.name: layer for layer in model.layers()}
    original = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    vision = [name for name, layer in layers.items() if layer.modality == "vision"]
    with torch.no_grad():
        for name in vision:
            layers[name].weight[: layers[name].weight.shape[0] // 2] = 0
    model.save(tmp_path)
    found = inspect(tmp_path)
    with torch.no_grad():
        for name, weight in original.items():
            layers[name].weight.copy_(weight)

    assert found["kind"] == "checkpoint" and found["family"] == "blip"
    assert found["tasks"] == "retrieval, captioning, vqa" and found["image_size"] == 16
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["bytes"] == sum(path.stat().st_size for path in tmp_path.iterdir())
    rows = {row["layer"]: row for row in found["layers"]}
    assert rows.keys() == layers.keys()
    assert all(row["sparsity"] == (0.5 if name in vision else 0) for name, row in rows.items())
    assert rows["text_encoder.encoder.layer.0.output.dense"]["uses"] == 2  # encoder and decoder share it
    assert rows[vision[0]]["shape"] == [24, 8]
    size = {name: layer.weight.numel() for name, layer in layers.items()}
    assert found["prunable_parameters"] == sum(size.values())
    achieved = sum(size[name] for name in vision) / 2 / sum(size.values())
    assert found["sparsity"] == pytest.approx({"achieved": achieved, "vision": 0.5, "text": 0})


@pytest.mark.parametrize("told", [True, False])
def test_masks(told: bool, tmp_path: Path) -> None:
    masks = {"a": torch.tensor([[True, False, False, False]]), "b": torch.tensor([[True, False]])}
    metadata = {**MASK_METADATA, "modality": {"a": "vision", "b": "text"}} if told else MASK_METADATA
    save_masks(tmp_path / "m.safetensors", Pruned(masks, {"b": torch.ones(1, 2)}), metadata)
    found = inspect(tmp_path / "m.safetensors")
    assert found["kind"] == "masks" and found["bytes"] == (tmp_path / "m.safetensors").stat().st_size
    assert {key: found[key] for key in MASK_METADATA} == MASK_METADATA
    assert found["parameters"] == 6 and found["changed_weights"] == 1
    modalities = {"vision": 0.75, "text": 0.5} if told else {}
    assert found["sparsity"] == pytest.approx({"achieved": 4 / 6} | modalities)
    assert found["layers"] == [
        {"layer": "a", "modality": "vision" if told else None, "shape": [1, 4], "sparsity": 0.75},
        {"layer": "b", "modality": "text" if told else None, "shape": [1, 2], "sparsity": 0.5},
    ]


PLAN = Plan(
    {
        "vision.0.self_attn": torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0]]) > 0,
        "vision.0.mlp": torch.arange(8) < 6,
    },
    {"vision": torch.tensor([True, False, True])},
)


def test_structured_plan(tmp_path: Path) -> None:
    told = {"sparsity": {"achieved": 0.25, "per_modality": {"vision": 0.5, "text": 0.0}}, "task": "vqa"}
    save_plan(tmp_path / "p.safetensors", PLAN, {**MASK_METADATA, **told})
    found = inspect(tmp_path / "p.safetensors")
    assert (found["kind"], found["method"], found["pattern"]) == ("structured plan", "multiflow", "structured")
    assert (found["ratio"], found["task"]) == (0.75, "vqa")
    assert found["sparsity"] == {"achieved": 0.25, "vision": 0.5, "text": 0.0}
    assert found["groups"] == [
        {"group": "vision.0.self_attn", "heads": "2 of 3", "width": "2 of 4", "neurons": None, "kept": 4 / 12},
        {"group": "vision.0.mlp", "heads": None, "width": None, "neurons": "6 of 8", "kept": 0.75},
    ]
    assert found["towers"] == [{"tower": "vision", "layers": 2, "of": 3, "removed": [1]}]


def test_plan_whose_metadata_tell_nothing(tmp_path: Path) -> None:
    for sparsity in (None, [], {"achieved": "x", "per_modality": 3}, {"achieved": float(2**200)}):
        save_plan(tmp_path / "p.safetensors", PLAN, {**MASK_METADATA, "sparsity": sparsity, "\x1b[31m": 1})
        assert len(inspect(tmp_path / "p.safetensors")["groups"]) == 2


def test_cut_checkpoint(model: Blip, tmp_path: Path) -> None:
    small = model.for_task("captioning")
    name = "text_decoder.bert.encoder.layer.0"
    heads = torch.tensor([[True] * 4, [False] * 4])
    cut(small, Plan({f"{name}.attention.self": heads, "vision_model.encoder.layers.0.mlp": torch.arange(16) < 4}))
    small.save(tmp_path)
    found = inspect(tmp_path)
    assert found["towers"] == [{"tower": "vision", "layers": 1}, {"tower": "decoder", "layers": 1}]
    rows = {row["group"]: (row["heads"], row["width"], row["neurons"], row["kept"]) for row in found["groups"]}
    assert rows == {
        "vision_model.encoder.layers.0.self_attn": ("2 of 2", "4 of 4", None, 1),
        "vision_model.encoder.layers.0.mlp": (None, None, "4 of 16", 0.25),
        f"{name}.attention.self": ("1 of 2", "4 of 4", None, 0.5),
        f"{name}.crossattention.self": ("2 of 2", "4 of 4", None, 1),
        f"{name}.intermediate": (None, None, "16 of 16", 1),
    }
    model.save(tmp_path)
    assert "groups" not in inspect(tmp_path)


def test_statistics(tmp_path: Path) -> None:
    save_statistics(tmp_path / "s.safetensors", {"a": torch.tensor([3.0, 1, 2])}, {"dataset": "scenes", "images": 8})
    found = inspect(tmp_path / "s.safetensors")
    assert found["kind"] == "statistics"
    assert found["metadata"] == {"dataset": "scenes", "images": "8"}
    assert found["input_norms"] == [{"layer": "a", "inputs": 3, "smallest": 1.0, "median": 2.0, "largest": 3.0}]


def errors_file(path: Path, **metadata: Any) -> None:
    units = {
        "v.attn\x1b": torch.tensor([[0.5, 0.125], [-0.25, 0.4], [0.0, -1.0]]),
        "v.mlp": torch.tensor([[0.25, 0.2], [0.01, 0.0]]),
    }
    members = {"v.mlp": [torch.tensor([2, 0]), torch.tensor([1])]}
    about = {"model": "m", "dataset": "d\n", "pairs": 9, "seed": 0, "stage": "task", "recall": 0.5, "loss": 1.0}
    save_table(path, Table(units, members, {"vision": torch.tensor([[0.75, 4.0], [0.0, 0.0]])}, about | metadata))


def test_module_wise_errors(tmp_path: Path) -> None:
    errors_file(tmp_path / "e.safetensors", ways=["embeddings"])
    found = inspect(tmp_path / "e.safetensors")
    assert found["kind"] == "module-wise errors"
    assert found["metadata"] | {"ways": "embeddings", "dataset": "d ", "pairs": 9, "recall": 0.5} == found["metadata"]
    assert [row["unit"] for row in found["hurts_most"]] == ["layer 0", "head 0", "neurons 0", "neurons 1", "layer 1"]
    assert found["hurts_most"][1] == {"module": "v.attn ", "unit": "head 0", "recall_lost": 0.5, "loss_gained": 0.125}
    # ties by the loss
    least = [row["unit"] for row in found["hurts_least"]]
    assert least == ["head 1", "head 2", "layer 1", "neurons 1", "neurons 0"]
    heat = {row["module"]: row for row in found["heat"]}
    assert heat["v.attn "] == {
        "module": "v.attn ",
        "of": "heads",
        "recall_lost": "█··",
        "most": 0.5,
        "loss_gained": "▃█·",
    }
    assert heat["v.mlp"]["recall_lost"] == "▄▁" and heat["v.mlp"]["of"] == "neurons"
    assert heat["vision"]["recall_lost"] == "█·"  # layers have a scale of their own


WEIGHTS = {
    "vision_model.fc.weight": torch.tensor([[0.0, 1], [0, 0]]),
    "text_encoder.bias": torch.zeros(2, dtype=torch.bfloat16),
    "text_encoder.scale": torch.ones(2, 1).to(torch.float8_e4m3fn),
}


def save_pickle(path: Path) -> None:
    torch.save({"model": WEIGHTS, "epoch": 3}, path)


@pytest.mark.parametrize(
    ("name", "kind", "save"),
    [
        ("w.safetensors", "weights", lambda path: save_file(WEIGHTS, path)),
        ("w.pth", "PyTorch weights", save_pickle),
        ("w.bin", "PyTorch weights", lambda path: torch.save(WEIGHTS, path)),
    ],
)
def test_weights(name: str, kind: str, save: Callable[[Path], None], tmp_path: Path) -> None:
    save(tmp_path / name)
    found = inspect(tmp_path / name)
    assert found["kind"] == kind and found["parameters"] == 8 and found["zeros"] == 5 / 8
    assert {row["part"]: (row["parameters"], row["zeros"]) for row in found["parts"]} == {
        "vision_model": (4, 0.75),
        "text_encoder": (4, 0.5),
    }
    rows = {row["tensor"]: row for row in found["tensors"]}
    assert rows["text_encoder.bias"] == {"tensor": "text_encoder.bias", "type": "bfloat16", "shape": [2], "zeros": 1.0}
    assert rows["text_encoder.scale"]["zeros"] == 0


def test_onnx(tmp_path: Path) -> None:
    weights = {
        "vision_model.encoder.layers.0.mlp.fc1.weight.T": half(),
        "text_encoder.encoder.layer.0.output.dense.weight.T": np.ones((4, 4), np.float32),
        "vision_proj.weight.T": np.ones((4, 4), np.float32),
    }
    model = graph_of(weights, properties={"vlprune.variant": "multiflow-0.9"})
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(8, np.int64), "ids"))
    onnx.save(model, tmp_path / "g.onnx")
    found = inspect(tmp_path / "g.onnx")
    assert found["kind"] == "ONNX graph" and found["bytes"] == (tmp_path / "g.onnx").stat().st_size
    assert found["opset"] == {"ai.onnx": 18} and found["producer"] == "vlprune 0.1.0"
    assert found["metadata"] == {"vlprune.variant": "multiflow-0.9"}
    assert found["inputs"] == {"x": "float [batch, 4]"} and found["outputs"] == {"y2": "float [batch, 4]"}
    assert found["operators"] == {"MatMul": 3}
    assert found["initializers"] == {"FLOAT": 3, "INT64": 1}
    assert found["parameters"] == 56 and found["weight_bytes"] == 3 * 64 + 64
    assert found["zeros"] == (12 + 8) / 56
    assert found["sparsity"] == {"achieved": 12 / 32, "vision": 0.75, "text": 0.0}  # projections are not prunable
    assert found["weights"][0] == {
        "weight": "vision_model.encoder.layers.0.mlp.fc1.weight.T",
        "modality": "vision",
        "read_by": "MatMul",
        "shape": [4, 4],
        "sparsity": 0.75,
    }
    assert [row["modality"] for row in found["weights"]] == ["vision", "text", None]


def test_onnx_counts_branches_functions_and_foreign_operators(tmp_path: Path) -> None:
    inner = helper.make_graph(
        [helper.make_node("MatMul", ["x", "inner"], ["z"])],
        "branch",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(half(), "inner")],
    )
    nodes = [
        helper.make_node("If", ["flag"], ["y"], then_branch=inner, else_branch=inner),
        helper.make_node("SparseLinear", ["y", "outer"], ["out"], domain="vlprune"),
    ]
    model = graph_of({"outer": half(), "flag": np.array(True)}, nodes)
    opset = [helper.make_opsetid("", 18)]
    model.functions.append(
        helper.make_function("own", "F", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], opset)
    )
    onnx.save(model, tmp_path / "g.onnx")
    found = inspect(tmp_path / "g.onnx")
    assert found["operators"] == {"MatMul": 2, "If": 1, "vlprune::SparseLinear": 1, "Relu": 1}
    assert found["parameters"] == 3 * 16 + 1 and found["sparsity"] == {}
    assert {(row["weight"], row["read_by"]) for row in found["weights"]} == {
        ("outer", "vlprune::SparseLinear"),
        ("inner", "MatMul"),
    }


def test_packed_graphs_tell_whether_they_can_run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx.save(graph_of({"w": half()}), tmp_path / "plain.onnx")
    assert "operator_library" not in inspect(tmp_path / "plain.onnx")
    nodes = [helper.make_node("SparseLinear", ["x", "w"], ["y"], domain="vlprune")]
    onnx.save(graph_of({"w": half()}, nodes), tmp_path / "packed.onnx")
    if operators.available():
        assert inspect(tmp_path / "packed.onnx")["operator_library"] == f"{operators.isa()} ({operators.library()})"
    monkeypatch.setattr(operators, "_SUFFIX", ".missing")
    found = inspect(tmp_path / "packed.onnx")["operator_library"]
    assert found.startswith("none: the operators for packed graphs were not built: install a C++ compiler")


def test_onnx_with_external_data(tmp_path: Path) -> None:
    model = graph_of({"w": half()})
    onnx.save(model, tmp_path / "g.onnx", save_as_external_data=True, location="g.onnx.data", size_threshold=0)
    found = inspect(tmp_path / "g.onnx")
    assert found["bytes"] == sum((tmp_path / name).stat().st_size for name in ("g.onnx", "g.onnx.data"))
    assert found["zeros"] == 0.75 and found["weight_bytes"] == 64


def test_exported_task(tmp_path: Path) -> None:
    write_json(tmp_path / "task.json", {"task": "retrieval", "max_length": 35, "answers": None})
    onnx.save(graph_of({"text_encoder.encoder.layer.0.w": half(), "bias": half()}), tmp_path / "text_encoder.onnx")
    found = inspect(tmp_path)
    assert found["kind"] == "exported task"
    assert found["task"] == {"task": "retrieval", "max_length": 35, "answers": "None"}
    size = (tmp_path / "text_encoder.onnx").stat().st_size
    assert found["graphs"] == [
        {"graph": "text_encoder", "bytes": size, "operators": 2, "parameters": 32, "sparsity": 0.75}
    ]
    assert found["files"]["text_encoder.onnx"] == size


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "onnx" / "dense" / "vqa").mkdir(parents=True)
    (folder / "onnx" / "dense" / "vqa" / "g.onnx").write_bytes(bytes(10))
    (folder / "recipe.yaml").write_text("{model: blip-tiny, method: multiflow, ratios: [0.63, 0.9], seed: 7}")
    metadata = {**MASK_METADATA, "sparsity": {"achieved": 0.75}}
    save_masks(folder / "masks" / "multiflow-0.75.safetensors", Pruned({"a": torch.ones(1, 2) > 0}), metadata)
    stage = {"name": "prune/multiflow", "seconds": 1.5, "peak_rss_bytes": 1, "peak_cuda_bytes": None}
    record = {"name": "prune/multiflow", "key": "k", "needs": {}, "stage": stage, "rows": {}}
    write_json(folder / "stages" / "prune" / "multiflow.json", record)
    return folder


def test_run(run: Path) -> None:
    found = inspect(run)
    assert found["kind"] == "run" and found["report"] is False
    assert found["recipe"] == {"model": "blip-tiny", "method": "multiflow", "ratios": "0.63, 0.9", "seed": "7"}
    assert found["stages"] == [{"stage": "prune/multiflow", "seconds": 1.5}]
    size = (run / "masks" / "multiflow-0.75.safetensors").stat().st_size
    assert found["masks"] == [{"masks": "multiflow-0.75", "bytes": size, "sparsity": 0.75}]
    assert found["models"] == [{"model": "dense", "task": "vqa", "as": "onnx", "bytes": 10, "files": 1}]


def test_run_with_plans(run: Path) -> None:
    save_plan(run / "masks" / "upop-0.75" / "vqa.safetensors", PLAN, {**MASK_METADATA, "sparsity": {"achieved": 0.7}})
    save_plan(run / "masks" / "mope-0.75.safetensors", PLAN, MASK_METADATA)
    found = inspect(run)
    assert [(row["plans"], row["sparsity"]) for row in found["plans"]] == [("mope-0.75", None), ("upop-0.75/vqa", 0.7)]
    assert found["masks"]


def test_run_with_a_table_of_errors(run: Path) -> None:
    errors_file(run / "masks" / "mope-table.safetensors")
    found = inspect(run)
    assert [row["masks"] for row in found["masks"]] == ["multiflow-0.75"]
    size = (run / "masks" / "mope-table.safetensors").stat().st_size
    assert found["errors"] == [{"errors": "mope-table", "bytes": size}]


def test_command_prints_text_and_json(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(graph_of({"vision_model.encoder.layers.0.w": half()}), tmp_path / "g.onnx")
    for path in (run, tmp_path / "g.onnx"):
        assert main(["inspect", str(path)]) == 0
        text = capsys.readouterr().out
        assert inspect(path)["kind"] in text and "0.75" in text
        assert main(["inspect", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == inspect(path)


# --- what is broken ---------------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def lying(dims: list[int], data: bytes = bytes(64)) -> ModelProto:
    return graph_of({"w": TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, raw_data=data)})


def external(location: str, offset: int = 0, dims: tuple[int, ...] = (4, 4)) -> ModelProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(offset))):
        tensor.external_data.add(key=key, value=value)
    return graph_of({"w": tensor})


def masks_with(path: Path, **metadata: Any) -> None:
    header = {"shapes": {"a": [1, 2]}, "metadata": {**MASK_METADATA, **metadata}}  # save_masks would refuse bad ones
    tensorfile.write(path, KIND, {"mask/a": torch.tensor([0b11000000], dtype=torch.uint8)}, header)


def truncated(path: Path) -> None:
    save_file(WEIGHTS, path)
    path.write_bytes(path.read_bytes()[:-3])


def spoiled_run(folder: Path) -> None:
    (folder / "stages").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("{model: m, method: omp, ratios: [0.9], seed: 0}")
    (folder / "stages" / "x.json").write_text('{"name": "prune/x", "needs": {}}')


BROKEN: dict[str, Callable[[Path], Any]] = {
    "missing.onnx": lambda path: None,
    "notes.txt": lambda path: path.write_text("x"),
    "empty_folder": lambda path: path.mkdir(),
    "other_model": lambda path: (path.mkdir(), (path / "config.json").write_text('{"model_type": "gpt2"}')),
    "spoiled_run": spoiled_run,
    "list_task": lambda path: (path.mkdir(), (path / "task.json").write_text("[1]")),
    "junk.safetensors": lambda path: path.write_bytes(bytes(range(256))),
    "empty.safetensors": lambda path: path.write_bytes(b""),
    "huge_header.safetensors": lambda path: path.write_bytes((1 << 60).to_bytes(8, "little") + b"{}"),
    "truncated.safetensors": truncated,
    "ratio.safetensors": lambda path: masks_with(path, ratio=7.5),
    "evil.pth": lambda path: torch.save({"model": Evil()}, path),
    "plain_evil.pth": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "junk.pth": lambda path: path.write_bytes(b"no pickle"),
    "numbers.pth": lambda path: torch.save([1, 2], path),
    "junk.onnx": lambda path: path.write_bytes(bytes(range(256)) * 4),
    "empty.onnx": lambda path: path.write_bytes(b""),
    "truncated.onnx": lambda path: path.write_bytes(graph_of({"w": half()}).SerializeToString()[:-40]),
    "too_few.onnx": lambda path: onnx.save(lying([1 << 20, 1 << 20]), path),
    "no_data.onnx": lambda path: onnx.save(lying([1 << 30, 1 << 30], b""), path),
    "negative.onnx": lambda path: onnx.save(lying([-4, -4]), path),
    "absolute.onnx": lambda path: onnx.save(external("/etc/passwd", dims=(1, 4)), path),
    "upward.onnx": lambda path: onnx.save(external("../../../../../../../etc/passwd", dims=(1, 4)), path),
    "link.onnx": lambda path: (
        (path.parent / "link").symlink_to("/etc/passwd"), onnx.save(external("link", dims=(1, 4)), path)
    ),
    "gone.onnx": lambda path: onnx.save(external("gone"), path),
    "short.onnx": lambda path: ((path.parent / "d").write_bytes(bytes(60)), onnx.save(external("d"), path)),
    "offset.onnx": lambda path: ((path.parent / "d").write_bytes(bytes(64)), onnx.save(external("d", -4), path)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_one_line(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    BROKEN[name](tmp_path / name)
    with pytest.raises(RequestError) as error:
        inspect(tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value)
    assert "executed" not in "".join(capfd.readouterr())


def test_names_cannot_command_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"a\x1b[31m\nb": torch.ones(1)}, tmp_path / "w.safetensors")
    onnx.save(graph_of({"w\x1b[2J": half()}, properties={"k\x1b": "v\n" * 500}), tmp_path / "g.onnx")
    errors_file(tmp_path / "e.safetensors")
    for name in ("w.safetensors", "g.onnx", "e.safetensors"):
        assert main(["inspect", str(tmp_path / name)]) == 0
        assert "\x1b" not in capsys.readouterr().out
    assert len(inspect(tmp_path / "g.onnx")["metadata"]["k "]) < 250
