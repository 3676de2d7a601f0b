"""What the edge runner costs: cold start, peak memory, seconds per image.

python benchmarks/edge.py                                   # bundles of blip-tiny are made first
python benchmarks/edge.py --bundle FILE --image photo.jpg   # any bundle
python benchmarks/edge.py --quick --json

Every figure is of a process of its own that imports nothing but numpy, Pillow, tokenizers, zstandard, onnxruntime, and
what the edge runner takes of vlprune. Cold start: from the start of the process to the first answer.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vlprune.report.terminal import console, table


IMAGES, REPEATS = 32, 5


def worker(bundle: str, image: str, count: str, threads: str) -> None:
    """Open a bundle, answer about an image, then about several; print what it took.

    Args:
        bundle: file.
        image: file.
        count: images.
        threads: CPU threads of one operator.
    """
    start = time.perf_counter()
    from vlprune.bundle.runner import open_bundle

    imported = time.perf_counter()
    opened = open_bundle(bundle, threads=int(threads))
    ready = time.perf_counter()
    text = "what color is it"

    def answer(number: int) -> None:
        images = [image] * number
        if opened.task == "captioning":
            opened.caption(images)
        elif opened.task == "vqa":
            opened.answer(images, [text] * number)
        elif opened.task == "retrieval":
            opened.match(images, [text] * number)
        else:
            opened.classify(images)

    answer(1)
    first = time.perf_counter()
    for _ in range(int(count)):
        answer(1)
    single = (time.perf_counter() - first) / int(count)
    before = time.perf_counter()
    answer(8)
    batched = (time.perf_counter() - before) / 8
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    heavy = sorted({"torch", "transformers", "onnx"} & sys.modules.keys())
    found = {"import": imported - start, "open": ready - imported, "first": first - ready, "peak_bytes": peak}
    print(json.dumps({**found, "single": single, "batched": batched, "task": opened.task, "heavy": heavy}))


def measure(bundle: Path, image: Path, count: int, repeats: int, threads: int) -> dict[str, Any]:
    """Run the worker several times.

    Args:
        bundle: file.
        image: file.
        count: images per run.
        repeats: runs.
        threads: CPU threads of one operator.

    Returns:
        dict[str, Any]: medians over the runs, in seconds and bytes.

    Raises:
        RuntimeError: the worker failed, or imported what an edge device has not.
    """
    runs = []
    for _ in range(repeats):
        command = [sys.executable, __file__, "worker", str(bundle), str(image), str(count), str(threads)]
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        whole = time.perf_counter() - start
        if done.returncode:
            raise RuntimeError(f"the worker failed: {done.stderr.strip()[-500:]}")
        row = json.loads(done.stdout)
        if row["heavy"]:
            raise RuntimeError(f"the worker imported {', '.join(row['heavy'])}")
        busy = count * row["single"] + 8 * row["batched"]
        runs.append(row | {"cold": whole - busy})
    keys = ("cold", "import", "open", "first", "single", "batched", "peak_bytes")
    found = {key: statistics.median(run[key] for run in runs) for key in keys}
    return {"task": runs[0]["task"], "bundle_bytes": bundle.stat().st_size, **found}


def make_bundles(folder: Path, tasks: list[str]) -> list[tuple[str, Path]]:
    """Make bundles of blip-tiny, plain and packed.

    Args:
        folder: an existing one.
        tasks: of the model.

    Returns:
        list[tuple[str, Path]]: form and file.
    """
    from vlprune import pipeline
    from vlprune.bundle.make import make_bundle

    run = folder / "run"
    pipeline.prune("blip-tiny", output=run, ratios=[0.9], method="omp", device="cpu")
    pipeline.export(run, tasks=tasks, pack="sparse", values="fp16")
    made = []
    forms: dict[str, dict[str, Any]] = {
        "dense": {"variant": "dense", "packed": False},
        "masks": {"packed": False},
        "packed fp16": {},
    }
    for task in tasks:
        for form, options in forms.items():
            path = folder / f"{task}-{form.replace(' ', '-')}.vlp.tar.zst"
            make_bundle(run, task, path, **options)
            made.append((form, path))
    return made


def main() -> None:
    """Read the options, measure, print."""
    if sys.argv[1:2] == ["worker"]:
        worker(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, action="append", help="a bundle to measure; repeatable")
    parser.add_argument("--image", type=Path, help="the image to ask about; a drawn scene if left out")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads [all]")
    parser.add_argument("--quick", action="store_true", help="few runs: does it work")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    count, repeats = (2, 1) if given.quick else (IMAGES, REPEATS)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        image = given.image
        if image is None:
            from vlprune.data.scenes import scene

            image = Path(name) / "scene.png"
            scene("test", 0).draw().save(image)
        tasks = ["retrieval"] if given.quick else ["retrieval", "captioning", "vqa"]
        bundles = [("", path) for path in given.bundle] if given.bundle else make_bundles(Path(name), tasks)
        rows = [{"form": form, **measure(path, image, count, repeats, given.threads)} for form, path in bundles]
    if given.json:
        print(json.dumps({"threads": given.threads, "rows": rows}, indent=1))
        return
    shown = [
        {"task": row["task"], "form": row["form"], "MB": row["bundle_bytes"] / 1e6, "cold start s": row["cold"]}
        | {"import s": row["import"], "open s": row["open"], "first ms": 1e3 * row["first"]}
        | {"per image ms": 1e3 * row["single"], "of 8, ms": 1e3 * row["batched"], "peak MB": row["peak_bytes"] / 1e6}
        for row in rows
    ]
    console().print(table(f"Edge runner, {given.threads} threads, medians of {repeats} processes", shown))


if __name__ == "__main__":
    main()
