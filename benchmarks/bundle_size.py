"""How small a bundle is, held against the dense weights in fp32, those that graphs share counted once.

python benchmarks/bundle_size.py                  # blip-base-random for retrieval, 90 % pruned by magnitude
python benchmarks/bundle_size.py --quick --json   # blip-tiny

The weights of blip-base-random are random; those of blip-tiny, which lie in the package as float16, lose nothing when
they are rounded. The first row is what zstd makes of the dense weights alone.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from vlprune import pipeline
from vlprune.bundle.make import make_bundle
from vlprune.report.terminal import console, table


RATIO, TASK = 0.9, "retrieval"
# form -> how the run packs its graphs, the options of the bundle, and the largest ratio wanted of BLIP-base
FORMS: dict[str, tuple[str | None, dict[str, Any], float | None]] = {
    "dense, fp32": (None, {"variant": "dense", "packed": False}, None),
    "masks, fp32": (None, {"packed": False}, None),
    "packed, fp32": ("fp32", {}, 0.23),
    "packed, fp32, embeddings fp16": ("fp32", {"embeddings": "fp16"}, None),
    "packed, fp16": ("fp16", {}, 0.135),  # tables of embeddings, too
}


def measure(model: str, folder: Path) -> list[dict[str, Any]]:
    """Make a run and bundles of it in all forms.

    Args:
        model: alias.
        folder: for the run and the bundles; an existing one.

    Returns:
        list[dict[str, Any]]: per form its `bytes`, `dense_bytes`, their `ratio`, the `wanted` ratio, the largest
            `difference` from the plain graphs on the stored input.
    """
    run, data = folder / "run", {TASK: "scenes"}
    pipeline.prune(model, output=run, ratios=[RATIO], method="omp", device="cpu")
    rows, exported = [], None
    for form, (values, options, wanted) in FORMS.items():
        if values is not None and values != exported:
            pipeline.export(run, data=data, tasks=[TASK], pack="sparse", values=values, resume=exported is not None)
            exported = values
        elif exported is None:
            pipeline.export(run, data=data, tasks=[TASK])
            exported = "none"
        made = make_bundle(run, TASK, folder / "bundle.vlp.tar.zst", **options)
        difference = max(made["differences"].values())
        sizes = {key: made[key] for key in ("bytes", "dense_bytes", "ratio")}
        rows.append({"form": form, **sizes, "wanted": wanted, "difference": difference})
    return rows


def main() -> None:
    """Read the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    model = "blip-tiny" if given.quick else "blip-base-random"
    with tempfile.TemporaryDirectory() as name:
        rows = measure(model, Path(name))
    if given.quick:
        rows = [row | {"wanted": None} for row in rows]
    if given.json:
        print(json.dumps({"model": model, "task": TASK, "pruned": RATIO, "rows": rows}, indent=1))
        return
    shown = [
        {"form": row["form"], "MB": row["bytes"] / 1e6, "of dense": row["ratio"], "wanted": row["wanted"] or ""}
        | {"difference": row["difference"]}
        for row in rows
    ]
    title = f"{model}, {TASK}, {RATIO:.0%} pruned; dense fp32 weights: {rows[0]['dense_bytes'] / 1e6:,.1f} MB"
    console().print(table(title, shown))


if __name__ == "__main__":
    main()
