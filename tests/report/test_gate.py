"""What the gate says of reports made by hand; and that no number, made worse, ever turns a failure into a pass."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlprune.errors import RequestError
from vlprune.report import checks as results
from vlprune.report.gate import Check, judge
from vlprune.report.limits import Drop, Limits
from vlprune.report.read import read_report
from vlprune.report.schema import validate_report


TUNED, OTHER = "multiflow-0.9-finetuned", "multiflow-0.9"


@pytest.fixture
def ready(report: dict[str, Any]) -> dict[str, Any]:
    """A report of one task, vqa, that lacks nothing."""
    report["metrics"] = [row for row in report["metrics"] if row["task"] == "vqa"]
    return report


def _judge(report: dict[str, Any], baseline: dict[str, Any] | None = None, **limits: Any) -> list[Check]:
    chosen = {key: limits.pop(key) for key in ("variants", "against", "forms") if key in limits}
    return judge(report, Limits(limits, **chosen), baseline)  # type: ignore[arg-type]


def _statuses(checks: list[Check]) -> list[str]:
    return [check.status for check in checks]


def _row(report: dict[str, Any], variant: str, runtime: str = "pytorch") -> dict[str, Any]:
    return next(row for row in report["metrics"] if (row["variant"], row["runtime"]) == (variant, runtime))


# --- sparsity ---------------------------------------------------------------------------------------------------------


def test_sparsity(ready: dict[str, Any]) -> None:
    assert _statuses(_judge(ready, min_sparsity=0.9)) == ["pass"]
    (check,) = _judge(ready, min_sparsity=0.95)
    assert (check.status, check.variant, check.value) == ("fail", TUNED, 0.9)
    assert str(check) == f"min_sparsity of {TUNED} (all prunable layers): 0.9000; allowed: at least 0.95"


def test_a_ratio_is_met_to_one_weight(ready: dict[str, Any]) -> None:
    for share, status in ((0.8999998, "pass"), (0.8998, "fail")):
        ready["variants"][3]["sparsity"]["achieved"] = share
        assert _statuses(_judge(ready, min_sparsity=0.9)) == [status]


def test_sparsity_by_modality_and_task(ready: dict[str, Any]) -> None:
    ready["variants"][3]["sparsity"]["per_modality"]["text"] = 0.7
    checks = _judge(ready, min_sparsity={"vision": 0.9, "text": 0.8, "vqa": 0.85})
    assert {(check.subject, check.status) for check in checks} == {
        ("vision", "pass"), ("text", "fail"), ("all prunable layers", "pass"),
    }  # fmt: skip
    part = {"sparsity": {"achieved": 0.5, "per_modality": {"vision": 0.4}, "per_layer": {}}, "parameters": 1}
    ready["variants"][3]["per_task"] = {"vqa": {**part, "flops": {}, "dense_parameters": 2}}
    (check,) = _judge(ready, min_sparsity=0.6)  # the mean over tasks hides what each lacks
    assert (check.subject, check.status) == ("vqa", "fail")
    (check,) = _judge(ready, min_sparsity={"vqa": {"vision": 0.3}})
    assert (check.subject, check.status) == ("vqa / vision", "pass")


# --- scores -----------------------------------------------------------------------------------------------------------


def test_drops_are_in_points_against_every_dense_variant(ready: dict[str, Any]) -> None:
    checks = _judge(ready, max_metric_drop=Drop(3.4))
    found = {(check.place, check.status, round(check.value or 0, 6)) for check in checks}
    assert found == {
        ("pytorch cpu plain, against dense", "pass", 3.0),
        ("onnxruntime cpu plain, against dense", "pass", 2.9),
        ("pytorch cpu plain, against dense-finetuned", "fail", 3.5),
        ("onnxruntime cpu plain, against dense-finetuned", "pass", 3.4),  # exactly the limit
    }
    assert _statuses(_judge(ready, max_metric_drop=Drop(3.4), against=["dense"])) == ["pass", "pass"]
    relative = _judge(ready, max_metric_drop=Drop(3.5, relative=True), against=["dense-finetuned"])
    assert _statuses(relative) == ["fail", "pass"]  # 3.5 % of 98.5 are 3.4475 points


def test_against_a_baseline(ready: dict[str, Any]) -> None:
    baseline = copy.deepcopy(ready)
    assert set(_statuses(_judge(ready, baseline, max_metric_drop=Drop(0)))) == {"pass"}
    _row(ready, TUNED, "onnxruntime")["values"]["accuracy"] -= 0.02
    (good, bad) = _judge(ready, baseline, max_metric_drop=Drop(1))
    assert (good.status, bad.status, bad.place) == ("pass", "fail", "onnxruntime cpu plain, against baseline")
    baseline["metrics"] = [row for row in baseline["metrics"] if row["variant"] != TUNED]
    assert _statuses(_judge(ready, baseline, max_metric_drop=Drop(50))) == ["missing"]
    with pytest.raises(RequestError, match="give --baseline"):
        _judge(ready, max_metric_drop=Drop(1), against=["baseline"])
    for limits in ({"min_sparsity": 0.5}, {"max_metric_drop": Drop(1), "against": ["dense"]}):
        with pytest.raises(RequestError, match="no limit is held against it"):
            _judge(ready, baseline, **limits)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda report: _row(report, TUNED)["values"].clear(),
        lambda report: _row(report, "dense")["values"].clear(),
        lambda report: report["metrics"].remove(_row(report, "dense")),
        lambda report: report["metrics"].remove(_row(report, TUNED, "onnxruntime")),  # exported, never scored
        lambda report: report.update(metrics=[r for r in report["metrics"] if r["variant"] != TUNED]),
        lambda report: report.update(metrics=[]),
        lambda report: _row(report, "dense")["values"].update(exact=0.5),
    ],
)
@pytest.mark.parametrize("limit", [Drop(100), {"vqa": Drop(100)}, {"cpu": Drop(100)}, {"default": Drop(100)}])
def test_a_missing_score_is_a_failure(ready: dict[str, Any], spoil: Callable[[Any], Any], limit: Any) -> None:
    assert set(_statuses(_judge(ready, max_metric_drop=limit))) == {"pass"}
    spoil(ready)
    assert "missing" in _statuses(_judge(ready, max_metric_drop=limit))


@pytest.mark.parametrize("limit", [Drop(100), {"cpu": Drop(100)}, {"vqa": Drop(100), "default": Drop(100)}])
def test_a_task_that_was_lost_is_missed(report: dict[str, Any], limit: Any) -> None:
    checks = _judge(report, max_metric_drop=limit)  # captioning was scored for the dense model alone
    missing = {check.subject for check in checks if not check.passed}
    assert missing == {"captioning / bleu_4", "captioning / cider"}


def test_of_two_references_the_better_counts(ready: dict[str, Any]) -> None:
    ready["metrics"].insert(0, _row(ready, "dense") | {"values": {"accuracy": 0.5}, "ci95": {}})
    checks = _judge(ready, max_metric_drop=Drop(2), against=["dense"])
    assert _statuses(checks) == ["fail", "fail"]


def test_scores_on_other_data_prove_nothing(ready: dict[str, Any]) -> None:
    _row(ready, TUNED)["n"] = 20
    checks = _judge(ready, max_metric_drop=Drop(100), against=["dense"])
    assert _statuses(checks) == ["no evidence", "pass"]
    assert "scored on 20 of scenes, dense on 500 of scenes" in checks[0].found


def test_other_precisions_are_held_against_fp32(ready: dict[str, Any]) -> None:
    half = _row(ready, TUNED, "onnxruntime") | {"precision": "int8-static", "values": {"accuracy": 0.9}, "ci95": {}}
    ready["metrics"].append(half)
    limit = {"int8-static": Drop(9), "default": Drop(4)}
    assert set(_statuses(_judge(ready, max_metric_drop=limit))) == {"pass"}
    assert _statuses(_judge(ready, max_metric_drop=Drop(4))).count("fail") == 2


# --- graphs -----------------------------------------------------------------------------------------------------------


def test_sizes_and_differences(ready: dict[str, Any]) -> None:
    assert _statuses(_judge(ready, max_bytes=4_200_000, max_abs_diff=1e-5)) == ["pass", "pass"]
    assert _statuses(_judge(ready, max_bytes=4_199_999, max_abs_diff=1e-6)) == ["fail", "fail"]
    packed = ready["graphs"][0] | {"packed": True, "weights": "fp32", "bytes": 1_000_000, "max_abs_diff": 1e-3}
    ready["graphs"].append(packed)
    assert _statuses(_judge(ready, max_bytes=1_000_000)) == ["pass"]  # what ships is the packed one
    assert _statuses(_judge(ready, max_bytes=1_000_000, forms=["plain"])) == ["fail"]
    (check,) = _judge(ready, max_bytes=1_000_000, forms=["fp16"])
    assert (check.status, check.place) == ("missing", "fp16")
    assert _statuses(_judge(ready, max_abs_diff=1e-5)) == ["pass", "fail"]
    assert set(_statuses(_judge(ready, max_abs_diff={"packed": 1e-2, "plain": 1e-5}))) == {"pass"}


def test_sizes_are_of_all_graphs_of_a_task(ready: dict[str, Any]) -> None:
    ready["graphs"].append(ready["graphs"][0] | {"graph": "answer_decoder", "bytes": 800_000})
    (check,) = _judge(ready, max_bytes=5_000_000)
    assert (check.passed, check.subject, check.value) == (True, "vqa / all graphs", 5_000_000)
    assert check.found == "5,000,000 bytes in 2 graphs"
    for limit in (4_999_999, {"vqa": 4_999_999}, {"plain": 4_999_999}, {"image_encoder": 10**9, "default": 4_999_999}):
        assert "fail" in _statuses(_judge(ready, max_bytes=limit))
    checks = _judge(ready, max_bytes={"vqa": {"answer_decoder": 799_999}, "image_encoder": 4_200_000})
    assert [(check.subject, check.status) for check in checks] == [
        ("vqa / image_encoder", "pass"), ("vqa / answer_decoder", "fail"),
    ]  # fmt: skip
    packed = [row | {"packed": True, "weights": "fp32", "bytes": row["bytes"] // 5} for row in ready["graphs"]]
    ready["graphs"] += packed
    assert [check.value for check in _judge(ready, max_bytes=10**9)] == [1_000_000]  # forms are not added up
    ready["graphs"].pop()
    assert sorted(_statuses(_judge(ready, max_bytes=10**9))) == ["missing", "pass"]  # a part is no total


@pytest.mark.parametrize("limit", ["max_bytes", "max_abs_diff", "min_throughput_ratio"])
@pytest.mark.parametrize("nested", [lambda v: v, lambda v: {"vqa": v}, lambda v: {"cpu": v}, lambda v: {"default": v}])
def test_a_graph_that_the_dense_model_has_must_be_there(ready: dict[str, Any], limit: str, nested: Any) -> None:
    value = {"max_bytes": 10**9, "max_abs_diff": 1.0, "min_throughput_ratio": 0.1}[limit]
    value = nested(value) if limit == "min_throughput_ratio" else value
    assert _statuses(_judge(ready, **{limit: value})) == ["pass"]
    ready["graphs"].append(ready["graphs"][0] | {"variant": "dense-finetuned", "graph": "answer_decoder"})
    assert sorted(_statuses(_judge(ready, **{limit: value}))) == ["missing", "pass"]
    ready["graphs"], ready["throughput"] = [], []
    assert _statuses(_judge(ready, **{limit: value})) == ["missing"]


# --- speed ------------------------------------------------------------------------------------------------------------


def test_speed_is_judged_on_the_interval(ready: dict[str, Any]) -> None:
    for bound, status in ((0.97, "pass"), (0.98, "inconclusive"), (1.01, "inconclusive"), (1.02, "fail")):
        assert _statuses(_judge(ready, min_throughput_ratio=bound)) == [status]
    ready["throughput"][0]["note"] = "other processes disturbed 9 of 12 rounds"
    (check,) = _judge(ready, min_throughput_ratio=0.5)
    assert check.status == "no evidence" and "disturbed 9 of 12" in str(check)


def test_speed_by_provider_and_graph(ready: dict[str, Any]) -> None:
    on_cuda = ready["throughput"][0] | {"provider": "cuda", "ratio": 1.5, "ratio_ci95": [1.4, 1.6]}
    ready["throughput"].append(on_cuda)
    limit = {"cpu": 0.95, "cuda": {"image_encoder": 1.4}}
    assert _statuses(_judge(ready, min_throughput_ratio=limit)) == ["pass", "pass"]
    ready["throughput"].pop()
    checks = _judge(ready, min_throughput_ratio=limit)
    assert _statuses(checks) == ["pass", "missing"]
    assert "the report lacks cuda.image_encoder" in checks[1].found


def test_a_graph_is_timed_on_each_provider_that_timed_another(ready: dict[str, Any]) -> None:
    ready["graphs"].append(ready["graphs"][0] | {"graph": "answer_decoder"})
    ready["throughput"] += [
        ready["throughput"][0] | {"provider": "cuda"},
        ready["throughput"][0] | {"graph": "answer_decoder"},
    ]
    checks = _judge(ready, min_throughput_ratio=0.5)
    assert [(check.subject, check.place) for check in checks if not check.passed] == [("vqa / answer_decoder", "cuda")]


def test_packed_graphs_on_the_cpu_and_plain_ones_elsewhere(ready: dict[str, Any]) -> None:
    plain = ready["throughput"][0]
    ready["graphs"].append(ready["graphs"][0] | {"packed": True, "weights": "fp32"})
    ready["throughput"] += [
        plain | {"packed": True, "weights": "fp32", "ratio": 2.0, "ratio_ci95": [1.9, 2.1]},
        plain | {"provider": "cuda"},
    ]
    checks = _judge(ready, min_throughput_ratio={"cpu": 1.5, "cuda": 0.9})
    assert {(check.place, check.status) for check in checks} == {
        ("cpu packed fp32 batch 8", "pass"), ("cuda plain batch 8", "pass"),
    }  # fmt: skip
    ready["throughput"].pop(1)
    assert "missing" in _statuses(_judge(ready, min_throughput_ratio={"cpu": 0.5, "cuda": 0.9}))


# --- providers, names, variants ---------------------------------------------------------------------------------------


def test_required_providers(ready: dict[str, Any]) -> None:
    assert _statuses(_judge(ready, required_providers=["cpu"])) == ["pass"]
    checks = _judge(ready, required_providers={"vqa": ["cpu", "cuda"]})
    assert _statuses(checks) == ["pass", "missing"] and "scored on cpu" in str(checks[1])
    ready["metrics"] = [row for row in ready["metrics"] if row["runtime"] == "pytorch"]
    assert _statuses(_judge(ready, required_providers=["cpu"])) == ["missing"]  # timed only
    ready["model"]["random_weights"], ready["metrics"] = True, []
    assert _statuses(_judge(ready, required_providers=["cpu"])) == ["pass"]


def test_a_name_that_fits_nothing_fails_with_the_nearest(ready: dict[str, Any]) -> None:
    checks = _judge(ready, max_bytes={"image_encodr": 10**9, "vqa": 10**9})
    assert _statuses(checks) == ["pass", "missing"]
    assert "image_encodr (did you mean image_encoder?)" in checks[1].found
    assert _statuses(_judge(ready, max_metric_drop={"vqa": {"acuracy": Drop(99)}})) == ["missing"]
    assert "missing" in _statuses(_judge(ready, max_bytes={"cuda": 10**9}))


def test_default_stands_for_the_rest_only(ready: dict[str, Any]) -> None:
    assert _statuses(_judge(ready, max_abs_diff={"image_encoder": 1.0, "default": 0.0})) == ["pass"]
    assert _statuses(_judge(ready, max_bytes={"vqa": {"itm": 1, "default": 10**9}})) == ["pass", "missing"]


def test_which_variants_are_judged(ready: dict[str, Any]) -> None:
    ready["variants"].append(copy.deepcopy(ready["variants"][3]) | {"id": "multiflow-0.5-finetuned"})
    judged = {check.variant for check in _judge(ready, min_sparsity=0.1)}
    assert judged == {TUNED, "multiflow-0.5-finetuned"}
    assert {check.variant for check in _judge(ready, min_sparsity=0.1, variants=[OTHER])} == {OTHER}
    with pytest.raises(RequestError, match=f"unknown variant 'multiflow-0.8': did you mean {OTHER}"):
        _judge(ready, min_sparsity=0.1, variants=["multiflow-0.8"])
    ready["variants"] = [row for row in ready["variants"] if not row["finetuned"]]
    assert {check.variant for check in _judge(ready, min_sparsity=0.1)} == {OTHER}
    ready["variants"] = ready["variants"][:1]
    with pytest.raises(RequestError, match="no compressed variant"):
        _judge(ready, min_sparsity=0.1)


# --- what is printed --------------------------------------------------------------------------------------------------


def test_junit_json_and_markdown(ready: dict[str, Any]) -> None:
    ready["throughput"][0]["note"] = "a <b> | & c"
    checks = _judge(ready, min_sparsity=0.5, max_bytes=1, min_throughput_ratio={"cpu": 0.9, "cuda": 1.0})
    suite = ElementTree.fromstring(results.junit(checks))[0]
    assert (suite.get("tests"), suite.get("failures")) == ("4", "3")
    assert [f.get("type") for case in suite for f in case] == ["fail", "no evidence", "missing"]
    machine = json.loads(json.dumps(results.as_json(checks), allow_nan=False))
    assert (machine["passed"], machine["broken"], len(machine["checks"])) == (False, 3, 4)
    text = results.markdown(checks)
    assert text.startswith("## vlprune gate: 3 of 4 checks failed\n") and "a &lt;b> \\| & c" in text
    assert results.verdict(checks).startswith("gate failed, 3 of 4 checks: max_bytes of multiflow-0.9-finetuned (vqa")
    good = _judge(ready, min_sparsity=0.5)
    assert results.verdict(good) == "gate passed: 1 check" and "## vlprune gate: 1 check passed" in results.markdown(
        good
    )


def test_kept_limits_are_shown_by_their_worst(ready: dict[str, Any]) -> None:
    (row,) = results.rows(_judge(ready, max_metric_drop=Drop(5)))
    assert row["measured"] == "pytorch cpu plain, against dense-finetuned" and row["found"].endswith("(worst of 4)")


# --- worse is never better --------------------------------------------------------------------------------------------

LIMITS = {
    "min_sparsity": {"default": 0.85, "vision": 0.8},
    "max_metric_drop": {"default": Drop(3.2), "onnxruntime": Drop(4.0, relative=True)},
    "max_bytes": {"vqa": 4_000_000},
    "min_throughput_ratio": 0.95,
    "max_abs_diff": 3e-6,
    "required_providers": ["cpu"],
}
share, more = st.floats(0, 1), st.floats(0, 1e6)


def _worse(report: dict[str, Any], draw: st.DataObject) -> None:
    """Change one figure for the worse, or remove what proves something."""
    rows = [row for row in report["metrics"] if row["variant"] == TUNED]
    kind = draw.draw(st.sampled_from(["score", "dense", "bytes", "diff", "ratio", "sparsity", "note", "remove", "n"]))
    if kind == "score" and rows:
        row = draw.draw(st.sampled_from(rows))
        row["values"] = {name: value * draw.draw(share) for name, value in row["values"].items()}
    elif kind == "dense":
        for row in (row for row in report["metrics"] if row["variant"].startswith("dense")):
            row["values"]["accuracy"] += draw.draw(share)
    elif kind in ("bytes", "diff") and report["graphs"]:
        key = "bytes" if kind == "bytes" else "max_abs_diff"
        report["graphs"][0][key] += int(draw.draw(more)) if key == "bytes" else draw.draw(more)
    elif kind == "ratio" and report["throughput"]:
        factor, low = draw.draw(share), draw.draw(share)
        row = report["throughput"][0]
        row["ratio_ci95"] = [row["ratio_ci95"][0] * factor * low, row["ratio_ci95"][1] * factor]
    elif kind == "sparsity":
        sparsity = report["variants"][3]["sparsity"]
        sparsity["achieved"] *= draw.draw(share)
        sparsity["per_modality"]["vision"] *= draw.draw(share)
    elif kind == "note" and report["throughput"]:
        report["throughput"][0]["note"] = "disturbed"
    elif kind == "n" and rows:
        rows[0]["n"] = 1
    elif kind == "remove":
        section = draw.draw(st.sampled_from(["metrics", "graphs", "throughput"]))
        if report[section]:
            report[section].pop(draw.draw(st.integers(0, len(report[section]) - 1)))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    draw=st.data(), name=st.sampled_from([*LIMITS]), accuracy=st.floats(0.9, 1), low=st.floats(0.9, 1),
    size=st.integers(3_900_000, 4_100_000), achieved=st.floats(0.8, 0.9), diff=st.floats(2e-6, 4e-6),
)  # fmt: skip
def test_worse_never_turns_a_failure_into_a_pass(
    ready: dict[str, Any], draw: st.DataObject, name: str, accuracy: float, low: float, size: int, achieved: float,
    diff: float,
) -> None:  # fmt: skip
    report = copy.deepcopy(ready)
    for runtime in ("pytorch", "onnxruntime"):
        _row(report, TUNED, runtime)["values"]["accuracy"] = accuracy
    report["graphs"][0] |= {"bytes": size, "max_abs_diff": diff}
    report["throughput"][0]["ratio_ci95"] = [low, 1.01]
    report["variants"][3]["sparsity"]["achieved"] = achieved
    # What the dense model has is still expected when the row of the compressed one is gone.
    report["graphs"] += [{**report["graphs"][0], "variant": "dense-finetuned"}]
    before = all(check.passed for check in _judge(report, **{name: LIMITS[name]}))
    for _ in range(draw.draw(st.integers(1, 3))):
        _worse(report, draw)
        validate_report(report)
        after = all(check.passed for check in _judge(report, **{name: LIMITS[name]}))
        assert before or not after
        before = after


# --- reports of strangers ---------------------------------------------------------------------------------------------


def _write(tmp_path: Path, report: Any) -> Path:
    path = tmp_path / "report.json"
    path.write_text(report if isinstance(report, str) else json.dumps(report))
    return path


def test_a_run_or_its_report(ready: dict[str, Any], tmp_path: Path) -> None:
    path = _write(tmp_path, ready)
    assert read_report(path) == read_report(tmp_path) == ready


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r["metrics"][0]["values"].update(accuracy=float("nan")),
        lambda r: r["metrics"][0]["values"].update(accuracy=float("inf")),
        lambda r: r["metrics"][0]["values"].update(accuracy=10**400),
        lambda r: r["metrics"][0]["values"].update(accuracy="0.9"),
        lambda r: r["metrics"][0]["values"].update(accuracy=True),
        lambda r: r["graphs"][0].update(bytes=10**400),
        lambda r: r["graphs"][0].update(bytes=-1),
        lambda r: r["graphs"][0].update(max_abs_diff=-1.0),
        lambda r: r["graphs"][0].update(file="../../etc/passwd"),
        lambda r: r["throughput"][0].update(ratio_ci95=[1.0]),
        lambda r: r["throughput"][0].update(ratio_ci95=[1.1, 0.9]),
        lambda r: r["throughput"][0].update(ratio_ci95=[0.9, float("nan")]),
        lambda r: r["throughput"][0].update(verdict=["faster"]),
        lambda r: r["variants"][0].update(id="\x1b[31mdense"),
        lambda r: r["metrics"][0]["values"].update({"accuracy\n::set-output": 1.0}),
        lambda r: r["environment"].update(cpu="\ud800"),
        lambda r: r["variants"][0]["sparsity"].update(achieved=1.5),
        lambda r: r.update(extra=1),
        lambda r: r.pop("graphs"),
        lambda r: r.update(metrics={}),
        lambda r: r.update(schema_version=2),
    ],
)
def test_spoiled_reports_get_one_line(ready: dict[str, Any], tmp_path: Path, spoil: Callable[[Any], Any]) -> None:
    spoil(ready)
    with pytest.raises(RequestError) as caught:
        read_report(_write(tmp_path, ready))
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", "[" * 100_000, '{"a":' * 100_000, '"' + "x" * 1000, "1" * 5000, "\x00", "NaN"]
)
def test_what_is_no_report(tmp_path: Path, text: str) -> None:
    with pytest.raises(RequestError):
        read_report(_write(tmp_path, text))


def test_large_files_and_devices_are_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "report.json", "wb") as file:
        file.truncate(1 << 31)
    with pytest.raises(RequestError, match="no report"):
        read_report(tmp_path)
    for path in (Path("/dev/zero"), tmp_path / "absent", tmp_path / "absent.json"):
        with pytest.raises(RequestError, match="give a run, or a report.json"):
            read_report(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_is_refused_or_judged(ready: dict[str, Any], tmp_path: Path, data: st.DataObject) -> None:
    """Whatever stands anywhere in a report, there is a verdict or a line."""
    report = copy.deepcopy(ready)
    place: Any = report
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    place[key] = data.draw(st.recursive(leaves, lambda s: st.lists(s, max_size=3) | st.dictionaries(st.text(), s)))
    try:
        checks = judge(read_report(_write(tmp_path, report)), Limits(LIMITS))
    except RequestError as error:
        assert "\n" not in str(error)
    else:
        assert checks
        ElementTree.fromstring(results.junit(checks))
        json.dumps(results.as_json(checks), allow_nan=False)
