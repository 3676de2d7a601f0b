from pathlib import Path
from typing import Any

import pytest
import yaml

from vlprune.errors import ProblemsError, RequestError
from vlprune.report.limits import Drop, by_option, read_limits


def _read(tmp_path: Path, content: str, **options: Any) -> Any:
    (tmp_path / "gate.yaml").write_text(content)
    return read_limits(tmp_path / "gate.yaml", options)


def test_every_limit_and_setting(tmp_path: Path) -> None:
    limits = _read(
        tmp_path,
        """
variant: multiflow-0.9
against: [dense, baseline]
form: packed
min_sparsity: {vision: 0.9, default: 0.8}
max_metric_drop: {retrieval: 2, captioning: {cider: 5%, default: 1.5 %}}
max_bytes: {retrieval: {itm: 20 MB}, vqa: 5000, default: 1.5MiB}
min_throughput_ratio: {cpu: 1.2}
max_abs_diff: 1e-4
required_providers: cpu
""",
    )
    assert (limits.variants, limits.against, limits.forms) == (["multiflow-0.9"], ["dense", "baseline"], ["packed"])
    assert limits.values == {
        "min_sparsity": {"vision": 0.9, "default": 0.8},
        "max_metric_drop": {
            "retrieval": Drop(2.0),
            "captioning": {"cider": Drop(5.0, relative=True), "default": Drop(1.5, relative=True)},
        },
        "max_bytes": {"retrieval": {"itm": 20_000_000}, "vqa": 5000, "default": 1_572_864},
        "min_throughput_ratio": {"cpu": 1.2},
        "max_abs_diff": 1e-4,
        "required_providers": ["cpu"],
    }


def test_options_win_over_the_file(tmp_path: Path) -> None:
    limits = _read(tmp_path, "min_sparsity: 0.9\nmax_bytes: 1MB\n", min_sparsity=0.5, max_bytes=None)
    assert limits.values == {"min_sparsity": 0.5, "max_bytes": 1_000_000}
    assert read_limits(None, {"max_abs_diff": 1}).values == {"max_abs_diff": 1.0}


@pytest.mark.parametrize("content", ["", "{}", "null", "variant: x", "against: dense\nform: plain", "# nothing"])
def test_no_limit_is_no_gate(tmp_path: Path, content: str) -> None:
    with pytest.raises(RequestError, match="a gate without one proves nothing"):
        _read(tmp_path, content)


def test_all_problems_at_once(tmp_path: Path) -> None:
    wrong = {
        "min_sparsty": 0.9,
        "max_metric_drop": {"vqa": -1, "retrieval": "two"},
        "max_bytes": "20 apples",
        "min_throughput_ratio": {},
        "against": "dence",
        "required_providers": ["cpu", "gpu"],
    }
    with pytest.raises(ProblemsError) as caught:
        _read(tmp_path, yaml.safe_dump(wrong))
    said = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 7
    for words in (
        "unknown key 'min_sparsty': did you mean min_sparsity?",
        "max_metric_drop.vqa -1 is no drop",
        "max_metric_drop.retrieval 'two' is no drop",
        "max_bytes '20 apples' is no size",
        "min_throughput_ratio is empty",
        "against 'dence' is no reference: did you mean dense",
        "unknown provider 'gpu'",
    ):
        assert words in said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("min_sparsity", ".nan"), ("min_sparsity", "1.5"), ("min_sparsity", "90%"), ("min_sparsity", "true"),
        ("min_sparsity", "[0.9]"), ("min_sparsity", "null"), ("max_metric_drop", ".inf"), ("max_metric_drop", "-2"),
        ("max_metric_drop", "-2%"), ("max_metric_drop", "nan%"), ("max_bytes", "1.5"), ("max_bytes", "-1"),
        ("max_bytes", "1e9"), ("max_bytes", "true"), ("max_bytes", "5TB"), ("min_throughput_ratio", "0"),
        ("min_throughput_ratio", ".inf"), ("max_abs_diff", ".nan"), ("max_abs_diff", "-.inf"),
        ("max_abs_diff", "1" * 400), ("required_providers", "[]"), ("required_providers", "[cpu, cpu]"),
        ("variant", "[]"), ("form", "thin"), ("min_sparsity", "{1: 0.5}"),
        ("max_bytes", "{a: {b: {c: {d: {e: {f: {g: 1}}}}}}}"),
    ],
)  # fmt: skip
def test_values_that_limit_nothing_are_refused(tmp_path: Path, key: str, value: str) -> None:
    with pytest.raises(RequestError) as caught:
        _read(tmp_path, f"{key}: {value}\nmax_abs_diff: 1\n" if key != "max_abs_diff" else f"{key}: {value}\n")
    assert key in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_limits_from_the_command_line() -> None:
    assert by_option(None) is None
    assert (by_option("2"), by_option("0.5"), by_option("5%"), by_option("20 MB")) == (2, 0.5, "5%", "20 MB")
    assert by_option("retrieval=2, captioning.cider=5%,captioning.default=1.5") == {
        "retrieval": 2,
        "captioning": {"cider": "5%", "default": 1.5},
    }
    for twice in ("a=1,a=2", "a=1,a.b=2", "a.b=2,a=1"):
        with pytest.raises(RequestError, match="twice"):
            by_option(twice)
