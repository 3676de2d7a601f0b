"""Graphs in other precisions and with joined nodes as stages of a run: what is written, reported and repeated."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from vlprune import pipeline, stages
from vlprune.cli.main import main
from vlprune.errors import RequestError
from vlprune.inspect import inspect
from vlprune.names import PRECISIONS
from vlprune.report.manifest import verify_manifest
from vlprune.report.markdown import render_markdown
from vlprune.report.schema import validate_report
from vlprune.report.summary import far_graphs, precision_table, square_table


FORMS = ("fused", *PRECISIONS[1:])
PRUNED = "omp-0.5"
GRAPHS = ("image_encoder", "itm", "text_encoder")


@contextmanager
def briefly() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "BENCH_SECONDS", 0.02)
        yield


@pytest.fixture(scope="module")
def finished(small_models: dict[str, Path], photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything; not to be changed but by the last test."""
    run = tmp_path_factory.mktemp("precision") / "run"
    command = ["compress", str(small_models["pretraining"]), "-o", str(run), "--json", "--method", "omp"]
    command += ["--ratio", "0.5", "--finetune", "none", "--export", "onnx", "--bench-batch", "1", "--threads", "1"]
    command += ["--precision", "int8-dynamic,fp16,int8-static", "--fuse", "--data", f"retrieval={photos}"]
    with briefly(), redirect_stdout(io.StringIO()) as out:
        assert main(command) == 0
    assert json.loads(out.getvalue()) == read(run)
    return run


def read(run: Path) -> Any:
    verify_manifest(run)
    return validate_report(json.loads((run / "report.json").read_text()))


def test_every_shipped_variant_is_there_in_every_form(finished: Path) -> None:
    report = read(finished)
    files = {row["file"] for row in report["graphs"]}
    for variant in ("dense", PRUNED):
        folder = f"onnx/{variant}/retrieval"
        assert {f"{folder}/{graph}.onnx" for graph in GRAPHS} <= files
        for form in FORMS:
            assert {f"{folder}/{form}/{graph}.onnx" for graph in GRAPHS} <= files
            assert {"task.json", "tokenizer.json"} <= {path.name for path in (finished / folder / form).iterdir()}
    for row in report["graphs"]:
        assert (finished / row["file"]).stat().st_size == row["bytes"]
        form = row["file"].split("/")[-2]
        assert row["precision"] == (form if form in PRECISIONS else "fp32")
        assert bool(row.get("fused")) == bool(row.get("fusions")) == (form in ("fused", "fp16"))
        assert ("kept_fp32" in row) == (row["precision"] != "fp32")
    plain = {(r["variant"], r["graph"]): r for r in report["graphs"] if r["precision"] == "fp32" and "fused" not in r}
    for row in report["graphs"]:
        assert row["dense_bytes"] == plain["dense", row["graph"]]["bytes"]
        assert row["cosine_min"] > 0.99
        if row["precision"] != "fp32":
            assert row["bytes"] < plain[row["variant"], row["graph"]]["bytes"]
    assert inspect(finished / f"onnx/{PRUNED}/retrieval/fp16/image_encoder.onnx")


def test_every_form_is_scored_and_timed_against_its_like(finished: Path) -> None:
    report = read(finished)
    scored = {
        (row["variant"], row["precision"], bool(row.get("fused")))
        for row in report["metrics"]
        if row["runtime"] == "onnxruntime"
    }
    forms = {("fp32", False), ("fp32", True), ("fp16", True), ("int8-static", False), ("int8-dynamic", False)}
    assert scored == {(variant, *form) for variant in ("dense", PRUNED) for form in forms}
    timed = {(row["variant"], row["precision"], bool(row.get("fused"))) for row in report["throughput"]}
    assert timed == scored - {("dense", "fp32", False)}
    record = json.loads((finished / f"stages/bench/{PRUNED}/retrieval/cpu/fp16.json").read_text())
    assert record["needs"].keys() == {"convert/dense/retrieval/fp16", f"convert/{PRUNED}/retrieval/fp16"}
    record = json.loads((finished / "stages/bench/dense/retrieval/cpu/fp16.json").read_text())
    assert record["needs"].keys() == {"export/dense/retrieval", "convert/dense/retrieval/fp16"}


def test_the_report_shows_them(finished: Path) -> None:
    report = read(finished)
    table = precision_table(report)
    assert {row["variant"] for row in table} == {"dense", PRUNED}
    assert all({*PRECISIONS} <= row.keys() and "–" not in row.values() for row in table)
    square = square_table(report)
    assert [(row["variant"], row["graph"]) for row in square] == [(PRUNED, f"retrieval / {name}") for name in GRAPHS]
    text = render_markdown(report)
    assert "Scores by precision" in text and "Dense and compressed, fp32 and fp16" in text
    assert "Warning" not in text and far_graphs(report) == []
    report["graphs"][-1] |= {"precision": "int8-static", "cosine_min": 0.9}
    assert "has a smallest cosine of 0.9000 to PyTorch, below the 0.99 expected of int8-static" in render_markdown(
        report
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": ["fp16"]}, "--precision fp16 is of ONNX graphs: add --export onnx"),
        ({"fuse": True}, "--fuse joins nodes of ONNX graphs: add --export onnx"),
        ({"precision": ["fp8"], "export": "onnx"}, "unknown precision 'fp8'"),
    ],
)
def test_wrong_requests(
    small_models: dict[str, Path], tmp_path: Path, options: dict[str, Any], message: str, photos: Path
) -> None:
    more = {"method": "omp", "data": {"retrieval": str(photos)}}
    with pytest.raises(RequestError, match=message):
        pipeline.compress(str(small_models["pretraining"]), output=tmp_path / "run", ratios=[0.5], **more, **options)
    assert not (tmp_path / "run").exists()


def test_packed_values_of_int8_are_no_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compress", "blip-tiny", "-o", str(tmp_path / "run"), "--export", "onnx", "--pack", "sparse"]
    assert main([*command, "--values", "int8"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "fp16" in error


def test_classifiers_and_pairs_of_images(
    vits: Any, animals: Path, small_models: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """The other tasks: calibrated on a folder of images without captions; on a training split of pairs."""
    images, claims = tmp_path / "images", tmp_path / "claims"
    for folder in (images, claims):
        folder.mkdir()
        for file in photos.glob("*.png"):
            (folder / file.name).write_bytes(file.read_bytes())
    for split, count in (("train", 8), ("dev", 4)):
        pairs = [
            {"images": ["0.png", f"{i}.png"], "sentence": "what color is it", "label": "True"} for i in range(count)
        ]
        (claims / f"nlvr_{split}.json").write_text(json.dumps(pairs))
    options = {"finetune": "none", "export": "onnx", "bench_batches": [1], "threads": 1, "ratios": [0.5], "fuse": True}
    with briefly():
        whole = [
            pipeline.compress(
                str(vits("dinov2").folder), output=tmp_path / "classes", calibration=str(images),
                data={"classification": str(animals)}, precision=["fp16", "int8-static"], **options,
            ),
            pipeline.compress(
                str(small_models["pretraining"]), output=tmp_path / "pairs", method="omp", family="blip_nlvr",
                data={"nlvr": str(claims)}, precision=["int8-static", "fp16", "int8-dynamic"], **options,
            ),
        ]  # fmt: skip
    for report in whole:
        for row in report["graphs"]:
            assert row["cosine_min"] > 0.98 and row["max_abs_diff"] < 0.5
        assert {row["precision"] for row in report["metrics"]} >= {"fp32", "fp16", "int8-static"}
        assert all(row["fusions"]["MultiHeadAttention"] for row in report["graphs"] if row.get("fused"))


def test_resuming_converts_nothing_twice_and_a_missing_form_is_named(finished: Path) -> None:
    def written() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in (finished / "stages" / "convert").rglob("*.json")}

    before = written()
    pipeline.export(finished, precision=["fp16", "int8-static"], fuse=True, threads=1, resume=True)
    assert written() == before
    with briefly():
        report = pipeline.validate(finished, precision=["int8-static"], bench_batches=[1], threads=1, resume=True)
    assert {row["precision"] for row in report["metrics"]} == set(PRECISIONS)  # what was there before stays
    folder = finished / "onnx" / PRUNED / "retrieval" / "fp16"
    (folder / "task.json").unlink()
    with pytest.raises(
        RequestError, match=f"no graphs of {PRUNED} for retrieval in fp16: vlprune export .* --precision fp16"
    ):
        pipeline.validate(finished, precision=["fp16"], threads=1)
