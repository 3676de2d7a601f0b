"""Packing as a stage of a run: what it writes, reports and repeats, and what stops it before any work."""

import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from onnx import helper, numpy_helper

from vlprune import pipeline, stages
from vlprune.cli.main import main
from vlprune.errors import MachineError, RequestError
from vlprune.exporters import pack as packing
from vlprune.exporters import quantize_task
from vlprune.inspect import inspect
from vlprune.report.manifest import verify_manifest
from vlprune.report.schema import validate_report
from vlprune.report.summary import side_by_side, summarize
from vlprune.report.terminal import print_report
from vlprune.runtime import operators
from vlprune.runtime.session import load_graphs
from vlprune.stages import INT8


TASKS = ("retrieval", "vqa")
GRAPHS = {
    "retrieval": {"image_encoder", "text_encoder", "itm"},
    "vqa": {"image_encoder", "question_encoder", "answer_decoder"},
}
TUNED = "omp-0.9-finetuned"
needs_library = pytest.mark.skipif(not operators.available(), reason="the operator library is not built")


@contextmanager
def small() -> Iterator[None]:
    """Time graphs for a moment only, and pack layers however small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "BENCH_SECONDS", 0.02)
        patch.setattr(packing, "SMALLEST", 1)
        yield


@pytest.fixture(scope="module")
def finished(small_models: dict[str, Path], photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that packed; not to be changed."""
    run = tmp_path_factory.mktemp("packed") / "run"
    command = ["compress", str(small_models["pretraining"]), "-o", str(run), "--json", "--method", "omp"]
    command += ["--export", "onnx", "--pack", "sparse", "--bench-batch", "1", "--device", "cpu", "--threads", "1"]
    command += ["--max-steps", "2", "--lr", "3e-3", "--batch-size", "4"]
    for task in TASKS:
        command += ["--data", f"{task}={photos}"]
    with small(), redirect_stdout(io.StringIO()) as out:
        assert main(command) == 0
    assert json.loads(out.getvalue()) == read(run)
    return run


def read(run: Path) -> dict[str, Any]:
    verify_manifest(run)
    return validate_report(json.loads((run / "report.json").read_text()))  # type: ignore[return-value]


def records(run: Path) -> dict[str, int]:
    """When each stage was last run."""
    return {str(path.relative_to(run / "stages")): path.stat().st_mtime_ns for path in (run / "stages").rglob("*.json")}


@needs_library
def test_packed_graphs_are_in_the_report(finished: Path) -> None:
    report = read(finished)
    rows = [row for row in report["graphs"] if row["packed"]]
    assert {(row["variant"], row["task"], row["graph"]) for row in rows} == {
        (TUNED, task, graph) for task in TASKS for graph in GRAPHS[task]
    }
    plain = {(r["variant"], r["task"], r["graph"]): r for r in report["graphs"] if not r["packed"]}
    for row in rows:
        other = plain[row["variant"], row["task"], row["graph"]]
        file = finished / row["file"]
        assert row["file"] == f"onnx/{TUNED}/{row['task']}/packed/{row['graph']}.onnx"
        weights = file.with_name(f"{file.name}.data")  # ONNX Runtime maps them
        assert row["bytes"] == file.stat().st_size + weights.stat().st_size < other["bytes"]
        assert weights.stat().st_mode == file.stat().st_mode
        assert (row["dense_bytes"], row["nonzero_fraction"]) == (other["dense_bytes"], other["nonzero_fraction"])
        assert 0 < row["max_abs_diff"] < 1e-3 and row["cosine_min"] > 0.9999
        assert (row["weights"], row["precision"]) == ("fp32", "fp32") and "weights" not in other
        assert 0 < row["linears_packed"] <= row["linears"]
        layers = json.loads((file.parent / "packing.json").read_text())[row["graph"]]
        assert len(layers) == row["linears"] and sum(layer["packed"] for layer in layers) == row["linears_packed"]
        assert all(bool(layer["reason"]) != layer["packed"] for layer in layers)
    kinds = [row["name"].split("/")[0] for row in report["stages"]]
    order = ["prune", "finetune", "score", "export", "pack", "validate", "samples", "bench"]
    assert list(dict.fromkeys(kinds)) == order


@needs_library
def test_packed_graphs_score_and_are_timed_beside_the_plain_ones(finished: Path) -> None:
    report = read(finished)
    scores = {(r["variant"], r["task"], r["packed"]): r for r in report["metrics"] if r["runtime"] == "onnxruntime"}
    assert {key for key in scores if key[2]} == {(TUNED, task, True) for task in TASKS}
    for task in TASKS:
        assert scores[TUNED, task, True]["values"] == scores[TUNED, task, False]["values"]
        assert scores[TUNED, task, True]["weights"] == "fp32"
    timed = {(r["task"], r["graph"], r["packed"]) for r in report["throughput"] if r["variant"] == TUNED}
    assert timed == {(task, graph, packed) for task in TASKS for graph in GRAPHS[task] for packed in (False, True)}

    text = (finished / "report.md").read_text()
    assert "ONNX, packed |" in text and "cpu, fp32, packed fp32" in text and "fp32, packed fp32 |" in text
    assert "Packed graphs (CPU only) skip the zeros" in text
    with redirect_stdout(io.StringIO()) as out:
        print_report(report)
    assert "Size of packed graphs" in out.getvalue() and "packed fp32" in out.getvalue()
    assert "gains in speed" in out.getvalue() and "gains in size" in " ".join(out.getvalue().split())


@needs_library
def test_the_dense_graphs_in_int8_stand_beside_the_packed_ones(finished: Path) -> None:
    report = read(finished)
    scores = {r["task"]: r for r in report["metrics"] if r["precision"] == INT8}
    timed = [row for row in report["throughput"] if row["precision"] == INT8]
    assert {row["variant"] for row in (*scores.values(), *timed)} == {"dense-finetuned"}
    assert not any(row["packed"] for row in (*scores.values(), *timed))
    assert scores.keys() == set(TASKS)
    assert {(row["task"], row["graph"]) for row in timed} == {(task, g) for task in TASKS for g in GRAPHS[task]}
    assert len(report["throughput"]) == 3 * len(timed)
    kept = {path.parent.relative_to(finished) for path in finished.rglob("*.onnx")}
    assert all(path.parts[0] == "onnx" and path.name in (*TASKS, "packed") for path in kept)
    assert not list(finished.rglob(".*"))

    beside = side_by_side(report)
    assert [(row["variant"], row["graph"]) for row in beside] == [
        (TUNED, f"{task} / {graph}") for task in TASKS for graph in sorted(GRAPHS[task])
    ]
    first = next(row for row in timed if (row["task"], row["graph"]) == ("retrieval", "image_encoder"))
    assert beside[0]["int8, times faster"].startswith(f"{first['ratio']:.3f} [")
    accuracy = next(row.int8 for row in summarize(report) if row.metric == "accuracy")
    assert accuracy == scores["vqa"]["values"]["accuracy"]
    text = (finished / "report.md").read_text()
    assert "| dense, int8 |" in text and "cpu, int8-dynamic |" in text and "### Packed beside dynamic int8" in text
    with redirect_stdout(io.StringIO()) as out:
        print_report(report)
    assert all(words in out.getvalue() for words in ("dense, int8", "int8-dynamic", "Packed beside dynamic int8"))


def test_quantising_leaves_shared_weights_alone(tmp_path: Path) -> None:
    table = np.random.default_rng(0).standard_normal((7, 4), np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("Gemm", ["x", "table", "bias"], ["y"], transB=1),
    ]
    ids = helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["n"])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 7])
    weights = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(table[:, 0].copy(), "bias")]
    graph = helper.make_graph(nodes, "tied", [ids], [y], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "tied.onnx")
    (tmp_path / "int8").mkdir()
    quantize_task(tmp_path, tmp_path / "int8")
    (graph,) = load_graphs(tmp_path / "int8").values()
    chosen = np.array([0, 3, 6, 6])
    np.testing.assert_allclose(graph({"ids": chosen})["y"], table[chosen] @ table.T + table[:, 0], atol=0.2)
    assert "MatMulInteger" in inspect(tmp_path / "int8" / "tied.onnx")["operators"]
    (tmp_path / "tied.onnx").write_bytes(b"nonsense")
    with pytest.raises(RequestError, match="no readable ONNX file"):
        quantize_task(tmp_path, tmp_path / "int8")


@needs_library
def test_bench_times_again_what_was_told_otherwise(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = records(run)
    with small():
        pipeline.bench(run, bench_batches=[1], threads=1, resume=True)
        assert records(run) == before
        command = ["bench", str(run), "--bench-batch", "2", "--tasks", "vqa", "--seconds", "0.03", "--threads", "1"]
        with redirect_stdout(io.StringIO()) as out:
            assert main([*command, "--json"]) == 0
    report = read(run)
    assert json.loads(out.getvalue()) == report
    changed = {name for name, when in records(run).items() if before[name] != when}
    forms = ("dense-finetuned/vqa/cpu/int8-dynamic", f"{TUNED}/vqa/cpu", f"{TUNED}/vqa/cpu/packed")
    assert changed == {f"bench/{form}.json" for form in forms}
    assert {row["batch"] for row in report["throughput"] if row["task"] == "vqa"} == {2}
    assert report["metrics"] == read(finished)["metrics"]
    assert not list(run.rglob(".*"))


def test_bench_needs_graphs_but_no_data(
    small_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    pipeline.prune(str(small_models["vqa"]), output=run, ratios=[0.5], method="omp", device="cpu")
    assert main(["bench", str(run)]) == 2
    assert "lacks the result of export/dense/vqa: run that stage first" in capsys.readouterr().err
    with pytest.raises(RequestError, match="no time to measure"):
        pipeline.bench(run, seconds=0)


@needs_library
@pytest.mark.parametrize("task", TASKS)
def test_the_packed_folder_is_complete_by_itself(finished: Path, task: str, tmp_path: Path) -> None:
    plain = finished / "onnx" / TUNED / task
    folder = tmp_path / "elsewhere"
    shutil.copytree(plain / "packed", folder)
    names = {path.name for path in folder.iterdir()}
    weights = {f"{name}.data" for name in names if name.endswith(".onnx")}
    assert names == {path.name for path in plain.iterdir()} - {"packed"} | {"packing.json"} | weights
    assert load_graphs(folder, threads=1).keys() == GRAPHS[task]
    found = inspect(folder)
    assert found["kind"] == "exported task"
    for graph in GRAPHS[task]:
        packed, before = (inspect(path / f"{graph}.onnx") for path in (folder, plain))
        assert packed["parameters"] <= before["parameters"]
        assert packed["sparsity"].keys() == before["sparsity"].keys()
        for name, share in before["sparsity"].items():
            assert packed["sparsity"][name] == pytest.approx(share, abs=1e-9)
        assert packed["operators"]["vlprune::SparseLinear"] >= 4 and packed["metadata"]["vlprune.packed"] == "sparse"


@needs_library
def test_a_finished_run_packs_nothing_again(
    finished: Path, small_models: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = records(run)
    with small():
        pipeline.export(run, pack="sparse", threads=1, resume=True)
        assert records(run) == before
        pipeline.export(run, pack="sparse", values="fp16", threads=1, resume=True)
        changed = {name for name, when in records(run).items() if before[name] != when}
        assert changed == {f"pack/{TUNED}/{task}.json" for task in TASKS}
        report = read(run)  # what was measured on the files before is left out
        assert not [row for kind in ("metrics", "throughput") for row in report[kind] if row["packed"]]
        assert {row["weights"] for row in report["graphs"] if row["packed"]} == {"fp16"}
        pipeline.validate(run, bench_batches=[1], threads=1, resume=True)
    report = read(run)
    assert {row["weights"] for kind in ("metrics", "throughput") for row in report[kind] if row["packed"]} == {"fp16"}
    assert sum(row["packed"] for row in report["throughput"]) == 6
    assert yaml.safe_load((run / "recipe.yaml").read_text())["values"] == "fp16"
    sizes = [{r["file"]: r["bytes"] for r in read(folder)["graphs"] if r["packed"]} for folder in (finished, run)]
    assert all(sizes[1][file] < size for file, size in sizes[0].items())

    with small():
        pipeline.export(run, pack="sparse", pack_threshold=1.0, threads=1, resume=True)
    assert {row["linears_packed"] for row in read(run)["graphs"] if row["packed"]} == {0}
    pipeline.export(run, threads=1)
    assert not [row for row in read(run)["graphs"] if row["packed"]]
    assert not list(run.rglob("packed/*.onnx"))


@needs_library
def test_a_run_is_unpacked(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert main(["export", str(run), "--unpack", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 6
    verify_manifest(run)
    for row in rows:
        path = Path(row["unpacked"])
        assert path.parent.name == "unpacked" and row["unpacked_bytes"] == path.stat().st_size > row["bytes"]
        assert (path.parent / "task.json").is_file() and not (path.parent / "packing.json").exists()
        same(path, path.parent.parent / path.name)
    assert main(["export", str(run), "--unpack"]) == 0
    assert "image_encoder" in capsys.readouterr().out


def same(path: Path, plain: Path) -> None:
    """Whether a file has the weights of another, zeros and all."""
    weights = [
        {
            t.name: numpy_helper.to_array(t)
            for t in onnx.load(p).graph.initializer
            if not t.name.startswith("/constant/")
        }
        for p in (path, plain)
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[1].items():
        np.testing.assert_array_equal(weights[0][name], weight, name)


@needs_library
def test_a_file_and_a_folder_are_unpacked(finished: Path, tmp_path: Path) -> None:
    plain = finished / "onnx" / TUNED / "vqa"
    folder = tmp_path / "delivered"
    shutil.copytree(plain / "packed", folder)
    (row,) = pipeline.unpack(folder / "image_encoder.onnx")
    assert row["unpacked"] == str(folder / "image_encoder.unpacked.onnx")
    same(Path(row["unpacked"]), plain / "image_encoder.onnx")
    assert {Path(row["unpacked"]).parent for row in pipeline.unpack(folder)} == {folder / "unpacked"}
    for path in (folder / "unpacked").glob("*.onnx"):
        same(path, plain / path.name)
    assert not list(tmp_path.rglob(".*"))


def test_what_cannot_be_unpacked(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="has no packed graphs"):
        pipeline.unpack(tmp_path)
    (tmp_path / "g.onnx").write_bytes(b"nonsense")
    with pytest.raises(RequestError, match="no readable ONNX file"):
        pipeline.unpack(tmp_path / "g.onnx")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), tmp_path / "g.onnx")
    with pytest.raises(RequestError, match="is not packed"):
        pipeline.unpack(tmp_path / "g.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"g.onnx"}


# --- before any work --------------------------------------------------------------------------------------------------


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Path:
        raise MachineError("the operators for packed graphs were not built: build them")

    monkeypatch.setattr(operators, "library", missing)


def test_a_missing_library_stops_compress_at_once(
    no_library: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    command = ["compress", "blip-tiny", "-o", str(run), "--export", "onnx", "--pack", "sparse", "--device", "cpu"]
    assert main(command) == 3
    assert "the operators for packed graphs were not built" in capsys.readouterr().err
    assert not run.exists()


@needs_library
def test_a_missing_library_stops_export_and_validate_at_once(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    request.getfixturevalue("no_library")
    assert main(["export", str(run), "--pack", "sparse"]) == 3
    assert main(["validate", str(run)]) == 3
    assert main(["bench", str(run)]) == 3
    assert capsys.readouterr().err.count("were not built") == 3
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert main(["export", str(run), "--unpack", "--json"]) == 0  # needs no operators


@pytest.mark.parametrize(
    "options, words",
    [
        ({"pack": "sparse", "export": None}, "add --export onnx"),
        ({"pack": "dense"}, "unknown packing 'dense'"),
        ({"pack": "sparse", "values": "int8"}, "unknown kind of values"),
        ({"pack": "sparse", "target": "neon"}, "unknown target"),
        ({"pack": "sparse", "pack_threshold": 2.0}, "--pack-threshold 2.0"),
        ({"values": "fp16"}, "add --pack sparse"),
        ({"target": "avx2"}, "add --pack sparse"),
        ({"pack_threshold": 0.5}, "add --pack sparse"),
    ],
)
def test_contradictory_options_are_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    options = {"export": "onnx", **options}
    with pytest.raises(RequestError, match=words):
        pipeline.compress("blip-tiny", output=tmp_path / "run", ratios=[0.9], **options)
    assert not (tmp_path / "run").exists()


def test_recipes_from_before_packing_are_read(small_models: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    pipeline.prune(str(small_models["pretraining"]), output=run, ratios=[0.5], method="omp", device="cpu")
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    for key in ("pack", "values", "target", "pack_threshold"):
        del recipe[key]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    opened = stages.Run.open(run, False)
    opened.check_recipe()
    assert (opened.recipe["pack"], opened.recipe["values"]) == ("none", "fp32")
