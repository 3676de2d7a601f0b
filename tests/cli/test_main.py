import errno
import importlib
import inspect
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vlprune import __version__
from vlprune.cli.main import main
from vlprune.errors import GateError, MachineError, RequestError


COMPRESS = ["compress", "folder/model", "--json", "--output"]


def _one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def test_compress_hands_everything_over(pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "compress",
        "folder/model",
        "-o",
        str(tmp_path / "run"),
        "--json",
        "--ratio",
        "0.9,0.63",
        "--export",
        "onnx",
    ]
    command += ["--data", "vqa=a.json,b.json", "--data", "retrieval=c", "--tasks", "vqa", "--lr", "1e-3", "--seed", "5"]
    assert main(command) == 0
    ((name, arguments, options),) = pipeline.calls
    assert (name, arguments) == ("compress", ("folder/model",))
    assert options == {
        "output": tmp_path / "run",
        "ratios": [0.63, 0.9],
        "method": "multiflow",
        "pattern": "unstructured",
        "permute": False,
        "round_widths": True,
        "mope": None,
        "family": None,
        "calibration": None,
        "calibration_samples": None,
        "data": {"vqa": "a.json,b.json", "retrieval": "c"},
        "tasks": ["vqa"],
        "finetune": "full",
        "max_steps": None,
        "epochs": None,
        "lr": 1e-3,
        "batch_size": None,
        "gradient_checkpointing": False,
        "compile": False,
        "distill": None,
        "image_size": None,
        "export": "onnx",
        "providers": ["cpu"],
        "bench_batches": [1, 8],
        "samples": None,
        "precision": None,
        "fuse": None,
        "pack": "none",
        "values": "fp32",
        "target": "auto",
        "pack_threshold": None,
        "device": "auto",
        "threads": None,
        "seed": 5,
        "skip_broken": False,
        "resume": False,
    }
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"done": True}
    assert captured.err == ""


def test_options_of_structured_methods(pipeline: Any, tmp_path: Path) -> None:
    command = ["compress", "folder/model", "-o", str(tmp_path / "run"), "--json", "--method", "mope", "--distill"]
    assert main([*command, "1,50,0.5", "--mope-stage", "task", "--mope-pairs", "7", "--no-round-widths"]) == 0
    assert main([*command, "none"]) == 0
    first, second = (options for _, _, options in pipeline.calls)
    assert (first["method"], first["round_widths"], first["distill"]) == ("mope", False, [1.0, 50.0, 0.5])
    assert first["mope"] == {"stage": "task", "pairs": 7}
    assert (second["round_widths"], second["distill"], second["mope"]) == (True, [], None)


@pytest.mark.parametrize("weights", ["1,2", "1,2,x", "1,-2,3", "1,inf,1", ""])
def test_distillation_has_three_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str], weights: str) -> None:
    assert main(["compress", "folder/model", "-o", str(tmp_path / "run"), "--distill", weights]) == 2
    assert "three numbers" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["finetune", "export", "validate"])
def test_stages_take_a_run(pipeline: Any, tmp_path: Path, verb: str) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    assert main([verb, str(tmp_path), "--json", "--tasks", "retrieval"]) == 0
    ((name, arguments, options),) = pipeline.calls
    assert (name, arguments) == (verb, (tmp_path,))
    assert options["tasks"] == ["retrieval"]
    assert options["data"] == {}


def test_bench_takes_a_run_and_no_data(pipeline: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    command = ["bench", str(tmp_path), "--json", "--bench-batch", "1,4", "--seconds", "0.5", "--threads", "2"]
    assert main(command) == 0
    ((name, arguments, options),) = pipeline.calls
    assert (name, arguments) == ("bench", (tmp_path,))
    assert options == {
        "tasks": None,
        "providers": ["cpu"],
        "bench_batches": [1, 4],
        "seconds": 0.5,
        "threads": 2,
        "resume": False,
        "cuda_graph": False,
    }
    assert main([*command, "--data", "vqa=a"]) == 2


def test_export_takes_the_options_of_packing(pipeline: Any, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    packing = ["--pack", "sparse", "--values", "fp16", "--target", "avx2", "--pack-threshold", "0.7"]
    assert main(["export", str(tmp_path), "--json", *packing]) == 0
    ((name, _, options),) = pipeline.calls
    assert name == "export"
    chosen = {"pack": "sparse", "values": "fp16", "target": "avx2", "pack_threshold": 0.7}
    assert options.items() >= chosen.items()


def test_unpacking_takes_files_and_folders(pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "g.onnx"
    file.write_bytes(b"")
    assert main(["export", "--unpack", str(file), "--json"]) == 0
    assert main(["export", str(tmp_path), "--unpack", "--json"]) == 0
    assert [(name, arguments) for name, arguments, _ in pipeline.calls] == [
        ("unpack", (file,)),
        ("unpack", (tmp_path,)),
    ]
    capsys.readouterr()
    assert main(["export", str(tmp_path), "--unpack", "--pack", "sparse"]) == 2
    assert "--pack and --unpack exclude each other" in _one_line(capsys)
    assert main(["export", str(file)]) == 2
    assert "is not a run directory" in _one_line(capsys)
    assert len(pipeline.calls) == 2


def test_prune_knows_no_task(pipeline: Any, tmp_path: Path) -> None:
    assert main(["prune", "folder/model", "--output", str(tmp_path), "--json", "--ratio", "0.5"]) == 0
    ((name, _, options),) = pipeline.calls
    assert (name, options["ratios"]) == ("prune", [0.5])
    assert "data" not in options


def test_inspect_prints_fields(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"kind": "masks", "modalities": {"text": 0.9}, "layers": [{"name": "a[0]", "sparsity": 0.5}]}
    monkeypatch.setattr("vlprune.inspect.inspect", lambda path: found)
    assert main(["inspect", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "kind: masks" in out
    assert "a[0]" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("ratio", ["0", "1", "-1", "1.5", "abc", "nan"])
def test_bad_ratios(pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], ratio: str) -> None:
    assert main([*COMPRESS, str(tmp_path), "--ratio", ratio]) == 2
    assert f"--ratio '{ratio}' is not a number strictly between 0 and 1" in _one_line(capsys)
    assert pipeline.calls == []


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["compress", "a/b", "--ration", "0.9"], "error: no such option: --ration; did you mean --ratio?"),
        (["cmpress"], "error: no such command 'cmpress'; did you mean 'compress'"),
        (["prune"], "error: missing argument 'MODEL'; see vlprune prune --help"),
        (["compress", "-o", "x"], "error: missing argument 'MODEL': give it on the command line, or in a --recipe"),
        (["compress", "a/b"], "error: missing option '--output'"),
        (["compress", "a/b", "-o", "x", "--device", "tpu"], "--device"),
        (["compress", "a/b", "-o", "x", "--seed", "-1"], "'--seed': Input should be greater than or equal to 0"),
        (["compress", "a/b", "-o", "x", "--finetune", "half"], "'half' is not one of 'none', 'heads', 'full'"),
        (["compress", "a/b", "-o", "x", "--ratio"], "option '--ratio' requires an argument"),
        (["compress", "a/b", "-o", "/proc/x"], "error: cannot write /proc/x"),
        (["inspect", "no-such-file"], "error: no-such-file: no such file or folder"),
    ],
)
def test_wrong_requests_get_one_line_and_2(capsys: pytest.CaptureFixture[str], command: list[str], says: str) -> None:
    assert main(command) == 2
    assert says in _one_line(capsys)


def test_an_unknown_model_gets_the_nearest_alias(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlprune import models

    monkeypatch.setattr(models, "names", lambda: ["blip-tiny", "clip"], raising=False)
    assert main(["compress", "blip-tyni", "--output", str(tmp_path)]) == 2
    assert "unknown model 'blip-tyni': did you mean blip-tiny?" in _one_line(capsys)


class OutOfMemoryError(RuntimeError):
    """Named like torch's."""


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (RequestError("bad\nfile"), 2, "error: bad file\n"),
        (MachineError("no CUDA"), 3, "error: no CUDA\n"),
        (GateError("too slow"), 1, "error: too slow\n"),
        (MemoryError(), 3, "not enough memory"),
        (OutOfMemoryError("CUDA out of memory"), 3, "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 3, "not enough memory"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), 3, "no space left"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 3, "no space left"),
        (ModuleNotFoundError("No module named 'torch._C'", name="torch._C"), 3, "torch._C is not installed: pip"),
        (ModuleNotFoundError("No module named 'vlprune.x'", name="vlprune.x"), 70, "a bug"),
        (ValueError("a\n" + "b" * 1000), 70, "error: ValueError: a bbb"),
        (KeyboardInterrupt(), 130, "interrupted: "),
    ],
)
def test_errors_become_one_line_and_their_code(
    pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, says: str
) -> None:
    pipeline.error = error
    assert main([*COMPRESS, str(tmp_path)]) == code
    line = _one_line(capsys)
    assert says in line
    assert len(line) < 650


@pytest.mark.parametrize("place", [0, 1, 5])
def test_debug_shows_the_traceback_wherever_it_stands(
    pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: int
) -> None:
    pipeline.error = ValueError("wrong")
    command = [*COMPRESS, str(tmp_path)]
    command.insert(place, "--debug")
    assert main(command) == 70
    captured = capsys.readouterr().err
    assert "Traceback (most recent call last)" in captured
    assert "error: ValueError: wrong" in captured


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vlprune {__version__}\n"
    assert main([]) == 0
    assert "compress" in capsys.readouterr().out


def test_nan_never_reaches_stdout(pipeline: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline.result = {"x": float("nan")}
    assert main([*COMPRESS, str(tmp_path)]) == 70
    assert "ValueError" in _one_line(capsys)


LIGHT = """
import sys
from vlprune.cli.main import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "numpy", "onnx", "onnxruntime", "accelerate", "rich"} & sys.modules.keys()
sys.exit(f"imported {heavy}" if heavy else code)
"""


@pytest.mark.parametrize(
    "command",
    [["--help"], ["compress", "--help"], ["compress", "--ration"], ["compress", "a/b", "-o", "x", "--ratio", "2"]],
)
def test_help_and_wrong_options_import_nothing_heavy(command: list[str], tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT, *command], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == (0 if "--help" in command else 2), done.stderr


def _script(tmp_path: Path, body: str) -> list[str]:
    """A command line whose pipeline runs `body` instead of compressing."""
    lines = [
        "import sys, types, vlprune",
        "fake = types.ModuleType('vlprune.pipeline')",
        "def compress(*a, **k):",
        *(f"    {line}" for line in body.splitlines()),
        "fake.compress = compress",
        "sys.modules['vlprune.pipeline'] = vlprune.pipeline = fake",
        "from vlprune.cli.main import main",
        f"sys.exit(main(['compress', 'a/b', '--json', '--output', {str(tmp_path / 'run')!r}]))",
    ]
    return [sys.executable, "-c", "\n".join(lines)]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_no_temporary_files(tmp_path: Path, number: int, code: int) -> None:
    body = f"""import time
from vlprune.files import atomic_path
with atomic_path({str(tmp_path / "run" / "file")!r}) as path:
    path.write_text("half")
    print("ready", flush=True)
    time.sleep(60)"""
    process = subprocess.Popen(
        _script(tmp_path, body),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests run as a shell's background job, interrupts are ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert list((tmp_path / "run").iterdir()) == []


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    process = subprocess.Popen(
        _script(tmp_path, "import time; time.sleep(0.3); return {'x': 'y' * 10**6}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(timeout=20) == 141
    assert process.stderr is not None
    assert process.stderr.read() == ""


def test_completion_offers_options_and_values() -> None:
    script = "import sys; from vlprune.cli.main import main; sys.exit(main())"

    def complete(words: str) -> list[str]:
        environment = os.environ | {
            "_VLPRUNE_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
        return done.stdout.split()

    assert complete("vlprune compr") == ["compress"]
    assert complete("vlprune compress --meth") == ["--method"]
    assert complete("vlprune compress --method lo") == ["local-magnitude"]
    assert complete("vlprune compress --ratio 7 --finetune h") == ["heads"]


def test_every_verb_fits_the_library(pipeline: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the verbs pass is exactly what the functions of vlprune.pipeline take."""
    (tmp_path / "recipe.yaml").write_text("{model: blip-tiny, method: omp, ratios: [0.5], seed: 0}")
    run = str(tmp_path)
    for verb in ("compress", "prune"):
        assert main([verb, "a/b", "--output", run, "--json"]) == 0
    for verb in ("finetune", "export", "validate", "inspect"):
        assert main([verb, run, "--json"]) == 0
    monkeypatch.delitem(sys.modules, "vlprune.pipeline")
    real = importlib.import_module("vlprune.pipeline")
    for name, arguments, options in pipeline.calls:
        signature = inspect.signature(getattr(real, name))
        signature.bind(*arguments, **options)
        left_out = {"model", "run", "path", "finetune_seed", "dry_run"}
        assert signature.parameters.keys() - options.keys() <= left_out, name
