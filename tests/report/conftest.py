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
