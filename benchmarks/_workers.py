"""Processes of their own that sparse_cpu.py starts: they import only what they measure.

python _workers.py memory GRAPH INPUTS.npz THREADS [LIBRARY]   # peak memory of a session and one run; - opens none
python _workers.py deepsparse GRAPH INPUTS.npz THREADS         # runs the graph once for every line read
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


def memory(graph: str, inputs: str, threads: str, library: str = "") -> None:
    """Open a session as an application would, run it once, and print the most memory the process ever held."""
    import onnxruntime

    feeds = load(inputs)
    if graph != "-":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(threads)
        if library:
            options.register_custom_ops_library(library)
        onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"]).run(None, feeds)
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    say({"peak_bytes": kilobytes * 1024})


def deepsparse(graph: str, inputs: str, threads: str) -> None:
    """Open the graph, say so, then answer every line: "ping" with nothing done, any other with a run."""
    sys.stdout = sys.stderr  # the engine's banner must not come between the answers
    from deepsparse import Engine, __version__, cpu

    arrays = [np.ascontiguousarray(array) for array in load(inputs).values()]
    engine = Engine(graph, batch_size=len(arrays[0]), num_cores=int(threads))
    outputs = engine.run(arrays)
    answers = {f"output_{index}": array for index, array in enumerate(outputs)}
    np.savez(Path(inputs).with_name("deepsparse_outputs.npz"), **answers)
    say({"version": __version__, "isa": cpu.cpu_details()[1]})
    for line in sys.stdin:
        start = time.perf_counter()
        if line.strip() != "ping":
            engine.run(arrays, val_inp=False)
        say({"seconds": time.perf_counter() - start})


def load(path: str) -> dict[str, np.ndarray]:
    """Read the arrays of an .npz file."""
    with np.load(path) as file:
        return dict(file)


def say(answer: dict[str, Any]) -> None:
    """Write one line to the process that waits for it."""
    sys.__stdout__.write(json.dumps(answer) + "\n")
    sys.__stdout__.flush()


if __name__ == "__main__":
    {"memory": memory, "deepsparse": deepsparse}[sys.argv[1]](*sys.argv[2:])
