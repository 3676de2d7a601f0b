"""Every bad input through the real command line: one line on stderr, the right exit code, nothing half-written."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from vlprune.cli.main import main
from vlprune.models import loading
from vlprune.pruning.masks import load_masks
from vlprune.report.manifest import verify_manifest
from vlprune.run import Run
from vlprune.training import finetune


HERE = ["--device", "cpu", "--threads", "1"]
SCRIPT = "import sys; from vlprune.cli.main import main; sys.exit(main())"
Fails = Callable[..., str]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where runs are to go; not there yet."""
    return tmp_path / "out" / "run"


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str], out: Path) -> Fails:
    """Run a command that must fail; gives the one line it prints. Nothing may be left where it was to write."""

    def run(code: int, *arguments: object) -> str:
        capfd.readouterr()
        assert main([*map(str, arguments)]) == code
        return only_line(*capfd.readouterr(), out)

    return run


def only_line(stdout: str, stderr: str, out: Path) -> str:
    assert stdout == ""
    assert stderr.startswith("error: ") and stderr.endswith("\n") and stderr.count("\n") == 1, stderr
    assert "Traceback" not in stderr and len(stderr) < 700
    assert not out.exists() and not out.parent.exists()
    return stderr.removeprefix("error: ").strip()


def request(model: object, out: Path, photos: Path | None = None, task: str = "captioning", *more: object) -> list[Any]:
    """A command that is right but for what the test makes wrong."""
    command = ["compress", model, "-o", out, "--ratio", "0.5", "--finetune", "none", *HERE, *more]
    return command if photos is None else [*command, "--calibration", photos, "--data", f"{task}={photos}"]


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["compress", "prune"])
@pytest.mark.parametrize("ratio", ["0", "1", "-1", "1.5", "abc", "nan", "inf", "", "0.5,,0.6", "0.5,0.5", "0.5,1"])
def test_ratios(fails: Fails, small_models: dict[str, Path], out: Path, verb: str, ratio: str) -> None:
    assert "--ratio" in fails(2, verb, small_models["vqa"], "-o", out, "--ratio", ratio)


def test_a_ratio_that_looks_like_an_option_is_still_a_ratio(
    fails: Fails, small_models: dict[str, Path], out: Path
) -> None:
    message = fails(2, "compress", small_models["vqa"], "-o", out, "--ratio=-1")
    assert message.startswith("--ratio '-1' is not a number strictly between 0 and 1")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("blip-tyni", "unknown model 'blip-tyni': did you mean blip-tiny"),
        ("BLIP", "did you mean blip"),
        ("resnet", "unknown model 'resnet'"),
        ("nowhere.pth", "nowhere.pth"),
        ("./nowhere", "there is no file or folder ./nowhere: check the path"),
        ("/no/such/model.pth", "there is no file or folder /no/such/model.pth: check the path"),
        ("a/b/c", "a/b/c"),
        ("..", "config.json"),
        ("", "unknown model ''"),
    ],
)
def test_unknown_models(fails: Fails, photos: Path, out: Path, model: str, says: str) -> None:
    assert says in fails(2, *request(model, out, photos))


def test_options_that_do_not_exist(fails: Fails, small_models: dict[str, Path], photos: Path, out: Path) -> None:
    command = request(small_models["captioning"], out, photos)
    assert "did you mean multiflow" in fails(2, *command, "--method", "multiflo")
    assert "--pattern" in fails(2, *command, "--pattern", "4:2")
    assert "0.5" in fails(2, *command, "--pattern", "1:4")  # keeps a quarter, not a half
    assert "which pattern 7x5 does not divide" in fails(2, *command, "--pattern", "7x5")
    assert "unknown provider 'gpu'" in fails(2, *command, "--provider", "gpu")
    assert "--data" in fails(2, *command, "--data", "captioning")
    assert "did you mean captioning" in fails(2, *command, "--data", "caption=x")
    assert "names captioning twice" in fails(2, *command, "--data", f"captioning={photos}")
    assert "--image-size" in fails(2, *command, "--image-size", "33")
    assert "'small'" in fails(2, *command, "--device", "small")
    assert "--lr" in fails(2, *command, "--lr", "-1")
    assert "--tasks names vqa but there is no --data vqa=PATH" in fails(2, *command, "--tasks", "vqa,captioning")
    assert "did you mean blip" in fails(2, *command, "--family", "blib")


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def spoiled(small_models: dict[str, Path], tmp_path: Path) -> Path:
    """A folder that a test may spoil."""
    return Path(shutil.copytree(small_models["captioning"], tmp_path / "spoiled"))


def test_a_file_needs_its_family(fails: Fails, small_models: dict[str, Path], photos: Path, out: Path) -> None:
    message = fails(2, *request(small_models["original"], out, photos))
    assert message.endswith("model_base.pth is a file: say what it holds, as in --family blip")


@pytest.mark.parametrize("size", [0, 7, 100, 20_000, -1])
def test_truncated_safetensors(fails: Fails, spoiled: Path, photos: Path, out: Path, size: int) -> None:
    path = spoiled / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert f"{path} is no intact safetensors file" in fails(2, *request(spoiled, out, photos))


def lying(change: Callable[[dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    """Change the header of a safetensors file, not its data."""

    def rewrite(content: bytes) -> bytes:
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[end:]

    return rewrite


KEY = "vision_model.post_layernorm.weight"
LIES: dict[str, Callable[[bytes], bytes]] = {
    "header of 2**62 bytes": lambda content: (1 << 62).to_bytes(8, "little") + content[8:],
    "header is no JSON": lambda content: content[:8] + b"\xff" * (len(content) - 8),
    "a tensor of 4 TB": lying(lambda h: h[KEY].update(shape=[1 << 20, 1 << 20], data_offsets=[0, 1 << 42])),
    "shape larger than the data": lying(lambda h: h[KEY].update(shape=[3200])),
    "another shape of the same size": lying(lambda h: h[KEY].update(shape=[4, 8])),
    "overlapping tensors": lying(lambda h: h[KEY].update(data_offsets=[0, 128])),
    "unknown type": lying(lambda h: h[KEY].update(dtype="F31")),
    "a tensor left out": lying(lambda h: h.pop(KEY)),
    "a negative size": lying(lambda h: h[KEY].update(shape=[-32])),
}


@pytest.mark.parametrize("lie", LIES)
def test_safetensors_that_lie(fails: Fails, spoiled: Path, photos: Path, out: Path, lie: str) -> None:
    path = spoiled / "model.safetensors"
    path.write_bytes(LIES[lie](path.read_bytes()))
    assert "spoiled" in fails(2, *request(spoiled, out, photos))


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_a_pickle_that_runs_code_is_refused(
    fails: Fails, small_models: dict[str, Path], spoiled: Path, photos: Path, out: Path, tmp_path: Path
) -> None:
    target = tmp_path / "code ran"
    state = torch.load(small_models["original"], weights_only=True)
    file = tmp_path / "evil.pth"
    for value in ({**state, "x": Payload(target)}, Payload(target)):
        torch.save(value, file)
        message = fails(2, *request(file, out, photos), "--family", "blip")
        assert message.endswith("holds more than tensors and was not loaded: vlprune runs no code from a checkpoint")
        torch.save(value, file, _use_new_zipfile_serialization=False)
        assert "evil.pth" in fails(2, *request(file, out, photos), "--family", "blip")
        file.write_bytes(pickle.dumps(value))
        assert "evil.pth" in fails(2, *request(file, out, photos), "--family", "blip")
    (spoiled / "model.safetensors").unlink()
    torch.save({KEY: Payload(target)}, spoiled / "pytorch_model.bin")
    assert "runs no code" in fails(2, *request(spoiled, out, photos))
    assert not target.exists()
    pickle.loads(file.read_bytes())  # it was no dud
    assert target.exists()


def test_original_files_that_are_none(
    fails: Fails, small_models: dict[str, Path], photos: Path, out: Path, tmp_path: Path
) -> None:
    shutil.copytree(small_models["original"].parent, tmp_path / "files")
    file = tmp_path / "files" / "model_base.pth"
    whole = file.read_bytes()
    for content in (b"", b"PK", whole[:5000], whole[:-200], b"\x80\x02}q\x00."):
        file.write_bytes(content)
        assert "model_base.pth" in fails(2, *request(file, out, photos), "--family", "blip")
    state = torch.load(small_models["original"], weights_only=True)["model"]
    for spoil in (
        {},
        {"model": 3},
        {"model": {1: torch.ones(1)}},
        {"model": {k: v for k, v in state.items() if "pos_embed" not in k}},
        {"model": state | {"visual_encoder.pos_embed": torch.ones(1, 8, 32)}},
        {"model": state | {"text_encoder.encoder.layer.9.output.dense.weight": torch.ones(1)}},
    ):
        torch.save(spoil, file)
        assert "model_base.pth" in fails(2, *request(file, out, photos), "--family", "blip")
    (file.parent / "vocab.txt").unlink()
    file.write_bytes(whole)
    assert "put its vocab.txt in" in fails(3, *request(file, out, photos), "--family", "blip")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "t5"}, "is of model type 't5': supported are 'blip', 'clip', 'siglip', "),
        ({"model_type": None}, "is of model type None: supported are 'blip', "),
        ({"text_config": {"vocab_size": 10**12}}, "spoiled"),
        ({"vision_config": {"image_size": 10**6, "patch_size": 1}}, "spoiled"),
        ({"vision_config": {"num_hidden_layers": 10**9}}, "spoiled"),
        ({"vision_config": None, "text_config": 5}, "config.json"),
    ],
    ids=str,
)
def test_a_config_of_something_else(
    fails: Fails, spoiled: Path, photos: Path, out: Path, change: dict[str, Any], says: str
) -> None:
    config = json.loads((spoiled / "config.json").read_text())
    (spoiled / "config.json").write_text(json.dumps(config | change))
    start = time.process_time()
    assert says in fails(2, *request(spoiled, out, photos))
    assert time.process_time() - start < 10


def test_files_that_are_missing(fails: Fails, spoiled: Path, photos: Path, out: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        (spoiled / name).rename(spoiled / "aside")
        assert "spoiled" in fails(2, *request(spoiled, out, photos))
        (spoiled / "aside").rename(spoiled / name)
    (spoiled / "config.json").write_text("{")
    assert "config.json is not valid JSON" in fails(2, *request(spoiled, out, photos))


def test_weights_that_are_not_numbers(fails: Fails, spoiled: Path, photos: Path, out: Path) -> None:
    path = spoiled / "model.safetensors"
    tensors = load_file(path)
    tensors["vision_model.encoder.layers.0.mlp.fc1.weight"][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    assert "layers.0.mlp.fc1.weight holds NaN or infinity" in fails(2, *request(spoiled, out, photos))


# --- data -------------------------------------------------------------------------------------------------------------

GOOD = [
    {"file_name": f"{i}.png", "captions": ["a red circle"], "split": "train" if i < 8 else "test"} for i in range(12)
]
BROKEN = {
    "missing image": ({"file_name": "none.png"}, "missing image"),
    "broken image": ({"file_name": "broken.png"}, "broken image"),
    "truncated image": ({"file_name": "truncated.png"}, "broken image"),
    "image elsewhere": ({"file_name": "../elsewhere.png"}, "forbidden image path"),
    "empty caption": ({"captions": [" "]}, "empty caption"),
    "no caption": ({"captions": []}, "empty caption"),
    "wrong field": ({"captions": None, "text": "a red circle"}, "wrong caption"),
    "caption is a number": ({"captions": 7}, "wrong caption"),
    "wrong split": ({"split": "dev"}, "wrong split"),
}


@pytest.fixture
def album(photos: Path, tmp_path: Path) -> Path:
    """Data that a test may spoil, with images that are none."""
    folder = Path(shutil.copytree(photos, tmp_path / "album"))
    (folder / "broken.png").write_bytes(b"no image")
    for name in ("truncated.png", "cut.png"):
        (folder / name).write_bytes((folder / "1.png").read_bytes()[:-2000])
    return folder


def write(album: Path, *changes: dict[str, Any]) -> None:
    """Write captions.jsonl with further records, one test image each unless told otherwise."""
    records = GOOD + [{"file_name": "9.png", "captions": ["a circle"], "split": "test"} | change for change in changes]
    (album / "captions.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize("case", BROKEN)
def test_broken_captions(fails: Fails, small_models: dict[str, Path], album: Path, out: Path, case: str) -> None:
    change, says = BROKEN[case]
    write(album, change)
    message = fails(2, *request(small_models["captioning"], out, album))
    assert f"{album / 'captions.jsonl'}, record 13: {says}: " in message or f"record 13: {says} {album}" in message
    assert message.endswith("pass --skip-broken")


def test_broken_calibration_captions(
    fails: Fails, small_models: dict[str, Path], photos: Path, album: Path, out: Path
) -> None:
    for change, says in (BROKEN["missing image"], BROKEN["broken image"]):
        write(album, {**change, "split": "train"})
        model = small_models["captioning"]
        assert says in fails(2, "prune", model, "-o", out, "--calibration", album, "--ratio", "0.5", *HERE)
        command = request(model, out, None, "", "--calibration", album, "--data", f"captioning={photos}")
        assert says in fails(2, *command)


def test_skipped_records_are_counted(small_models: dict[str, Path], album: Path, out: Path) -> None:
    changes = [change for change, _ in BROKEN.values() if "split" not in change]
    write(album, *changes, {"file_name": "cut.png", "split": "train"})
    command = request(small_models["captioning"], out, album, "captioning", "--skip-broken", "--finetune", "full")
    assert main([*map(str, command), "--max-steps", "1"]) == 0
    report = json.loads((out / "report.json").read_text())
    # Records are read before they are told apart by split; images are decoded after.
    undecoded = {"test": 2, "train": 1}
    unreadable = len(changes) - undecoded["test"]
    assert {row["skipped"] for row in report["metrics"]} == {unreadable + undecoded["test"]}
    skipped = {row["name"].split("/")[0]: row.get("skipped") for row in report["stages"]}
    assert skipped["statistics"] == skipped["finetune"] == unreadable + undecoded["train"]
    text = (out / "report.md").read_text()
    assert f"{unreadable + 2} broken records skipped" in text
    assert f"statistics ({unreadable + 1} broken records skipped)" in text


def test_all_records_broken(fails: Fails, small_models: dict[str, Path], album: Path, out: Path) -> None:
    (album / "captions.jsonl").write_text('{"file_name": "none.png", "caption": "a", "split": "test"}\n' * 2)
    message = fails(2, *request(small_models["captioning"], out, album), "--skip-broken")
    assert "no usable record (2 skipped: 2 missing image)" in message


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", "null", "7", "{", '["a"]', "[" * 100_000, "\x00", '[{"image": "0.png"}]']
)
def test_caption_files_that_are_none(
    fails: Fails, small_models: dict[str, Path], album: Path, out: Path, content: str
) -> None:
    (album / "test.json").write_text(content)
    data = f"captioning={album / 'test.json'}"
    message = fails(2, *request(small_models["captioning"], out, None, "", "--method", "omp", "--data", data))
    assert str(album / "test.json") in message


def test_data_of_the_wrong_kind(fails: Fails, small_models: dict[str, Path], photos: Path, out: Path) -> None:
    pair = f"{photos / 'vqa_train.json'},{photos / 'vqa_test.json'}"
    calibration = ["--calibration", photos]
    for task in ("retrieval", "captioning"):
        command = request(small_models["pretraining"], out, None, "", *calibration, "--data", f"{task}={pair}")
        assert "holds questions, but captions are needed: give a folder" in fails(2, *command)
    data = f"vqa={photos / 'captions.jsonl'}"
    command = request(small_models["pretraining"], out, None, "", *calibration, "--data", data)
    assert "holds captions, but questions are needed: give a folder" in fails(2, *command)
    command = request(small_models["pretraining"], out, None, "", "--calibration", photos / "vqa_train.json")
    assert "holds questions, but captions are needed" in fails(2, *command, "--data", f"vqa={photos}")
    command = request(small_models["pretraining"], out, None, "", *calibration, "--data", "vqa=nowhere")
    assert "there is no file or folder nowhere: give a folder" in fails(2, *command)
    command = request(small_models["pretraining"], out, None, "", *calibration, "--data", f"vqa={photos / '0.png'}")
    assert "0.png" in fails(2, *command)


@pytest.mark.parametrize("model", ["captioning", "blip-captioning", "blip", "someone/model", "blip-base-random"])
def test_real_models_need_real_data(
    fails: Fails, small_models: dict[str, Path], photos: Path, out: Path, model: str
) -> None:
    name = small_models.get(model, model)
    data = ["--data", f"captioning={photos}"]
    assert "needs --calibration for multiflow: a folder with" in fails(2, *request(name, out, None, "", *data))
    tasks = "captioning" if model == "blip-captioning" else "retrieval and captioning"  # what the alias offers
    assert f"needs --data TASK=PATH: for {tasks} a folder with" in fails(
        2, *request(name, out, None, "", "--calibration", photos)
    )
    if model == "blip-base-random":
        return  # never trained on anything: drawn scenes are as good as photographs
    for wrong in (["--calibration", "scenes", *data], ["--calibration", photos, "--data", "captioning=scenes"]):
        assert "the embedded scenes are no data for" in fails(2, *request(name, out, None, "", *wrong))


# --- the machine ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="ONNX Runtime has CUDA")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "cpu,cuda"])
def test_a_provider_that_is_not_there(
    fails: Fails, small_models: dict[str, Path], photos: Path, out: Path, provider: str
) -> None:
    for export in ("onnx", "none"):
        command = request(small_models["captioning"], out, photos, "captioning", "--export", export)
        message = fails(3, *command, "--provider", provider)
        assert message.startswith(f"provider {provider.split(',')[-1]} ") and "--provider cpu" in message


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="ONNX Runtime has CUDA")
def test_a_missing_provider_is_told_at_once(small_models: dict[str, Path], photos: Path, out: Path) -> None:
    command = request(small_models["captioning"], out, photos, "captioning", "--provider", "cuda", "--export", "onnx")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", SCRIPT, *map(str, command)], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 3
    only_line(done.stdout, done.stderr, out)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5  # whatever else the machine does


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("verb", ["compress", "prune"])
def test_a_device_that_is_not_there(
    fails: Fails, small_models: dict[str, Path], photos: Path, out: Path, verb: str
) -> None:
    command = [verb, small_models["captioning"], "-o", out, "--calibration", photos, "--device", "cuda"]
    data = ["--data", f"captioning={photos}"] if verb == "compress" else []
    assert fails(3, *command, *data).startswith("--device cuda: PyTorch sees no CUDA device here")


def offline(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    import huggingface_hub

    monkeypatch.setenv("VLPRUNE_CACHE", str(cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache / "hub"))


@pytest.mark.parametrize("model", ["blip", "blip-14m", "blip-captioning", "someone/some-model"])
def test_no_network(
    fails: Fails, photos: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    offline(monkeypatch, tmp_path / "cache")
    message = fails(3, *request(model, out, photos))
    assert "download" in message and ("--family blip" in message) == (model in ("blip", "blip-14m"))
    assert not (tmp_path / "cache").exists()


def test_a_network_that_breaks_off(
    fails: Fails, photos: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    class Answer:
        headers = {"Content-Length": "1000"}

        def __init__(self) -> None:
            self.chunks = [b"x" * 400, b""]

        def __enter__(self) -> "Answer":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def read(self, size: int) -> bytes:
            return self.chunks.pop(0)

    def refuse(*arguments: object, **options: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", lambda *arguments, **options: Answer())
    assert "model_base.pth broke off after 400 of 1000 bytes" in fails(3, *request("blip", out, photos))
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    assert "cannot download model_base.pth (Name or service not known)" in fails(3, *request("blip", out, photos))
    assert list((tmp_path / "cache").iterdir()) == []


# --- where results go -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Mount a tmpfs with the options given."""
    mounts = []

    def mount(options: str) -> Path:
        folder = tmp_path_factory.mktemp("mounted")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.strip()}")
        mounts.append(folder)
        return folder

    yield mount
    for folder in mounts:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_an_output_that_is_not_writable(
    fails: Fails, small_models: dict[str, Path], photos: Path, out: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    places = [tmp_path / "file", tmp_path / "file" / "run", "/proc/x", "/proc/x/y", "/sys/vlprune", "/dev/null"]
    for place in places:
        message = fails(2, *request(small_models["captioning"], place, photos))
        assert message.startswith(f"cannot write {place} (") and message.endswith("choose another --output")
    assert (tmp_path / "file").read_text() == "in the way"
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    assert "is not empty and no run directory" in fails(
        2, *request(small_models["captioning"], tmp_path / "full", photos)
    )
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_a_read_only_file_system(
    fails: Fails, small_models: dict[str, Path], photos: Path, mounted: Callable[[str], Path]
) -> None:
    folder = mounted("size=64k,ro")
    for place in (folder, folder / "run"):
        message = fails(2, *request(small_models["captioning"], place, photos))
        assert message == f"cannot write {place} (Read-only file system): choose another --output"


def test_a_folder_without_permission(
    capfd: pytest.CaptureFixture[str],
    small_models: dict[str, Path],
    photos: Path,
    out: Path,
    open_folder: Path,
    ordinary_user: Callable[[], AbstractContextManager[None]],
) -> None:
    def fails(*arguments: object) -> str:
        capfd.readouterr()
        with ordinary_user():
            assert main([*map(str, arguments)]) == 2
        return only_line(*capfd.readouterr(), out)

    # Import all there is to import first: an ordinary user may not be allowed to.
    assert main([*map(str, request(small_models["captioning"], Path("/dev/null"), photos))]) == 2
    locked, closed = open_folder / "locked", open_folder / "closed"
    for folder, bits in ((locked, 0o555), (closed, 0)):
        folder.mkdir()
        folder.chmod(bits)
        message = fails(*request(small_models["captioning"], folder / "run", photos))
        assert message == f"cannot write {folder / 'run'} (Permission denied): choose another --output"
    for verb in ("inspect", "bench"):
        message = fails(verb, closed / "run")
        assert message == f"cannot use {closed / 'run'} (Permission denied): check the path"


def test_a_name_that_is_too_long(fails: Fails, small_models: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    name = tmp_path / ("n" * 300)
    for command in (["inspect", name], ["bench", name], request(small_models["captioning"], name, photos)):
        assert fails(2, *command) == f"cannot use {name} (File name too long): check the path"


@pytest.fixture(scope="session")
def disk(mounted: Callable[[str], Path]) -> Path:
    """A disk of 24 MB."""
    return mounted("size=24m")


@pytest.mark.parametrize("kibibytes", [0, 8, 64])
@pytest.mark.parametrize(
    "stage", ["statistics", "prune", "finetune/multiflow", "score", "export", "validate", "report"]
)
def test_a_disk_that_fills_up(
    small_models: dict[str, Path],
    photos: Path,
    disk: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    kibibytes: int,
) -> None:
    """When the stage begins, something else takes all of the disk but a little."""
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run, ballast = disk / "run", disk / "ballast"
    command = request(small_models["captioning"], run, photos, "captioning", "--export", "onnx", "--json")
    command += ["--finetune", "full", "--max-steps", "2", "--bench-batch", "1"]
    monkeypatch.setattr("vlprune.stages.BENCH_SECONDS", 0.02)
    monkeypatch.setattr("vlprune.stages.finetune", partial(finetune.finetune, save_seconds=0))

    def fill(kept: int) -> None:
        if not ballast.exists():
            with ballast.open("wb") as file:
                file.write(b"\0" * max(0, shutil.disk_usage(disk).free - kept))

    def watched(name: str, method: Any) -> Any:
        def call(self: Run, *arguments: Any, **options: Any) -> Any:
            if (arguments[0] if name == "stage" else "report").startswith(stage):
                fill(kibibytes << 10)
            return method(self, *arguments, **options)

        return call

    for name in ("stage", "report"):
        monkeypatch.setattr(Run, name, watched(name, getattr(Run, name)))
    code = main([*map(str, command)])
    stdout, stderr = capfd.readouterr()
    if code == 0:
        assert kibibytes == 64 and stage in ("score", "validate", "report", "statistics", "prune")  # these write little
        return
    assert code == 3, stderr
    assert stdout == "" and stderr.count("\n") == 1 and stderr.startswith("error: no space left"), stderr
    assert not (run / "report.json").exists() or stage == "report"
    assert list(run.rglob(".*")) == []
    for path in run.rglob("*"):
        if path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix == ".safetensors" and path.parent.name != "masks":
            load_file(path)
    for path in (run / "masks").glob("*"):
        load_masks(path)
    for folder in (run / "checkpoints").glob("*/*"):
        loading.load(str(folder), family=None, image_size=None, seed=0)
    for folder in (run / "onnx").glob("*/*"):
        assert {"task.json", "image_encoder.onnx", "text_decoder.onnx"} <= {path.name for path in folder.iterdir()}

    ballast.unlink()
    monkeypatch.undo()
    monkeypatch.setattr("vlprune.stages.BENCH_SECONDS", 0.02)
    if kibibytes == 0:
        assert main([*map(str, command), "--resume"]) == 0
        verify_manifest(run)


def test_a_small_disk(small_models: dict[str, Path], photos: Path, mounted: Callable[[str], Path]) -> None:
    """The program itself on a disk too small for its first checkpoint."""
    folder = mounted("size=300k")
    command = request(small_models["captioning"], folder / "run", photos, "captioning", "--finetune", "full")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, command), "--max-steps", "1"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("error: no space left while writing") and done.stderr.count("\n") == 1
    assert not (folder / "run" / "report.json").exists() and list(folder.rglob(".*")) == []
