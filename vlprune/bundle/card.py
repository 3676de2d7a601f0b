"""README.md of a bundle: a model card in the form of Hugging Face, with nothing in it that was not measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from vlprune.bundle.manifest import Manifest


# Hugging Face's names of the tasks.
_PIPELINES = {
    "retrieval": "feature-extraction",
    "captioning": "image-to-text",
    "vqa": "visual-question-answering",
    "zero-shot": "zero-shot-image-classification",
    "classification": "image-classification",
    "nlvr": "visual-question-answering",
}
_CALLS = {
    "retrieval": 'bundle.match("photo.jpg", "a dog on a beach")',
    "captioning": 'bundle.caption("photo.jpg")',
    "vqa": 'bundle.answer("photo.jpg", "what color is the dog?")',
    "zero-shot": 'bundle.classify("photo.jpg", classes=["cat", "dog"])',
    "classification": 'bundle.classify("photo.jpg")',
    "nlvr": 'bundle.judge("left.jpg", "right.jpg", "both show a dog")',
}


def render_card(manifest: Manifest, report: Mapping[str, Any]) -> str:
    """Write the model card.

    Args:
        manifest: of the bundle; its `files` are not used.
        report: report.json of the run.

    Returns:
        str: Markdown with YAML front matter.
    """
    task, variant = manifest["task"], manifest["variant"]
    name = manifest["model"]["name"]
    title = f"{name} for {task}, {variant}"
    row = next(row for row in report["variants"] if row["id"] == variant)
    head = {
        "pipeline_tag": _PIPELINES[task],
        "library_name": "vlprune-edge",
        "tags": ["vlprune", "onnx", *(["pruning", "sparsity", row["method"]] if row["method"] else [])],
        "model-index": [{"name": title, "results": _results(manifest)}],
    }
    front = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    parts = [f"---\n{front}---\n", f"# {title}\n", _about(manifest, row), _scores(manifest), _use(manifest)]
    return "\n".join(parts)


def _results(manifest: Manifest) -> list[dict[str, Any]]:
    """Scores of this variant as Hugging Face reads them; those of the dense model stand in the text."""
    return [
        {
            "task": {"type": _PIPELINES[manifest["task"]], "name": manifest["task"]},
            "dataset": {"type": row["dataset"], "name": f"{row['dataset']}, n = {row['n']}"},
            "metrics": [
                {"type": metric, "value": value, "name": f"{metric}, {_form(row)}"}
                for metric, value in row["values"].items()
            ],
        }
        for row in manifest["metrics"]
        if row["variant"] == manifest["variant"]
    ]


def _about(manifest: Manifest, row: Mapping[str, Any]) -> str:
    model = manifest["model"]
    lines = [
        f"Graphs for ONNX Runtime, made by vlprune {manifest['vlprune']} from `{model['name']}` "
        f"({manifest['family']}, {model['parameters']:,} weights"
        + (f", SHA-256 of the checkpoint {model['checkpoint_sha256']}" if model["checkpoint_sha256"] else "")
        + ").",
    ]
    if row["method"]:
        lines.append(
            f"Pruned by {row['method']} ({row['pattern']}): {row['sparsity']['achieved']:.2%} of the prunable weights "
            f"removed{', then fine-tuned for ' + manifest['task'] if row['finetuned'] else ''}."
        )
    if model["random_weights"]:
        lines.append("**The weights are random: sizes and speed mean something, scores do not.**")
    if manifest["packed"]:
        lines.append(
            f"The graphs are packed, values in {manifest['values']}: they need the operators of vlprune-edge and "
            "ONNX Runtime's CPU provider."
        )
    elif manifest["precision"] != "fp32":
        lines.append(f"The graphs compute in {manifest['precision']}.")
    if manifest["embeddings"] == "fp16":
        lines.append("Tables of embeddings are stored as fp16. The scores below were measured before that rounding.")
    worst = max(manifest["differences"].values())
    lines.append(
        f"On the stored input (image {manifest['example']}) the outputs differ from those of the plain fp32 graphs of "
        f"the same model by {worst:.1e} at most, relative to the largest value where that is above 1."
    )
    return "\n".join(lines) + "\n"


def _scores(manifest: Manifest) -> str:
    rows = manifest["metrics"]
    if not rows:
        return "## Scores\n\nNone were measured.\n"
    metrics = list(dict.fromkeys(metric for row in rows for metric in row["values"]))
    order = sorted(rows, key=lambda row: (row["variant"] != manifest["variant"], row["variant"], row["runtime"]))
    lines = [
        "## Scores\n",
        "As measured by the run, with 95 % bootstrap intervals over samples; the dense models beside the pruned one.\n",
        f"| model | runtime | data | n | {' | '.join(metrics)} |",
        f"| --- | --- | --- | --- |{' --- |' * len(metrics)}",
    ]
    lines += [
        f"| {row['variant']} | {_form(row)} | {row['dataset']} | {row['n']} | "
        + " | ".join(_value(row, metric) for metric in metrics)
        + " |"
        for row in order
    ]
    return "\n".join(lines) + "\n"


def _form(row: Mapping[str, Any]) -> str:
    form = f"packed {row.get('weights', 'fp32')}" if row["packed"] else row["precision"]
    return f"{row['runtime']} {row['provider']} {form}"


def _value(row: Mapping[str, Any], metric: str) -> str:
    if metric not in row["values"]:
        return ""
    low, high = row["ci95"].get(metric, (None, None))
    interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
    return f"{row['values'][metric]:.3f}{interval}"


def _use(manifest: Manifest) -> str:
    return f"""## Use

    pip install ./edge      # in a clone of vlprune: its folder edge/
    vlprune-edge verify FILE

```python
import vlprune_edge

bundle = vlprune_edge.open("FILE")
print({_CALLS[manifest["task"]]})
```

The licence is that of the model and of the data it was trained on; vlprune adds none.
"""
