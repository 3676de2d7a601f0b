from pathlib import Path

import pytest

from vlprune.cli import options
from vlprune.errors import MachineError, RequestError


def test_ratios_are_sorted() -> None:
    assert options.parse_ratios("0.9, 0.63,0.75") == (0.63, 0.75, 0.9)


@pytest.mark.parametrize("text", ["0", "1", "-1", "1.5", "abc", "nan", "inf", "-inf", "0.5,1", "0x1", "1e-400"])
def test_ratios_outside_the_range_name_it(text: str) -> None:
    with pytest.raises(RequestError, match="strictly between 0 and 1"):
        options.parse_ratios(text)


@pytest.mark.parametrize("text", ["", ",", "0.5,", "0.5,,0.6"])
def test_empty_entries_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="empty entry"):
        options.parse_ratios(text)


@pytest.mark.parametrize("text", ["0.5,0.5", "0.5,0.50"])
def test_repeated_ratios_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="twice"):
        options.parse_ratios(text)


def test_lists() -> None:
    assert options.parse_tasks("vqa,retrieval") == ("vqa", "retrieval")
    assert options.parse_providers("cuda,cpu") == ("cuda", "cpu")
    assert options.parse_sizes("1,8,32") == (1, 8, 32)


def test_near_misses_are_suggested() -> None:
    with pytest.raises(RequestError, match=r"unknown task 'retreival': did you mean retrieval\?"):
        options.parse_tasks("retreival")
    with pytest.raises(RequestError, match=r"unknown provider 'gpu': .*known: cpu, cuda, tensorrt"):
        options.parse_providers("gpu")
    with pytest.raises(RequestError, match=r"unknown method 'multiflw': did you mean multiflow or"):
        options.check_method("multiflw")


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", "9999999"])
def test_sizes_are_positive_integers(text: str) -> None:
    with pytest.raises(RequestError, match="--bench-batch"):
        options.parse_sizes(text)


def test_data_keeps_commas_and_equal_signs_of_the_path() -> None:
    pair = options.parse_data("retrieval=a=b/train.json,test.json")
    assert options.sources([pair]) == {"retrieval": "a=b/train.json,test.json"}
    assert options.sources(None) == {}


@pytest.mark.parametrize("text", ["retrieval", "retrieval=", "retrieval= ", ""])
def test_data_without_a_path_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="not TASK=PATH"):
        options.parse_data(text)


def test_data_twice_for_one_task_is_refused() -> None:
    with pytest.raises(RequestError, match="vqa twice"):
        options.sources([options.TaskSource("vqa", "a"), options.TaskSource("vqa", "b")])


@pytest.mark.parametrize("text", ["unstructured", "2:4", "1:16", "8x1", "16x16"])
def test_patterns(text: str) -> None:
    assert options.parse_pattern(text) == text


@pytest.mark.parametrize("text", ["", "4:2", "2:2", "0:4", "2:", "x", "0x4", "structured"])
def test_unknown_patterns_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match="--pattern"):
        options.parse_pattern(text)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "x"])
def test_learning_rates_are_positive(text: str) -> None:
    with pytest.raises(RequestError, match="--lr"):
        options.parse_rate(text)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "x"])
def test_seconds_are_positive(text: str) -> None:
    assert options.parse_seconds("0.5") == 0.5
    with pytest.raises(RequestError, match="--seconds"):
        options.parse_seconds(text)


def test_output_leaves_nothing_behind(tmp_path: Path) -> None:
    assert options.check_output(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert list(tmp_path.iterdir()) == []


def test_output_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "deeper", Path("/proc/vlprune")):
        with pytest.raises(RequestError, match="cannot write .*: choose another --output"):
            options.check_output(path)

    def refuse(error: OSError) -> None:
        def temporary(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(options.tempfile, "TemporaryFile", temporary)

    refuse(PermissionError(13, "Permission denied"))
    with pytest.raises(RequestError, match="Permission denied"):
        options.check_output(tmp_path / "x")
    refuse(OSError(30, "Read-only file system"))
    with pytest.raises(RequestError, match="Read-only"):
        options.check_output(tmp_path / "x")
    refuse(OSError(28, "No space left on device"))
    with pytest.raises(MachineError, match="no space left"):
        options.check_output(tmp_path / "x")


def test_a_run_directory_has_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="not a run directory"):
        options.check_run(tmp_path)
    with pytest.raises(RequestError, match="no such file or folder"):
        options.check_run(tmp_path / "absent")
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    assert options.check_run(tmp_path) == tmp_path


def test_names_agree_with_the_registries() -> None:
    """The light names of the command line are those of the code."""
    from vlprune import names

    assert set(names.UNSTRUCTURED) == set(pytest.importorskip("vlprune.pruning").METHODS)
    assert set(names.STRUCTURED) == set(pytest.importorskip("vlprune.structured").STRUCTURED)
    assert set(names.TASKS) == set(pytest.importorskip("vlprune.tasks").TASKS)
