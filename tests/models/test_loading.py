"""From names, folders and files to models; and everything that can be wrong with them, each answered by one line."""

import json
import os
import pickle
import subprocess
import sys
import threading
import warnings
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import vlprune
from vlprune.errors import MachineError, RequestError, VlpruneError
from vlprune.models import loading
from vlprune.models.blip import cross_keys_values, tasks_of


TASKS = ("retrieval", "captioning", "vqa")


def refused(model: Path | str, kind: type[VlpruneError] = RequestError, **options: object) -> str:
    """Load what cannot be loaded; give the message, which must be one line."""
    with pytest.raises(VlpruneError) as caught:
        vlprune.load(str(model), **options)
    assert type(caught.value) is kind, caught.value
    message = str(caught.value)
    assert message and "\n" not in message and "Traceback" not in message
    return message


@pytest.fixture
def folder(checkpoints, tmp_path) -> Path:
    """A retrieval checkpoint of Hugging Face that a test may spoil."""
    checkpoints.write_hugging_face(tmp_path / "small", "retrieval")
    return tmp_path / "small"


def edit(path: Path, change) -> None:
    """Change a JSON file, or the tensors of a safetensors file, in place."""
    if path.suffix == ".json":
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})


# --- original files ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def everything(model) -> list[torch.Tensor]:
    """Outputs that depend on every tensor of a pretraining model."""
    generator = torch.Generator().manual_seed(0)
    pixels, ids = torch.randn(2, 3, 32, 32, generator=generator), torch.randint(6, 50, (2, 6), generator=generator)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    states = model.image_states(pixels)
    cross = cross_keys_values(model.text_encoder, states)
    losses = model.pretraining_loss(model.caption_batch(pixels.numpy(), ["a red circle", "a blue star"], [0, 1]))
    return [
        states,
        model.image_embeds(states),
        model.text_embeds(ids, mask),
        model.itm_logits(ids, mask, cross),
        model._decoder_logits(ids, mask, states, None),
        losses["itc"],
        losses["lm"],
    ]


def test_an_original_file_gives_the_same_outputs(checkpoints, tmp_path):
    model = checkpoints.pretraining_model(width=128)
    path = tmp_path / "files" / "model_base.pth"
    checkpoints.write_original(path, model, config={"lr": 3e-4})
    loaded = vlprune.load(str(path), family="blip")
    assert loaded.tasks == TASKS and loaded.tied and not loaded.training
    assert loaded.source.checkpoint == str(path) and len(loaded.source.sha256) == 64
    text, vision = loaded.config.text_config, loaded.config.vision_config
    assert (text.num_attention_heads, vision.num_attention_heads, vision.layer_norm_eps) == (2, 2, 1e-6)
    # The authors' vocabulary ends with [DEC], [ENC]; the one here begins with them.
    assert loaded.processor.first_ids["dec"] == text.vocab_size - 2
    loaded.processor.first_ids.update(model.processor.first_ids)
    for ours, wanted in zip(everything(loaded), everything(model), strict=True):
        torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task", TASKS)
def test_original_files_of_single_tasks(task, checkpoints, tmp_path):
    model = checkpoints.pretraining_model(width=64).for_task(task)
    path = tmp_path / "files" / "task.pth"
    checkpoints.write_original(path, model)
    loaded = vlprune.load(str(path), family="blip", image_size=48)
    assert loaded.tasks == (task,) and loaded.processor.image_size == 48
    refused_tasks = set(TASKS) - {task}
    for other in refused_tasks:
        with pytest.raises(RequestError, match=f"cannot do {other}.*it offers {task}"):
            loaded.for_task(other)


def test_a_file_must_say_its_family(checkpoints, tmp_path):
    path = tmp_path / "files" / "model.pth"
    checkpoints.write_original(path, checkpoints.pretraining_model(64))
    assert "--family blip" in refused(path)
    assert "did you mean blip" in refused(path, family="blib").lower()


def test_original_files_that_are_none(tmp_path):
    path = tmp_path / "model.pth"
    for value in (
        {"model": 3},
        [1, 2],
        {"model": {"a": torch.ones(2)}},
        {"model": {}},
        {"model": {3: torch.ones(2)}},
        {"model": {"visual_encoder.pos_embed": torch.ones(3)}},
        {"model": {"visual_encoder.pos_embed": torch.ones(1, 6, 64)}},
    ):
        torch.save(value, path)
        assert "model.pth" in refused(path, family="blip")
    path.write_bytes(b"no PyTorch file")
    assert "model.pth" in refused(path, family="blip")
    path.write_bytes(b"")
    refused(path, family="blip")


@pytest.mark.parametrize("cut", [10, 1000, -1000, -10])
def test_truncated_original_files(cut, checkpoints, tmp_path):
    path = tmp_path / "model.pth"
    checkpoints.write_original(path, checkpoints.pretraining_model(64))
    path.write_bytes(path.read_bytes()[:cut])
    assert "copy or download it again" in refused(path, family="blip")


def test_an_original_file_lacks_a_tensor(checkpoints, tmp_path):
    path = tmp_path / "model.pth"
    state = checkpoints.original_names(checkpoints.pretraining_model(64))
    checkpoints.write_original(path, checkpoints.pretraining_model(64))
    for key in ("visual_encoder.blocks.1.attn.qkv.bias", "text_encoder.encoder.layer.0.attention.self.query.weight"):
        torch.save({"model": {k: v for k, v in state.items() if k != key}}, path)
        assert "lacks" in refused(path, family="blip")


# --- code in checkpoints ----------------------------------------------------------------------------------------------


class Harmful:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mknod, (str(self.target),)


def test_code_in_a_checkpoint_does_not_run(folder, tmp_path):
    target = tmp_path / "harm"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"model": tensors, "extra": Harmful(target)}, tmp_path / "model.pth")
    torch.save({**tensors, "extra": Harmful(target)}, folder / "pytorch_model.bin")
    (tmp_path / "bare.pth").write_bytes(pickle.dumps({"model": Harmful(target)}))
    assert "runs no code" in refused(tmp_path / "model.pth", family="blip")
    assert "runs no code" in refused(folder)
    with warnings.catch_warnings(action="ignore"):  # torch's, about the old protocol
        refused(tmp_path / "bare.pth", family="blip")
    assert not target.exists()
    pickle.loads((tmp_path / "bare.pth").read_bytes())  # it was no dud
    assert target.exists()


def test_code_beside_a_checkpoint_does_not_run(folder, tmp_path):
    target = tmp_path / "harm"
    (folder / "modeling_evil.py").write_text(f"open({str(target)!r}, 'w')\nclass Evil: pass\n")
    (folder / "tokenization_evil.py").write_text(f"open({str(target)!r}, 'w')\nclass Evil: pass\n")
    edit(folder / "config.json", lambda c: c.update(auto_map={"AutoModel": "modeling_evil.Evil"}))
    edit(
        folder / "tokenizer_config.json",
        lambda c: c.update(tokenizer_class="Evil", auto_map={"AutoTokenizer": [None, "tokenization_evil.Evil"]}),
    )
    vlprune.load(str(folder))
    assert not target.exists()


# --- folders ----------------------------------------------------------------------------------------------------------


def test_all_forms_of_weights_are_read(folder):
    wanted = vlprune.load(str(folder)).state_dict()
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in refused(folder)

    torch.save(tensors, folder / "pytorch_model.bin")
    found = vlprune.load(str(folder)).state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    (folder / "pytorch_model.bin").unlink()

    shards = {f"model-0000{i}-of-00002.safetensors": sorted(tensors)[i - 1 :: 2] for i in (1, 2)}
    for name, keys in shards.items():
        save_file({key: tensors[key] for key in keys}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, keys in shards.items() for key in keys}}))
    found = vlprune.load(str(folder)).state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)

    edit(index, lambda i: i["weight_map"].update({"itm_head.bias": "../elsewhere.safetensors"}))
    assert "outside its folder" in refused(folder)
    edit(index, lambda i: i["weight_map"].update({"itm_head.bias": "missing.safetensors"}))
    assert "missing.safetensors" in refused(folder)
    index.write_text('{"weight_map": {}}')
    assert "lists no weights" in refused(folder)
    index.write_text('{"weight_map": [1]}')
    assert "lists no weights" in refused(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_become_float32(dtype, folder):
    edit(folder / "model.safetensors", lambda t: t.update({k: v.to(dtype) for k, v in t.items()}))
    assert {p.dtype for p in vlprune.load(str(folder)).parameters()} == {torch.float32}


@pytest.mark.parametrize("cut", [0, 4, 8, 100, 5000, -1])
def test_truncated_weights(cut, folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    assert "no intact safetensors file" in refused(folder)


def test_weights_that_lie_about_their_size(folder):
    header = json.dumps({"a": {"dtype": "F32", "shape": [1 << 20, 1 << 20], "data_offsets": [0, 1 << 42]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 64)
    assert "no intact safetensors file" in refused(folder)
    (folder / "model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + header)
    assert "no intact safetensors file" in refused(folder)


def test_missing_unknown_and_misshapen_tensors(folder):
    weights = folder / "model.safetensors"
    kept = weights.read_bytes()
    key = "text_encoder.encoder.layer.1.output.dense.bias"

    edit(weights, lambda t: t.pop(key))
    assert refused(folder) == f"{folder} lacks {key}"
    weights.write_bytes(kept)

    edit(weights, lambda t: [t.pop(k) for k in list(t) if k.startswith("vision_model.encoder.layers.1.")])
    assert refused(folder) == f"{folder} holds 1 layers under vision_model.encoder.layers, its config says 2"
    weights.write_bytes(kept)

    edit(weights, lambda t: t.update({"vision_model.extra": torch.ones(1), "text_encoder.more": torch.ones(1)}))
    assert refused(folder) == f"{folder} holds unknown text_encoder.more and 1 more"
    weights.write_bytes(kept)

    edit(weights, lambda t: t.update({key: torch.ones(5)}))
    assert refused(folder) == f"{folder}: {key} has shape [5], its config says [32]"
    weights.write_bytes(kept)

    edit(weights, lambda t: t.update({"vision_model.embeddings.position_embedding": torch.ones(1, 8, 32)}))
    assert "\n" not in refused(folder)


def test_a_missing_module_refuses_its_task_only(checkpoints, tmp_path):
    checkpoints.pretraining_model().save(tmp_path)
    edit(tmp_path / "model.safetensors", lambda t: [t.pop(k) for k in list(t) if k.startswith("itm_head")])
    model = vlprune.load(str(tmp_path))
    assert model.tasks == ("vqa",)
    with pytest.raises(RequestError, match=r"cannot do retrieval: its checkpoint lacks itm_head; it offers vqa"):
        model.for_task("retrieval")
    edit(tmp_path / "model.safetensors", lambda t: [t.pop(k) for k in list(t) if k.startswith("text_decoder")])
    assert "no BLIP checkpoint vlprune can use" in refused(tmp_path)


@pytest.mark.parametrize("task", TASKS)
def test_other_tasks_are_refused(task, hugging_face):
    model = vlprune.load(str(hugging_face(task)[0]))
    for other in set(TASKS) - {task}:
        with pytest.raises(RequestError, match=f"cannot do {other}"):
            model.for_task(other)
    with pytest.raises(RequestError, match="cannot do dancing"):
        model.for_task("dancing")


def test_tasks_follow_from_parts():
    pretrained = {"vision_model", "text_encoder", "text_decoder", "vision_proj", "text_proj", "itm_head"}
    assert tasks_of(pretrained) == TASKS
    assert tasks_of(pretrained - {"text_decoder"}) == ("retrieval",)
    assert tasks_of({"vision_model", "text_decoder"}) == ("captioning",)
    assert tasks_of({"vision_model", "text_encoder", "text_decoder"}) == ("vqa",)
    assert tasks_of({"vision_model"}) == tasks_of(set()) == ()


BROKEN = ["", "{", "[]", "3", "null", '{"model_type": "t5"}', '{"model_type": ["blip"]}', "\0", "[" * 100_000]


@pytest.mark.parametrize("content", BROKEN, ids=range(len(BROKEN)))
def test_broken_configs(content, folder):
    (folder / "config.json").write_text(content)
    assert "config.json" in refused(folder)


@pytest.mark.parametrize("value", [0, -1, 3, "x", None, [], True, 10**9, 1e30], ids=str)
@pytest.mark.parametrize(
    "field",
    [
        "text_config.vocab_size",
        "text_config.hidden_size",
        "text_config.num_attention_heads",
        "text_config.num_hidden_layers",
        "text_config.encoder_hidden_size",
        "text_config.bos_token_id",
        "text_config.hidden_act",
        "text_config.enc_token_id",
        "text_config.layer_norm_eps",
        "text_config.hidden_dropout_prob",
        "text_config.max_position_embeddings",
        "vision_config.image_size",
        "vision_config.patch_size",
        "vision_config.num_hidden_layers",
        "vision_config.num_attention_heads",
        "vision_config.intermediate_size",
        "vision_config.hidden_act",
        "image_text_hidden_size",
        "text_config",
        "vision_config",
        "vlprune",
        "torch_dtype",
        "architectures",
    ],
)
def test_wrong_values_in_a_config(field, value, hugging_face, tmp_path):
    """Whatever a config says, the model loads and runs, or one line tells why not; nothing large is allocated."""
    source, _ = hugging_face("retrieval")
    for file in source.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text())
    *outer, name = field.split(".")
    (config[outer[0]] if outer else config)[name] = value
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        model = vlprune.load(str(tmp_path))
    except RequestError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return
    pixels = torch.zeros(1, 3, *[model.processor.image_size] * 2)
    ids, mask = model.processor.texts(["a red circle"], "enc")
    with torch.no_grad():
        states = model.image_states(pixels)
        cross = cross_keys_values(model.text_encoder, states)
        logits = model.itm_logits(torch.from_numpy(ids), torch.from_numpy(mask), cross)
    assert logits.shape == (1, 2) and bool(logits.isfinite().all())


def test_tokenizers_that_are_missing_or_broken(folder):
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    assert "has no tokenizer" in refused(folder)
    for content in ("", "{}", '{"model": 3}', "\0\0"):
        (folder / "tokenizer.json").write_text(content)
        assert "tokenizer" in refused(folder)


def test_a_tokenizer_of_another_model(folder):
    from vlprune.models.processor import word_tokenizer

    word_tokenizer([f"w{i}" for i in range(500)]).save_pretrained(folder)
    assert "tokenizer has" in refused(folder)


def test_wrong_suggestions(checkpoints, tmp_path):
    model = checkpoints.pretraining_model()
    model.options = {"finetune": {"lr": 1e-3}, "retrieval": {"rerank": 8}}
    model.save(tmp_path)
    assert vlprune.load(str(tmp_path)).options == model.options
    for wrong in ([], {"finetune": 3}, {"finetune": {"lr": "high"}}, {"dancing": {}}):
        edit(tmp_path / "config.json", lambda c, wrong=wrong: c["vlprune"].update(options=wrong))
        assert "vlprune.options" in refused(tmp_path)


# --- names ------------------------------------------------------------------------------------------------------------


def test_models_are_listed_without_torch():
    program = (
        "import sys, vlprune, vlprune.models as m; m.describe(), m.families(), m.names()\n"
        "heavy = {'torch', 'transformers', 'optimum', 'onnxruntime', 'pandas', 'accelerate'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_families_tell_what_they_read_offer_and_what_prunes_them():
    families = {entry["name"]: entry for entry in vlprune.models.families()}
    types = [kind for entry in families.values() for kind in entry["model_types"]]
    assert len(types) == len(set(types)) and {"blip", "clip", "siglip", "vit"} <= set(types)
    for info in vlprune.models.describe():
        assert set(info["tasks"]) <= set(families[info["family"]]["tasks"]), info["name"]
    assert "mope" in families["clip"]["methods"] and "mope" not in families["vit"]["methods"]
    assert "multiflow" in families["vit"]["methods"]


def test_the_embedded_model():
    model = vlprune.load("blip-tiny")
    assert model.tasks == TASKS and model.tied and not model.source.random_weights
    assert len(model.processor.tokenizer) == model.config.text_config.vocab_size
    size = sum(file.stat().st_size for file in (loading.WEIGHTS / "blip-tiny").iterdir())
    assert size <= 12e6


def test_unknown_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "blip-tiny" in refused("blp-tiny")
    assert refused("nonsense")
    for path in ("missing.pth", "./missing", "/no/such/folder", "~/nothing", "a.safetensors"):
        assert "check the path" in refused(path)
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused("empty")


@pytest.mark.parametrize(
    "name", ["blip", "blip-14m", "blip-vqa", "blip-itm", "blip-captioning", "clip", "siglip", "x/y-z"]
)
def test_without_network_the_way_out_is_told(name, tmp_path, monkeypatch):
    monkeypatch.setenv("VLPRUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refused(name, MachineError)
    assert "download" in message and MachineError.exit_code == 3
    assert not list(tmp_path.iterdir())


# --- downloads --------------------------------------------------------------------------------------------------------


class Answer(BaseHTTPRequestHandler):
    def __init__(self, body: bytes, told: int, status: int, *args: object) -> None:
        self.body, self.told, self.status = body, told, status
        super().__init__(*args)

    def do_GET(self) -> None:  # noqa: N802 - the name http.server calls
        self.send_response(self.status)
        self.send_header("Content-Length", str(self.told))
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Serve one answer at a local address; gives the function that downloads it."""
    monkeypatch.setenv("VLPRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    servers = []

    def download(body: bytes, told: int | None = None, status: int = 200) -> Path:
        server = HTTPServer(("127.0.0.1", 0), partial(Answer, body, len(body) if told is None else told, status))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return loading._download(f"http://127.0.0.1:{server.server_port}/files/model.pth")

    yield download
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_download_is_kept(served, tmp_path):
    path = served(b"weights")
    assert path == tmp_path / "cache" / "model.pth" and path.read_bytes() == b"weights"
    assert served(b"other").read_bytes() == b"weights"  # from the cache
    assert [p.name for p in path.parent.iterdir()] == ["model.pth"]


@pytest.mark.parametrize(("told", "status"), [(100, 200), (7, 404), (7, 500)])
def test_a_failed_download_leaves_nothing(told, status, served, tmp_path):
    with pytest.raises(MachineError, match="pass the file with --family blip") as caught:
        served(b"weights", told, status)
    assert "\n" not in str(caught.value)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
