import gc
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from vlprune.errors import RequestError
from vlprune.report import schema
from vlprune.runtime import device, timing
from vlprune.runtime.tensorrt import SparseLayers
from vlprune.runtime.timing import MIN_ROUNDS, PAIRS, compare, feeds_for, measure, watch_cpus


Write = Callable[..., Path]
SPEC = {
    "task": "retrieval", "image_size": 64, "max_length": 12,
    "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "enc_token_id": 5, "dec_token_id": 4,
}  # fmt: skip


class Machine:
    """A clock that only the two sides move, and a watch that says how disturbed each round was.

    Args:
        durations: seconds of a run: function of (side, runs so far, round, is it the first run since the other side's).
        disturbance: function of the round.

    Attributes:
        pairs: opened so far.
    """

    def __init__(
        self, durations: Callable[..., float], disturbance: Callable[[int], float] = lambda round: 0.0
    ) -> None:
        self.now = 0.0
        self.durations = durations
        self.disturbance = disturbance
        self.log: list[tuple[int, int, float]] = []  # round (-1 = warm-up), side, seconds
        self.round = -1
        self.watched = False
        self.pairs = 0

    def clock(self) -> float:
        return self.now

    def watch(self) -> Callable[[], float]:
        self.round += 1
        self.watched = True
        return self.told

    def told(self) -> float:
        self.watched = False
        return self.disturbance(self.round)

    def pair(self) -> tuple[Callable[[], None], Callable[[], None]]:
        self.pairs += 1
        return self.side(0), self.side(1)

    def side(self, side: int) -> Callable[[], None]:
        def run() -> None:
            number = self.round if self.watched else -1
            first = not self.log or self.log[-1][:2] != (number, side)
            seconds = self.durations(side, len(self.log), self.round, first)
            self.now += seconds
            self.log.append((number, side, seconds))

        return run

    def measure(self, **options: Any) -> dict[str, Any]:
        return measure(self.pair, clock=self.clock, watch=self.watch, **options)

    def counted(self, side: int, rounds: set[int] | None = None) -> list[float]:
        """The runs that should count: all but the warm-up and the first of each block."""
        blocks: dict[int, list[float]] = {}
        for number, ran, seconds in self.log:
            if number >= 0 and ran == side and (rounds is None or number in rounds):
                blocks.setdefault(number, []).append(seconds)
        return [seconds for block in blocks.values() for seconds in block[1:]]


def noisy(means: tuple[float, float], seed: int = 0) -> Callable[..., float]:
    """Runs that vary by 5 %, and whose rounds vary by 3 %."""
    random = np.random.default_rng(seed)
    rounds = 1 + 0.03 * random.standard_normal(10_000)
    return lambda side, run, number, first: means[side] * rounds[number] * (1 + 0.05 * abs(random.standard_normal()))


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_identical_pair_has_no_measurable_difference() -> None:
    row = Machine(noisy((0.01, 0.01))).measure()
    low, high = row["ratio_ci95"]
    assert row["verdict"] == "no measurable difference"
    assert low <= 1 <= high and high - low < 0.1
    assert row["ratio"] == pytest.approx(1, abs=0.01)
    assert "note" not in row and row["dropped"] == 0


@pytest.mark.parametrize(("means", "verdict", "ratio"), [((0.02, 0.01), "faster", 2.0), ((0.01, 0.02), "slower", 0.5)])
def test_a_difference_of_two_is_measured(means: tuple[float, float], verdict: str, ratio: float) -> None:
    row = Machine(noisy(means)).measure()
    low, high = row["ratio_ci95"]
    assert row["verdict"] == verdict
    assert low <= ratio <= high and high - low < 0.1 * ratio
    assert row["ratio"] == pytest.approx(ratio, rel=0.02)


def test_false_verdicts_are_as_rare_as_the_interval_says() -> None:
    wrong = 0
    for seed in range(100):
        random = np.random.default_rng(seed)
        machine = Machine(lambda *_: 0.0)
        # Each pair has its own speeds, whatever it runs, so that neither runs nor rounds are independent.
        places = 1 + 0.1 * random.random((2, 2 * PAIRS + 1))
        machine.durations = lambda side, *_, m=machine, p=places, r=random: p[side, m.pairs] * (1 + 0.02 * r.random())
        wrong += machine.measure(seconds=20.0)["verdict"] != "no measurable difference"
    assert wrong <= 9  # 3 expected; taking rounds of all pairs for independent makes most of them wrong


def test_drift_hits_both_sides_alike() -> None:
    machine = Machine(lambda *_: 0.01)
    machine.durations = lambda *_: 0.01 * (1 + machine.now)  # six times slower in the end
    row = machine.measure()
    assert row["ratio"] == pytest.approx(1, abs=0.05)
    assert row["verdict"] == "no measurable difference"


# --- what counts ------------------------------------------------------------------------------------------------------


def test_figures_are_those_of_numpy() -> None:
    machine = Machine(noisy((0.03, 0.02)))
    row = machine.measure(batch=8)
    for side, name in enumerate(("dense", "compressed")):
        p50, p90, p99 = np.percentile(machine.counted(side), (50, 90, 99))
        expected = {"p50_ms": 1e3 * p50, "p90_ms": 1e3 * p90, "p99_ms": 1e3 * p99, "per_s": 8 / p50}
        assert row[name] == pytest.approx(expected, rel=1e-12)
    assert row["ratio"] == pytest.approx(np.median(machine.counted(0)) / np.median(machine.counted(1)), rel=1e-12)
    assert row["rounds"] == machine.round + 1


def test_sides_alternate_and_lead_in_turn() -> None:
    machine = Machine(noisy((0.01, 0.01)))
    machine.measure(seconds=1)
    order = [
        side
        for i, (number, side, _) in enumerate(machine.log)
        if number >= 0 and machine.log[i - 1][:2] != (number, side)
    ]
    assert order[:8] == [0, 1, 1, 0, 0, 1, 1, 0]


def test_first_run_of_a_block_is_discarded() -> None:
    row = Machine(lambda side, run, number, first: 1.0 if first else 0.01 * (1 + side)).measure()
    assert row["dense"]["p99_ms"] == pytest.approx(10)
    assert row["compressed"]["p99_ms"] == pytest.approx(20)


def test_disturbed_rounds_are_dropped() -> None:
    def durations(side: int, run: int, number: int, first: bool) -> float:
        return 0.01 * (5 if side and number % 3 == 2 else 1)

    machine = Machine(durations, lambda number: 0.5 if number % 3 == 2 else 0.05)
    row = machine.measure()
    assert (row["rounds"], row["dropped"]) == (machine.round + 1 - (machine.round + 1) // 3, (machine.round + 1) // 3)
    assert row["compressed"]["p99_ms"] == pytest.approx(10)
    assert row["ratio_ci95"] == pytest.approx([1, 1])


def test_too_few_undisturbed_pairs_give_no_verdict() -> None:
    calm = set()
    machine = Machine(noisy((0.02, 0.01)))
    machine.disturbance = lambda number: 1.0 if machine.pairs >= PAIRS else calm.add(number) or 0.0
    row = machine.measure(seconds=4)
    assert machine.pairs == 2 * PAIRS
    assert row["verdict"] == "no measurable difference"
    rounds = machine.round + 1
    assert row["note"].startswith(f"other processes disturbed {rounds - len(calm)} of {rounds} rounds")
    assert row["rounds"] == rounds and row["dropped"] == 0
    assert row["dense"]["p90_ms"] == pytest.approx(1e3 * np.percentile(machine.counted(0), 90))
    assert 8 <= machine.now < 16


def test_measuring_goes_on_until_enough_pairs_were_undisturbed() -> None:
    machine = Machine(noisy((0.02, 0.01)))
    machine.disturbance = lambda number: 1.0 if machine.pairs <= 3 else 0.0
    row = machine.measure(seconds=4)
    assert machine.pairs == 3 + PAIRS
    assert row["rounds"] + row["dropped"] == machine.round + 1 and row["dropped"] >= 3 * MIN_ROUNDS
    assert row["verdict"] == "faster"


def test_slow_graphs_run_once_per_block_until_there_are_enough_rounds() -> None:
    machine = Machine(noisy((20.0, 10.0)))
    row = machine.measure(seconds=5)
    assert row["rounds"] == PAIRS * MIN_ROUNDS == machine.round + 1
    assert len(machine.log) == PAIRS * (4 + 4 * MIN_ROUNDS)
    assert row["verdict"] == "faster"


def test_fast_graphs_are_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(timing, "_row", lambda kept, disturbed, batch: seen.extend(kept) or {})
    Machine(lambda *_: 2e-5).measure(seconds=1)
    assert {len(side) for pair in seen for block in pair for side in block} <= set(range(timing.RUNS_KEPT + 1))
    assert timing.RUNS_KEPT < 1 / PAIRS / 8 / 2e-5


def test_the_interval_is_the_range_of_the_pairs() -> None:
    machine = Machine(lambda *_: 0.0)
    speeds = [1.0, 1.01, 0.99, 1.3, 1.02, 0.98]  # of the six pairs
    machine.durations = lambda side, *_: 0.01 * (speeds[machine.pairs - 1] if side == 0 else 1)
    row = machine.measure(seconds=6)
    assert row["ratio_ci95"] == pytest.approx([0.98, 1.3])
    assert row["verdict"] == "no measurable difference"
    assert row["ratio"] == pytest.approx(np.median(machine.counted(0)) / 0.01) == pytest.approx(1.005, abs=0.01)


def test_garbage_collection_rests_while_measuring() -> None:
    states = []
    Machine(lambda *_: states.append(gc.isenabled()) or 0.1).measure(seconds=1)
    assert not any(states) and gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        Machine(lambda *_: 1 / 0).measure()
    assert gc.isenabled()


# --- other processes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("waited", "busy", "stolen", "share"),
    [
        (0.5, 1.6, 0.0, 0.25),  # others ran 0.6 s of the 2 s, we waited 0.5 s
        (0.5, 1.0, 0.0, 0.0),  # we waited, but only for ourselves
        (0.0, 9.0, 0.0, 0.0),  # others ran, but not in our way
        (0.1, 1.6, 0.4, 0.25),
        (None, 1.6, 0.0, 0.3),  # one clue alone
        (0.5, None, 0.0, 0.25),
        (None, None, 0.0, 0.0),
    ],
)
def test_disturbance_needs_both_clues(
    waited: float | None, busy: float | None, stolen: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = SimpleNamespace(wall=10.0, own=3.0, waited=7.0, busy=100.0, stolen=1.0)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now.wall, process_time=lambda: now.own))
    monkeypatch.setattr(timing, "_waited", lambda: {} if waited is None else {"1": now.waited, "new": 50.0})
    monkeypatch.setattr(timing, "_cores", lambda: None if busy is None else (now.busy, now.stolen))
    since = watch_cpus()
    now.wall, now.own, now.stolen = 12.0, 4.0, 1.0 + stolen
    now.waited += waited or 0
    now.busy += busy or 0
    if waited is not None:  # a thread that was not there before does not count
        monkeypatch.setattr(timing, "_waited", lambda: {"1": now.waited, "newer": 70.0})
    assert since() == pytest.approx(share)


def test_proc_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/stat": "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 100 20 3 999 999 4 5 600 7 8\ncpu1 1 1 1 1 1 1 1 1 1 1\nintr 1\n",
        "/proc/self/task/1/schedstat": "5000000000 250000000 3\n",
        "/proc/self/task/2/schedstat": "0 0 0\n",
    }

    class Fake(type(Path())):
        def read_text(self, *_: Any, **__: Any) -> str:
            if str(self) not in files:
                raise FileNotFoundError(2, "gone")
            return files[str(self)]

        def glob(self, *_: Any, **__: Any) -> Any:
            return [Fake(name) for name in [*files, "/proc/self/task/3/schedstat"] if "task" in name]

    monkeypatch.setattr(timing, "Path", Fake)
    monkeypatch.setattr(timing.os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(timing.os, "sysconf", lambda _: 100)
    assert timing._cores() == (1.32, 6.0)
    assert timing._waited() == {"1": 0.25}
    files.clear()
    assert timing._cores() is None and timing._waited() == {}
    assert watch_cpus()() == 0


def test_watching_this_machine() -> None:
    assert watch_cpus()() >= 0


# --- inputs -----------------------------------------------------------------------------------------------------------


def declare(**inputs: Any) -> Any:
    types = {"pixel_values": "float", "image_states": "float", "cross_key": "float", "cross_value": "float"}
    types |= {"past_key": "float", "past_value": "float"}
    values = []
    for name, shape in inputs.items():
        name = name.replace("__", ".")
        values.append(SimpleNamespace(name=name, shape=shape, type=f"tensor({types.get(name.split('.')[0], 'int64')})"))
    return SimpleNamespace(get_inputs=lambda: values)


def shapes(feeds: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in feeds.items()}


def test_feeds_of_encoders() -> None:
    image = feeds_for(declare(pixel_values=["batch", 3, 64, 64]), SPEC, batch=5)
    assert shapes(image) == {"pixel_values": (5, 3, 64, 64)} and image["pixel_values"].dtype == np.float32

    text = feeds_for(declare(input_ids=["b", "t"], attention_mask=["b", "t"]), SPEC, batch=3)
    assert shapes(text) == {"input_ids": (3, 12), "attention_mask": (3, 12)}
    assert text["input_ids"].dtype == np.int64 and set(np.unique(text["input_ids"])) <= set(range(6))
    assert (text["attention_mask"] == 1).all()

    itm = declare(input_ids=["b", "t"], attention_mask=["b", "t"], image_states=["b", "p", 32])
    assert shapes(feeds_for(itm, SPEC, batch=2, length=7)) == {
        "input_ids": (2, 7), "attention_mask": (2, 7), "image_states": (2, 17, 32)
    }  # fmt: skip
    assert feeds_for(itm, {**SPEC, "image_tokens": 65}, batch=2)["image_states"].shape == (2, 65, 32)


@pytest.mark.parametrize(("task", "states"), [("captioning", 17), ("vqa", 12)])
def test_feeds_of_a_decoder_are_one_step(task: str, states: int) -> None:
    decoder = declare(
        input_ids=["b", "t"], attention_mask=["b", "m"], cross_mask=["b", "s"],
        past_key__0=["b", 2, "past", 8], past_value__0=["b", 2, "past", 8],
        cross_key__0=["b", 3, "s", 4], cross_value__0=["b", 3, "s", 4],
    )  # fmt: skip
    assert shapes(feeds_for(decoder, {**SPEC, "task": task}, batch=2)) == {
        "input_ids": (2, 1), "attention_mask": (2, 13), "cross_mask": (2, states),
        "past_key.0": (2, 2, 12, 8), "past_value.0": (2, 2, 12, 8),
        "cross_key.0": (2, 3, states, 4), "cross_value.0": (2, 3, states, 4),
    }  # fmt: skip


def test_feeds_depend_on_the_seed_alone() -> None:
    graph = declare(pixel_values=["b", 3, "h", "w"])
    first, again, other = (feeds_for(graph, SPEC, 1, seed=seed)["pixel_values"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize(
    ("graph", "spec", "message"),
    [
        (declare(surprise=["b"]), SPEC, "surprise"),
        (declare(input_ids=[1, "t"]), SPEC, "does not fit batch size 2"),
        (declare(input_ids=["b", "t", "u"]), SPEC, "input_ids"),
        (declare(past_key__0=["b", "h", "past", 8]), SPEC, "past_key.0"),
        (declare(input_ids=["b", "t"]), {"task": "vqa"}, "max_length"),
    ],
)
def test_feeds_that_cannot_be_made(graph: Any, spec: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        feeds_for(graph, spec, batch=2)


# --- the whole --------------------------------------------------------------------------------------------------------


@pytest.fixture
def encoder(write: Write) -> Callable[..., Path]:
    def save(name: str, batch: Any = "batch") -> Path:
        node = helper.make_node("Relu", ["pixel_values"], ["image_embeds"])
        shape = [batch, 3, 64, 64]
        return write(
            name, [node], [("pixel_values", TensorProto.FLOAT, shape)], [("image_embeds", TensorProto.FLOAT, shape)]
        )

    return save


def test_compare_times_two_files(encoder: Callable[..., Path]) -> None:
    row = compare(encoder("dense.onnx"), encoder("pruned.onnx"), spec=SPEC, batch=2, threads=1, seconds=0.02)
    assert row.keys() - {"note"} == {"dense", "compressed", "ratio", "ratio_ci95", "verdict", "rounds", "dropped"}
    assert row["rounds"] >= MIN_ROUNDS
    assert row["dense"]["p50_ms"] > 0
    assert row["ratio"] == pytest.approx(row["dense"]["p50_ms"] / row["compressed"]["p50_ms"])


def test_compare_refuses_what_it_cannot_run(encoder: Callable[..., Path], write: Write, tmp_path: Path) -> None:
    dense = encoder("dense.onnx")
    with pytest.raises(RequestError, match="there is no ONNX file"):
        compare(dense, tmp_path / "missing.onnx", spec=SPEC)
    with pytest.raises(RequestError, match="batch size 2"):
        compare(dense, encoder("static.onnx", batch=1), spec=SPEC, batch=2)
    node = helper.make_node("Reshape", ["pixel_values", "shape"], ["image_embeds"])
    ends = [("pixel_values", TensorProto.FLOAT, ["b", 3, 64, 64])], [("image_embeds", TensorProto.FLOAT, [7, 7])]
    fails = write("fails.onnx", [node], *ends, {"shape": np.array([7, 7])})
    with pytest.raises(RequestError, match="does not run") as error:
        compare(dense, fails, spec=SPEC)
    assert "\n" not in str(error.value)
    with pytest.raises(RequestError, match="--provider cuda"):
        compare(dense, dense, spec=SPEC, cuda_graph=True)


def test_a_gpu_is_timed_with_and_without_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def bound(path: str, provider: str, feeds: Any, threads: int | None, cuda_graph: bool) -> device.Bound:
        assert (provider, cuda_graph) == ("cuda", True)
        nodes = {"cuda": 12, "cpu": 3} if path == "dense" else {"cuda": 9}

        def run() -> None:
            ran.append(path)
            time.sleep(1e-4 if path == "dense" else 5e-5)

        return device.Bound(None, run, lambda: ran.append("copies") or run() or [], nodes, SparseLayers(48, 2))

    seen = iter([{"sm_mhz": 1980.0, "throttled": []}, {"sm_mhz": 1755.0, "throttled": ["power cap"]}])
    monkeypatch.setattr(timing, "bind", bound)
    monkeypatch.setattr(timing, "gpu_state", lambda: next(seen))
    row = compare("dense", "pruned", spec=SPEC, batch=32, provider="cuda", seconds=0.02, cuda_graph=True)
    assert row["nodes"] == {"dense": {"cuda": 12, "cpu": 3}, "compressed": {"cuda": 9}}
    assert row["end_to_end"].keys() == {"dense", "compressed", "ratio", "ratio_ci95", "verdict"}
    assert row["gpu"][1]["throttled"] == ["power cap"] and row["cuda_graph"]
    assert row["sparse_layers"] == {"eligible": 48, "chosen": 2}
    assert ran.index("copies") > 2 * MIN_ROUNDS and ran.count("copies") > 2 * MIN_ROUNDS
    told = {"variant": "a", "task": "retrieval", "graph": "g", "provider": "cuda", "precision": "fp16", "batch": 32}
    assert not list(schema._mismatches({**told, "packed": False, **row}, schema.Throughput, ""))
