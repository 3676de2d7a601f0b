"""A small complete report, made by hand."""

from typing import Any

import pytest


def _metrics(variant: str, task: str, values: dict[str, list[float]], runtime: str = "pytorch") -> dict[str, Any]:
    return {
        "variant": variant,
        "task": task,
        "dataset": "scenes",
        "n": 500,
        "runtime": runtime,
        "provider": "cpu",
        "precision": "fp32",
        "packed": False,
        "values": {name: value for name, (value, _, _) in values.items()},
        "ci95": {name: [low, high] for name, (_, low, high) in values.items()},
    }


def _variant(name: str, method: str | None, ratio: float | None, achieved: float, finetuned: bool) -> dict[str, Any]:
    return {
        "id": name,
        "method": method,
        "ratio": ratio,
        "pattern": "unstructured" if method else None,
        "finetuned": finetuned,
        "sparsity": {
            "achieved": achieved,
            "per_modality": {"vision": achieved, "text": achieved},
            "per_layer": {"vision.0.fc1": achieved},
        },
        "parameters": 3_000_000,
    }


@pytest.fixture
def report() -> dict[str, Any]:
    return {
        "schema_version": 1,
        "model": {
            "name": "blip-tiny",
            "family": "blip",
            "checkpoint": "embedded",
            "parameters": 3_000_000,
            "prunable_parameters": 2_500_000,
            "random_weights": False,
        },
        "seed": 0,
        "variants": [
            _variant("dense", None, None, 0.0, False),
            _variant("dense-finetuned", None, None, 0.0, True),
            _variant("multiflow-0.9", "multiflow", 0.9, 0.9, False),
            _variant("multiflow-0.9-finetuned", "multiflow", 0.9, 0.9, True),
        ],
        "metrics": [
            _metrics("dense", "vqa", {"accuracy": [0.98, 0.97, 0.99]}),
            _metrics("dense-finetuned", "vqa", {"accuracy": [0.985, 0.975, 0.99]}),
            _metrics("multiflow-0.9", "vqa", {"accuracy": [0.31, 0.28, 0.34]}),
            _metrics("multiflow-0.9-finetuned", "vqa", {"accuracy": [0.95, 0.93, 0.97]}),
            _metrics("multiflow-0.9-finetuned", "vqa", {"accuracy": [0.951, 0.93, 0.97]}, "onnxruntime"),
            _metrics("dense", "captioning", {"bleu_4": [0.8, 0.7, 0.9], "cider": [7.5, 7.1, 7.9]}),
        ],
        "graphs": [
            {
                "variant": "multiflow-0.9-finetuned",
                "task": "vqa",
                "graph": "image_encoder",
                "precision": "fp32",
                "packed": False,
                "file": "onnx/multiflow-0.9-finetuned/vqa/image_encoder.onnx",
                "bytes": 4_200_000,
                "dense_bytes": 4_200_000,
                "nonzero_fraction": 0.1,
                "max_abs_diff": 2.4e-6,
                "cosine_min": 0.999999,
            }
        ],
        "throughput": [
            {
                "variant": "multiflow-0.9-finetuned",
                "task": "vqa",
                "graph": "image_encoder",
                "provider": "cpu",
                "precision": "fp32",
                "packed": False,
                "batch": 8,
                "dense": {"p50_ms": 10.0, "p90_ms": 11.0, "p99_ms": 12.0, "per_s": 800.0},
                "compressed": {"p50_ms": 10.1, "p90_ms": 11.0, "p99_ms": 12.5, "per_s": 792.1},
                "ratio": 0.99,
                "ratio_ci95": [0.97, 1.01],
                "verdict": "no measurable difference",
            }
        ],
        "stages": [{"name": "prune", "seconds": 1.25, "peak_rss_bytes": 900_000_000, "peak_cuda_bytes": None}],
        "environment": {
            "python": "3.11.7",
            "torch": "2.13.0",
            "onnxruntime": "1.31.1",
            "providers": ["CPUExecutionProvider"],
            "cpu": "Some | processor",
            "gpu": None,
            "driver": None,
            "threads": 2,
        },
    }


def _output(variant: str, text: str, packed: bool | None = None, **more: Any) -> dict[str, Any]:
    where = {"variant": variant, "runtime": "pytorch", "provider": "cpu", "precision": "fp32", "packed": False}
    if packed is not None:
        where |= {"runtime": "onnxruntime", "packed": packed} | ({"weights": "fp32"} if packed else {})
    return {**where, "text": text, **more}


@pytest.fixture
def rich(report: dict[str, Any]) -> dict[str, Any]:
    """The report with two ratios, layers of two modalities, packed graphs, all verdicts, and samples."""
    layers = {f"vision.blocks.{n}.{name}": 0.8 + 0.05 * n for n in range(3) for name in ("qkv", "fc1")}
    layers |= {f"text.{n}.query": 0.95 for n in range(2)} | {"text_proj": 1.0}
    report["model"]["modalities"] = {name: name.split(".")[0].removesuffix("_proj") for name in layers}
    for variant in report["variants"]:
        variant["sparsity"]["per_layer"] = layers if variant["method"] else dict.fromkeys(layers, 0.0)
    for ratio, shift in ((0.5, 0.0),):
        for name, finetuned in ((f"multiflow-{ratio}", False), (f"multiflow-{ratio}-finetuned", True)):
            report["variants"].append(_variant(name, "multiflow", ratio, ratio, finetuned))
            report["variants"][-1]["sparsity"]["per_layer"] = {layer: share / 2 for layer, share in layers.items()}
            report["metrics"].append(_metrics(name, "vqa", {"accuracy": [0.97 + shift, 0.95, 0.98]}))
    graph = report["graphs"][0]
    report["graphs"].append(graph | {"packed": True, "weights": "fp32", "bytes": 1_050_000, "file": "onnx/packed.onnx"})
    timed = report["throughput"][0]
    slower = {"compressed": timed["compressed"] | {"p50_ms": 12.5}, "ratio": 0.8, "ratio_ci95": [0.78, 0.82]}
    faster = {"compressed": timed["compressed"] | {"p50_ms": 4.76}, "ratio": 2.1, "ratio_ci95": [2.0, 2.2]}
    packed = timed | {"packed": True, "weights": "fp32"}
    report["throughput"] += [
        packed | slower | {"verdict": "slower", "batch": 1},
        packed | faster | {"verdict": "faster"},
        packed | {"graph": "itm", "note": "other processes disturbed 9 of 12 rounds"},
    ]
    tuned = "multiflow-0.9-finetuned"
    chosen = {"dataset": "scenes", "differs": True, "differing": 3, "candidates": 200}
    report["samples"] = [
        {
            "task": "vqa",
            "sample": 0,
            "images": ["samples/vqa/0.jpg"],
            "question": "what color is it?",
            "expected": ["red"],
            "outputs": [
                _output("multiflow-0.9", "blue", correct=0.0),
                _output("dense-finetuned", "red", correct=1.0),
                _output(tuned, "red", correct=1.0),
                _output(tuned, "green", packed=True, correct=0.3),
            ],
            **chosen,
        },
        {
            "task": "retrieval",
            "sample": 1,
            "images": [],
            "question": "a red circle",
            "expected": [],
            "image": "samples/retrieval/1.jpg",
            "outputs": [
                _output("dense", "", image="samples/retrieval/1.jpg", correct=1.0, rank=1),
                _output(tuned, "", image="samples/retrieval/2.jpg", correct=0.0, rank=4),
            ],
            **chosen,
        },
    ]
    return report
