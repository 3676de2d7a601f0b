"""What a recipe may say, and how it joins with the command line; hostile files."""

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlprune import pipeline, recipe
from vlprune.cli.main import main
from vlprune.errors import ProblemsError, RequestError
from vlprune.yamlfile import LIMIT, dump_yaml, read_yaml


WHOLE = {  # every key, mostly with another value than its default
    "model": "blip-tiny", "family": "blip", "method": "mope", "ratios": [0.5, 0.75], "pattern": "structured",
    "calibration": "scenes", "calibration_samples": 12, "data": {"retrieval": "scenes"}, "tasks": ["retrieval"],
    "image_size": 32, "device": "cpu", "threads": 1, "seed": 7, "skip_broken": True,
    "finetune": {"mode": "heads", "max_steps": 3, "epochs": 2, "lr": 0.001, "seed": 5, "gradient_checkpointing": True},
    "batch_size": 4, "export": "onnx", "providers": ["cpu"], "bench_batches": [1, 4], "samples": 20,
    "precision": ["fp32", "fp16"], "fuse": True, "pack": "none", "values": "fp32", "target": "auto",
    "pack_threshold": None, "round_widths": False, "mope": {"stage": "task", "pairs": 50, "groups": 4},
    "distill": [1.0, 2.0, 3.0], "permute": False,
}  # fmt: skip


def _write(folder: Path, content: Any) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def _resolve(chosen: dict[str, Any]) -> dict[str, Any]:
    return pipeline.compress(output=".", dry_run=True, **{"ratios": [0.9]} | recipe.arguments(chosen))


def test_every_option_of_compress_has_a_key(tmp_path: Path) -> None:
    assert WHOLE.keys() == recipe.RECIPE.keys()
    taken = set(inspect.signature(pipeline.compress).parameters) - {"output", "resume", "dry_run"}
    finetune = {"finetune", "max_steps", "epochs", "lr", "finetune_seed", "gradient_checkpointing", "compile"}
    assert taken - finetune | {"finetune"} == recipe.RECIPE.keys()
    assert len(recipe.MAPPINGS["finetune"]) == len(finetune)


def test_a_resolved_recipe_resolves_to_itself(tmp_path: Path) -> None:
    for chosen in (WHOLE, {"model": "blip-tiny"}, {"model": "blip-tiny", "method": "mope", "distill": "none"}):
        first = _resolve(recipe.read(_write(tmp_path, chosen)))
        assert first.keys() == recipe.RECIPE.keys()
        second = _resolve(recipe.read(_write(tmp_path, dump_yaml(first))))
        assert (first, list(first)) == (second, list(second))
        if "ratios" in chosen:
            assert first == chosen
    assert first["distill"] is None  # mope would distill, had it not been told otherwise


def test_defaults_are_those_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "validate", str(_write(tmp_path, {"model": "blip-tiny"})), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["valid"], found["problems"]) == (True, [])
    assert found["resolved"]["ratios"] == [0.9] and found["resolved"]["data"]["vqa"] == "scenes"
    assert main(["recipe", "validate", str(tmp_path / "recipe.yaml")]) == 0
    printed = capsys.readouterr().out
    assert recipe.read(_write(tmp_path, printed)) == found["resolved"]  # is a recipe itself


def test_short_forms(tmp_path: Path) -> None:
    text = "{model: blip-tiny, ratios: 0.9, tasks: vqa, providers: cpu, finetune: heads, pattern: 2:4, export: none}"
    assert recipe.read(_write(tmp_path, text)) == {
        "model": "blip-tiny", "ratios": [0.9], "tasks": ["vqa"], "providers": ["cpu"], "finetune": {"mode": "heads"},
        "pattern": "2:4", "export": None,
    }  # fmt: skip


def test_all_problems_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {
        "model": "blip-tyni", "ratio": 0.9, "ratios": [0.5, 1.5, "x"], "metod": "omp", "method": "multiflw",
        "finetune": {"mod": "full", "lr": -1, "epochs": 0.5}, "data": {"vqaa": "x", "vqa": 3}, "tasks": [],
        "bench_batch": 8, "seed": float("nan"), "threads": True, "lr": 1e-3, "mope_pairs": 3, "output": "run",
        "providers": ["cpu", "cpu"], "pattern": "4:2", "distill": [1, 2], 3: 4, "skip_broken": "yes",
    }  # fmt: skip
    path = _write(tmp_path, wrong)
    with pytest.raises(ProblemsError) as caught:
        recipe.read(path)
    said = caught.value.problems
    expected = [
        "unknown key 'ratio': did you mean ratios?",
        "unknown key 'metod': did you mean method",
        "unknown key 'bench_batch': did you mean bench_batches?",
        "unknown key 'lr': did you mean finetune.lr?",
        "unknown key 'mope_pairs': did you mean mope.pairs?",
        "unknown key 'output': give --output on the command line",
        "unknown key 3: known: ",
        "model: unknown model 'blip-tyni': did you mean blip-tiny",
        "ratios 1.5 is not a number strictly between 0 and 1",
        "ratios 'x' is not a number",
        "method: unknown method 'multiflw': did you mean multiflow",
        "unknown key 'finetune.mod': did you mean mode?",
        "finetune.lr -1 is not a positive number",
        "finetune.epochs 0.5 is no whole number",
        "data: unknown task 'vqaa': did you mean vqa?",
        "data.vqa 3 is no text",
        "tasks is empty",
        "seed nan is no whole number",
        "threads True is no whole number",
        "providers names cpu twice",
        "pattern '4:2' is unknown",
        "distill (a list of 2) is no list of 3",
        "skip_broken 'yes' is neither true nor false",
    ]
    assert len(said) == len(expected)
    for words in expected:
        assert any(line.startswith(words) for line in said), words
    for command in (["recipe", "validate", str(path)], ["compress", "--recipe", str(path), "-o", str(tmp_path / "r")]):
        assert main(command) == 2
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert lines[0] == f"error: {path} has {len(said)} problems" and len(lines) == 1 + len(said)
        assert lines[1].startswith("  1. ") and captured.out == ""
    assert not (tmp_path / "r").exists()
    assert main(["recipe", "validate", str(path), "--json"]) == 2
    machine = json.loads(capsys.readouterr().out)
    assert (machine["valid"], len(machine["problems"])) == (False, len(said))


def test_what_does_not_fit_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = {"model": "blip", "pattern": "2:4", "ratios": 0.9, "pack": "sparse", "fuse": True, "round_widths": False}
    assert main(["recipe", "validate", str(_write(tmp_path, wrong))]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 7
    for words in (
        "pattern 2:4 removes 0.5",
        "needs --calibration",
        "needs --data",
        "--pack sparse",
        "--fuse",
        "makes masks",
    ):
        assert any(words in line for line in lines), words
    assert main(["recipe", "validate", str(_write(tmp_path, {"ratios": 0.5}))]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_one_problem_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _write(tmp_path, {"model": "blip-tiny", "sed": 1})
    assert main(["recipe", "validate", str(path)]) == 2
    assert capsys.readouterr().err == f"error: {path}: unknown key 'sed': did you mean seed?\n"


def test_a_wrong_key_is_found_without_torch(tmp_path: Path) -> None:
    path = _write(tmp_path, {"model": "blip-tiny", "sed": 1})
    code = "import sys; from vlprune.cli.main import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "recipe", "validate", str(path)], capture_output=True, text=True)
    assert done.returncode == 0 and "did you mean seed" in done.stderr


@pytest.mark.parametrize("package", ["torch", "PIL"])
def test_without_the_rest_of_vlprune_half_a_check_is_none(tmp_path: Path, package: str) -> None:
    path = _write(tmp_path, {"model": "blip-tiny", "ratios": 0.9})
    code = f"import sys; sys.modules[{package!r}] = None; from vlprune.cli.main import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "recipe", "validate", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.count("\n") == 1 and f"needs {package}, which is not installed: pip install" in done.stderr


def test_the_document(tmp_path: Path) -> None:
    document = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"<!-- tests/test_recipe.py reads this block -->\n```yaml\n(.*?)```", document, re.DOTALL)
    assert _resolve(recipe.read(_write(tmp_path, example)))["finetune"]["lr"] == 3e-4
    keys = document.partition("## Keys")[2].partition("## Together")[0]
    assert recipe.RECIPE.keys() <= set(re.findall("`([a-z_]+)`", keys))
    assert {key for rules in recipe.MAPPINGS.values() for key in rules} <= set(re.findall("`([a-z_]+)`", keys))


# --- with the command line --------------------------------------------------------------------------------------------


def _typed(chosen: dict[str, Any], **options: Any) -> dict[str, Any]:
    defaults = {"ratios": [0.9], "method": "multiflow", "data": {}, "mope": None, "round_widths": True, "seed": 0}
    defaults |= {"pattern": "unstructured", "distill": None, "finetune": "full", "lr": None}
    return recipe.merge(chosen, defaults | options, options.keys())


def test_the_command_line_wins() -> None:
    chosen = {"model": "m", "ratios": [0.5], "seed": 3, "finetune": {"mode": "heads", "lr": 0.1, "seed": 9}}
    found = _typed(chosen, seed=0, lr=0.2)
    assert (found["ratios"], found["seed"], found["finetune"], found["lr"]) == ([0.5], 0, "heads", 0.2)
    assert (found["finetune_seed"], found["model"], found["method"]) == (9, "m", "multiflow")


def test_data_and_mope_join() -> None:
    chosen = {"data": {"vqa": "a", "retrieval": "b"}, "method": "mope", "mope": {"stage": "task", "pairs": 5}}
    found = _typed(chosen, data={"vqa": "c"}, mope={"pairs": 7})
    assert found["data"] == {"vqa": "c", "retrieval": "b"} and found["mope"] == {"stage": "task", "pairs": 7}


def test_another_method_leaves_behind_what_belongs_to_the_first() -> None:
    chosen = {"method": "mope", "mope": {"pairs": 5}, "distill": None, "pattern": "structured", "round_widths": False}
    found = _typed(chosen, method="omp")
    assert (found["method"], found["mope"], found["distill"]) == ("omp", None, None)
    assert (found["pattern"], found["round_widths"]) == ("unstructured", True)
    assert _typed(chosen)["distill"] == []  # null says "none", which the method must be told


# --- files of strangers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        "", "null", "[]", "- model", "text", "3", "{", "a: b: c", "\t", "\x00", "--- {}\n--- {}", "[" * 60_000,
        "{a: " * 15_000, "a: &x [1]\nb: *x", "a: *x", "model: blip-tiny\nmodel: blip", "? [1]\n: 2",
        "model: !!python/object/apply:os.system [echo]", "model: !!python/name:os.system", "!!set {a}",
        "seed: " + "9" * 50_000, "seed: !!int x", "seed: !!bool maybe", "a: !!timestamp 1", "<<: {model: blip-tiny}",
        "model: " + "x" * LIMIT, "%YAML 3.0\n---\na: 1", 'model: "\\ud800"', 'model: "a\\u001b[31m"',
        "model: [blip-tiny]",
        "{" + ", ".join(f"k{i}: 1" for i in range(6000)) + "}", "ratios: [" + "1," * 30_000 + "]", "data: [[]]",
        "mope: {pairs: {pairs: 3}}", "finetune: [full]", "finetune: null", "model: 'a\\0b'",
    ],
)  # fmt: skip
def test_hostile_files_are_refused(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = _write(tmp_path, content)
    assert main(["recipe", "validate", str(path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: ") and len(lines) <= 103
    assert all(line.isprintable() and len(line) < 600 for line in lines)
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


def test_aliases_are_no_bomb(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    with pytest.raises(RequestError, match="anchors or aliases"):
        read_yaml(_write(tmp_path, "\n".join(lines)))


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"model: \xff")
    for path in (tmp_path, tmp_path / "absent", Path("/dev/zero"), tmp_path / "latin.yaml"):
        with pytest.raises(RequestError):
            recipe.read(path)


def test_numbers_and_texts_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    read = read_yaml(_write(tmp_path, "{a: 2:4, b: 1e-3, c: no, d: 010, e: 0x1f, f: 2001-01-01, g: true, h: ~, i: .5}"))
    assert read == {
        "a": "2:4", "b": 0.001, "c": "no", "d": 10, "e": "0x1f", "f": "2001-01-01", "g": True, "h": None, "i": 0.5,
    }  # fmt: skip


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
TEXTS = st.text(st.characters(exclude_categories=("Cc", "Cs", "Co", "Cn", "Zl", "Zp"), exclude_characters="\ufeff"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(PLAIN | TEXTS, lambda s: st.lists(s, max_size=4) | st.dictionaries(TEXTS, s, max_size=4), max_leaves=8)
)
def test_what_is_written_is_read(tmp_path: Path, value: Any) -> None:
    text = dump_yaml(value)
    assert read_yaml(_write(tmp_path, text), 1 << 20) == value
    assert yaml.safe_load(text) == value  # by readers of YAML 1.1, too


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from([*recipe.RECIPE]) | st.text(max_size=8),
        st.recursive(
            PLAIN | st.floats() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s), max_leaves=5
        ),
    )
)
def test_any_content_has_a_verdict(content: dict[str, Any]) -> None:
    checked, problems = recipe.check(content)
    if not problems:
        again, none = recipe.check(checked)
        assert (again, none) == (checked, [])
    assert all(isinstance(problem, str) and len(problem) < 800 for problem in problems)
