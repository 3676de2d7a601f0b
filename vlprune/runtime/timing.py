"""Fair timing of a compressed graph against the dense one, both exported the same way.

Two sessions on one machine disturb each other, and both are disturbed by whatever else runs. So:

* rounds of two blocks, one per side, in the order A B, B A, A B ...: a drift of the clock speed hits both sides alike;
* the first run of every block is thrown away: it finds the other side's data in the caches;
* rounds during which other processes took cores away from this one are thrown away;
* on a CPU both graphs are opened again several times: where their memory happens to lie makes one file up to 20 %
  faster or slower than itself, for as long as it stays open, which no number of rounds would show;
* on a GPU inputs and outputs lie in its memory, and every run is waited for: copies are timed apart;
* the 95 % interval of the ratio is the range of the ratios of six such pairs, on a GPU of six stretches of time: all
  six lie on one side of the truth once in 32 times, whatever their distribution. Neither runs nor rounds of one pair
  are independent.
"""

import contextlib
import gc
import itertools
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlprune.errors import RequestError
from vlprune.runtime.device import Bound, bind, gpu_state, states
from vlprune.runtime.generate import Arrays
from vlprune.runtime.session import DTYPES, refusals


PAIRS = 6  # with undisturbed rounds, needed for a verdict: 1 - 2 / 2 ** 6 = 96.9 %; twice as many are tried
MIN_ROUNDS = 2  # per pair, and an even number: each side leads as often
MAX_DISTURBANCE = 0.1  # cores taken away during a round
RUNS_KEPT = 50  # per block; more runs of a tiny graph tell nothing new about it
PATCH = 16  # pixels per image token and side, where task.json does not count the tokens

Run = Callable[[], object]  # runs a graph once, to the end
Watch = Callable[[], Callable[[], float]]  # starts to watch; the result tells the disturbance since
Round = list[list[float]]  # per side, per run: seconds


def compare(
    dense: Path | str,
    compressed: Path | str,
    *,
    spec: Mapping[str, Any],
    batch: int = 1,
    provider: str = "cpu",
    threads: int | None = None,
    seconds: float = 5.0,
    seed: int = 0,
    cuda_graph: bool = False,
) -> dict[str, Any]:
    """Time a compressed graph against the dense one on the same random inputs.

    Inputs and outputs lie where the graph runs: on a GPU the times are those of the device alone, and `end_to_end` has
    those with the copies from and to numpy arrays.

    Args:
        dense: ONNX file of the dense model.
        compressed: ONNX file of the same graph of the compressed model.
        spec: task.json.
        batch: samples per run.
        provider: "cpu", "cuda" or "tensorrt".
        threads: CPU threads, None = as many as the process may use.
        seconds: time to measure for, without that of opening; slow graphs take `PAIRS * MIN_ROUNDS` rounds, disturbed
            ones up to twice the time.
        seed: of the inputs.
        cuda_graph: record the kernels of each graph once, and start them all at once; not on a CPU.

    Returns:
        dict[str, Any]: see `measure`; of a GPU also `end_to_end`, `nodes`, `gpu`, `cuda_graph` and `sparse_layers`, see
            `vlprune.report.schema.Throughput`.

    Raises:
        RequestError: a file is missing or broken, or has an input no task knows.
        MachineError: the provider cannot be used here.
    """
    if cuda_graph and provider == "cpu":
        raise RequestError("--cuda-graph records what a GPU does: use it with --provider cuda or tensorrt")

    def feeds(graph: Any) -> Arrays:
        return feeds_for(graph, spec, batch, seed=seed)

    def opened(*paths: Path | str) -> list[Bound]:
        return [bind(path, provider, feeds, threads, cuda_graph) for path in paths]

    turns = itertools.cycle((False, True))  # opened second, a graph was often a percent or two faster than itself

    def pair() -> tuple[Run, Run]:
        if next(turns):
            after, before = opened(compressed, dense)
        else:
            before, after = opened(dense, compressed)
        return before.run, after.run

    with refusals(f"{compressed} cannot be timed against {dense}"):
        if provider == "cpu":
            return measure(pair, batch=batch, seconds=seconds)
        # TensorRT builds an engine when it opens a graph, so that is done once: intervals tell no openings apart.
        before, after = opened(dense, compressed)
        seen = [gpu_state()]
        row = measure(lambda: (before.run, after.run), batch=batch, seconds=seconds)
        seen.append(gpu_state())
        whole = measure(lambda: (before.whole, after.whole), batch=batch, seconds=seconds / 2)
    row["end_to_end"] = {key: whole[key] for key in ("dense", "compressed", "ratio", "ratio_ci95", "verdict")}
    nodes = {"dense": before.nodes, "compressed": after.nodes}
    row |= {"nodes": nodes, "cuda_graph": cuda_graph, **states(*seen)}
    if after.sparse is not None:
        row["sparse_layers"] = {"eligible": after.sparse.eligible, "chosen": after.sparse.chosen}
    return row


def measure(
    pair: Callable[[], tuple[Run, Run]],
    *,
    batch: int = 1,
    seconds: float = 5.0,
    clock: Callable[[], float] = time.perf_counter,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Time two functions against each other, see the top of this file.

    Args:
        pair: makes both, dense and compressed, anew where that can change how fast they are; called once per pair, when
            those of the last one are gone.
        batch: samples per run.
        seconds: time to measure for, without that of `pair`.
        clock: seconds.
        watch: starts watching for other processes; `watch_cpus` by default.

    Returns:
        dict[str, Any]: `dense` and `compressed` {p50_ms, p90_ms, p99_ms, per_s (samples per second at the median)};
            `ratio` of the medians, dense / compressed, above 1 = compressed is faster; `ratio_ci95`; `verdict`
            "faster", "slower" or "no measurable difference"; `rounds` the figures are from; `dropped` ones; and `note`
            where too few undisturbed rounds were left for a verdict: the figures are then from all rounds.
    """
    watch = watch or watch_cpus
    kept: list[list[Round]] = []  # per pair
    disturbed: list[list[Round]] = []
    gc_was_on = gc.isenabled()
    gc.disable()
    try:
        while len(kept) < PAIRS or (sum(map(bool, kept)) < PAIRS and len(kept) < 2 * PAIRS):
            calm, rest = _pair(pair(), seconds / PAIRS, clock, watch)
            kept.append(calm)
            disturbed.append(rest)
    finally:
        if gc_was_on:
            gc.enable()
    return _row(kept, disturbed, batch)


def feeds_for(
    graph: Any,  # onnxruntime.InferenceSession
    spec: Mapping[str, Any],
    batch: int,
    length: int | None = None,
    seed: int = 0,
) -> Arrays:
    """Make random inputs of the right names, types and shapes; they are valid, not meaningful.

    Texts have no padding. A decoder gets its commonest call: one new token after `length` cached ones.

    Args:
        graph: open session of a task's graph.
        spec: task.json.
        batch: B.
        length: T, None = the task's `max_length`.
        seed: of the values.

    Returns:
        Arrays: one array per input.

    Raises:
        RequestError: the graph has an input that no task knows, a size nobody tells, or a fixed batch size.
    """
    inputs = {value.name: value for value in graph.get_inputs()}
    try:
        length = length or (int(spec["max_length"]) if inputs.keys() != {"pixel_values"} else 1)
        size, task = int(spec["image_size"]), str(spec["task"])
        states = int(spec.get("image_tokens") or (size // PATCH) ** 2 + 1)
        tokens = [int(value) for key, value in spec.items() if key.endswith("_token_id")]
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f"task.json has no usable {error}: export the task again") from error
    decoder = "past_key.0" in inputs
    if task == "vqa" and decoder:  # the answer decoder reads the question's states, not the image's
        states = length
    text = 1 if decoder else length
    cached = length if decoder else 0
    # Dimensions by the graphs' contract; 0 = known to the graph alone.
    contract = {
        "pixel_values": [batch, 3, size, size],
        "input_ids": [batch, text],
        "attention_mask": [batch, cached + text],
        "image_states": [batch, states, 0],
        "cross_mask": [batch, states],
        "cross_key": [batch, 0, states, 0],
        "cross_value": [batch, 0, states, 0],
        "past_key": [batch, 0, cached, 0],
        "past_value": [batch, 0, cached, 0],
    }
    random = np.random.default_rng(seed)
    feeds: Arrays = {}
    for name, value in inputs.items():
        wanted, dtype = contract.get(name.split(".")[0]), DTYPES.get(value.type)
        if wanted is None or dtype is None or len(wanted) != len(value.shape):
            raise RequestError(f"graph input {name} {value.shape} is of no task vlprune knows: it cannot be timed")
        pairs = zip(value.shape, wanted, strict=True)
        shape = [own if isinstance(own, int) else asked for own, asked in pairs]
        if shape[0] != batch or 0 in shape:
            raise RequestError(
                f"graph input {name} {value.shape} does not fit batch size {batch}: export the task again"
            )
        if name.endswith("_mask"):
            feeds[name] = np.ones(shape, dtype)
        elif name == "input_ids":  # the vocabulary is larger than the special tokens' ids
            feeds[name] = random.integers(0, max(tokens, default=0) + 1, shape).astype(dtype)
        else:
            feeds[name] = random.standard_normal(shape, np.float32).astype(dtype)
    return feeds


def watch_cpus() -> Callable[[], float]:
    """Watch for other processes taking cores away from this one.

    Two clues, and both must agree: the time this process's threads were ready to run but had no core (which counts
    plain wake-up delays, too), and the time the cores this process may use were busy with something else (which counts
    neighbours that harm nobody, too, and in ticks of 10 ms). Time that a hypervisor stole counts by itself.

    Returns:
        Callable[[], float]: the number of cores taken away since then, on average; 0 where /proc does not tell.
    """
    start, own, waited, cores = time.perf_counter(), time.process_time(), _waited(), _cores()

    def share() -> float:
        passed = max(time.perf_counter() - start, 1e-9)
        here, clues, stolen = time.process_time() - own, [], 0.0
        if later := _waited():
            clues.append(sum(seconds - waited.get(thread, seconds) for thread, seconds in later.items()))
        if (after := _cores()) and cores:
            clues.append(max(0.0, after[0] - cores[0] - here))
            stolen = after[1] - cores[1]
        return (min(clues, default=0.0) + stolen) / passed

    return share


def _waited() -> dict[str, float]:
    """Seconds that each thread of this process was ready to run without a core, since it began."""
    found = {}
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, IndexError, ValueError):  # the thread has ended
            ran, waited = path.read_text().split()[:2]
            if int(ran):  # some kernels show nothing but zeros
                found[path.parent.name] = int(waited) / 1e9
    return found


def _cores() -> tuple[float, float] | None:
    """Seconds that the cores this process may use were busy, and stolen by a hypervisor, since the machine started."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
    except OSError:
        return None
    ours = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    ticks = [[int(field) for field in line.split()[1:9]] for line in lines if line.split(" ", 1)[0] in ours]
    if not ticks or min(map(len, ticks)) < 8:
        return None
    user, nice, system, _, _, hardware, software, stolen = np.sum(ticks, axis=0) / os.sysconf("SC_CLK_TCK")
    return float(user + nice + system + hardware + software), float(stolen)


def _pair(
    sides: tuple[Run, Run], seconds: float, clock: Callable[[], float], watch: Watch
) -> tuple[list[Round], list[Round]]:
    """Rounds of one pair, undisturbed ones and the others."""
    slowest = max(_warm_up(run, seconds / 10, clock) for run in sides)
    runs = max(1, round(seconds / 8 / max(slowest, 1e-9)))  # per block: four rounds fit into the time
    kept: list[Round] = []
    disturbed: list[Round] = []
    start = clock()
    while (total := len(kept) + len(disturbed)) < MIN_ROUNDS or total % 2 or clock() - start < seconds:
        since = watch()
        block: Round = [[], []]
        for side in (0, 1) if total % 2 == 0 else (1, 0):
            block[side] = _block(sides[side], runs, clock)
        (disturbed if since() > MAX_DISTURBANCE else kept).append(block)
    return kept, disturbed


def _warm_up(run: Run, seconds: float, clock: Callable[[], float]) -> float:
    """Run until caches, memory pools and clock speeds have settled; seconds per run, without the first."""
    run()
    start, count = clock(), 0
    while count == 0 or clock() - start < seconds:
        run()
        count += 1
    return (clock() - start) / count


def _block(run: Run, runs: int, clock: Callable[[], float]) -> list[float]:
    """Seconds of each run after a first one that does not count."""
    run()
    times = []
    for _ in range(runs):
        begin = clock()
        run()
        times.append(clock() - begin)
    return times[:: -(-runs // RUNS_KEPT)]


def _row(kept: list[list[Round]], disturbed: list[list[Round]], batch: int) -> dict[str, Any]:
    enough = sum(map(bool, kept)) >= PAIRS
    dropped = sum(map(len, disturbed))
    pairs = kept if enough else [[*calm, *rest] for calm, rest in zip(kept, disturbed, strict=True)]
    times = [[np.concatenate([block[side] for block in pair]) for side in (0, 1)] for pair in pairs if pair]
    dense, compressed = (np.concatenate([pair[side] for pair in times]) for side in (0, 1))
    ratio = float(np.median(dense) / np.median(compressed))
    low, high = _interval(ratio, times)
    verdict = "no measurable difference"
    if enough and not low <= 1 <= high:
        verdict = "faster" if low > 1 else "slower"
    rounds = sum(map(len, pairs))
    row = {
        "dense": _summary(dense, batch),
        "compressed": _summary(compressed, batch),
        "ratio": ratio,
        "ratio_ci95": [low, high],
        "verdict": verdict,
        "rounds": rounds,
        "dropped": dropped if enough else 0,
    }
    if not enough:
        row["note"] = f"other processes disturbed {dropped} of {rounds} rounds, too many for a verdict"
    return row


def _summary(times: np.ndarray, batch: int) -> dict[str, float]:
    p50, p90, p99 = (float(value) for value in np.percentile(times, (50, 90, 99)))
    return {"p50_ms": p50 * 1e3, "p90_ms": p90 * 1e3, "p99_ms": p99 * 1e3, "per_s": batch / p50}


def _interval(ratio: float, pairs: list[list[np.ndarray]]) -> tuple[float, float]:
    """Range of the pairs' own ratios of medians, and of the one of all runs."""
    ratios = [ratio, *(float(np.median(dense) / np.median(compressed)) for dense, compressed in pairs)]
    return min(ratios), max(ratios)
