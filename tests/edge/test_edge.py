"""vlprune-edge, installed from its wheel into an empty virtual environment, answers as PyTorch does."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from vlprune import exporters
from vlprune.bundle.make import make_bundle
from vlprune.data import open_data
from vlprune.data.images import load_image
from vlprune.runtime import predict


INPUTS = 100
LATER = 20  # of the tasks that are not BLIP's


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("scenes")
    data = open_data("captioning", "scenes", "test", limit=INPUTS)
    for i, image in enumerate(data.images):
        image.resize((64 + i % 7, 64)).save(folder / f"{i:03}.{'jpg' if i % 3 == 0 else 'png'}")
    return sorted(map(str, folder.iterdir()))


@pytest.fixture(scope="module")
def pairs(photos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    records = []
    for i in range(6):
        (folder / f"{i}.png").write_bytes((photos / f"{i}.png").read_bytes())
        images = [f"{i}.png", f"{(i + 1) % 6}.png"]
        records.append({"images": images, "sentence": f"what color {'is it ' * (i % 3)}", "label": "True"})
    for split in ("train", "dev"):
        (folder / f"nlvr_{split}.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def cases(bundle_run, scenes, pairs, small_models, duals, vits, animals, tmp_path_factory):
    """Name -> run, inputs, bundle."""
    captions = [texts[0] for texts in open_data("retrieval", "scenes", "test", limit=INPUTS).captions]
    questions = [question.question for question in open_data("vqa", "scenes", "test", limit=INPUTS).questions]
    made = {
        "retrieval": (bundle_run("blip-tiny", "retrieval", pack="fp32", ratio=0.6), captions),
        "captioning": (bundle_run("blip-tiny", "captioning", pack="fp32", ratio=0.6), captions),
        "vqa": (bundle_run("blip-tiny", "vqa", ratio=0.6), questions),
        "zero-shot": (bundle_run("clip-tiny", "zero-shot", pack="fp32", ratio=0.6), captions),
        "siglip": (bundle_run(str(duals("siglip").folder), "retrieval"), captions[:LATER]),
        "classification": (bundle_run(str(vits("deit").folder), "classification", data=str(animals)), captions[:LATER]),
        "nlvr": (
            bundle_run(str(small_models["pretraining"]), "nlvr", family="blip_nlvr", data=str(pairs)),
            captions[:LATER],
        ),
    }
    folder = tmp_path_factory.mktemp("bundles")
    found = {}
    for name, (run, texts) in made.items():
        make_bundle(run.folder, run.task, folder / f"{name}.vlp.tar.zst")
        bundle = str(folder / f"{name}.vlp.tar.zst")
        found[name] = {"run": run, "task": run.task, "bundle": bundle, "images": scenes[: len(texts)], "texts": texts}
    return found


@pytest.fixture(scope="module")
def answers(edge, cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    job = {name: {key: case[key] for key in case if key != "run"} for name, case in cases.items()}
    (folder / "job.json").write_text(json.dumps(job))
    script = Path(__file__).parent / "edge_answers.py"
    command = [edge / "python", "-I", script, folder / "job.json", folder / "answers.json"]
    subprocess.run(list(map(str, command)), check=True, cwd=folder)
    return json.loads((folder / "answers.json").read_text())


def reference(case):
    """The same in PyTorch, with the training side's processor."""
    run, spec = case["run"], case["run"].spec
    processor, graphs = run.model.processor, exporters.torch_graphs(run.model, run.task)
    pixels = processor.images([load_image(path) for path in case["images"]])
    if run.task == "captioning":
        return {"captions": predict.captions(graphs, spec, processor, pixels)}
    if run.task == "classification":
        return {"scores": torch.from_numpy(graphs["image_classifier"]({"pixel_values": pixels})["logits"]).softmax(1)}
    first = "enc" if run.task == "nlvr" else "cls"
    ids, mask = processor.texts(case["texts"], first, spec["max_length"])
    feeds = {"input_ids": ids, "attention_mask": mask}
    encoded = graphs["image_encoder"]({"pixel_values": pixels})
    if run.task == "vqa":
        return {"answers": predict.answers(graphs, spec, processor, encoded["image_states"], case["texts"])}
    if run.task == "nlvr":
        right = np.roll(encoded["image_states"], -1, axis=0)
        both = {"image_states.0": encoded["image_states"], "image_states.1": right}
        return {"answers": (graphs["pair_classifier"]({**feeds, **both})["logits"].argmax(1) == 1).tolist()}
    if run.task == "zero-shot":
        embeds = predict.class_embeds(graphs, spec, processor)
        return {"scores": encoded["image_embeds"] @ embeds.T}
    found = {"image_embeds": encoded["image_embeds"], "text_embeds": graphs["text_encoder"](feeds)["text_embeds"]}
    found["similarity"] = (found["image_embeds"] * found["text_embeds"]).sum(1)
    if "itm" in graphs:
        ids = ids.copy()
        ids[:, 0] = spec["enc_token_id"]
        logits = graphs["itm"]({**feeds, "input_ids": ids, "image_states": encoded["image_states"]})["itm_logits"]
        found["probability"] = torch.from_numpy(logits).softmax(1)[:, 1]
    return found


@pytest.mark.parametrize("name", ["retrieval", "captioning", "vqa", "zero-shot", "siglip", "classification", "nlvr"])
def test_the_answers_are_those_of_pytorch(name, cases, answers):
    case, found = cases[name], answers["answers"][name]
    expected = reference(case)
    count = len(case["texts"])
    assert count == (LATER if name in ("siglip", "classification", "nlvr") else INPUTS)
    for key in expected.keys() & {"captions", "answers"}:
        assert found[key] == expected[key] and len(found[key]) == count
    if name in ("captioning", "vqa"):
        assert len(set(found.get("captions") or found["answers"])) > 3  # not one answer to everything
    if name in ("captioning", "vqa", "nlvr"):
        return
    if "scores" in expected:
        scores = np.asarray(expected["scores"])
        names = case["run"].spec["classes" if name == "zero-shot" else "labels"]
        assert [row[0] for row in found["classes"]] == [names[i] for i in scores.argmax(1)]
        np.testing.assert_allclose(found["scores"], -np.sort(-scores, axis=1)[:, :3], atol=1e-5)
        return
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], np.asarray(value), atol=1e-4)
        assert len(found[key]) == count
    if "probability" not in expected:
        assert found["probability"] == [None] * count


def test_nothing_heavy_is_there(answers, edge):
    assert not {"torch", "transformers", "onnx", "optimum", "vlprune", "safetensors", "rich"} & set(answers["loaded"])
    code = (
        "import importlib.util as u; print([n for n in ('torch', 'transformers', 'onnx', 'vlprune') if u.find_spec(n)])"
    )
    there = subprocess.run([edge / "python", "-I", "-c", code], check=True, capture_output=True, text=True).stdout
    assert there.strip() == "[]"


def run_edge(edge, *arguments, **options):
    return subprocess.run(
        [edge / "vlprune-edge", *map(str, arguments)], capture_output=True, text=True, cwd="/", **options
    )


def test_the_command(edge, cases, scenes, answers, tmp_path):
    captions = answers["answers"]["captioning"]["captions"]
    bundle = cases["captioning"]["bundle"]
    one = run_edge(edge, "caption", scenes[0], "--bundle", bundle)
    assert (one.stdout, one.stderr, one.returncode) == (f"{captions[0]}\n", "", 0)
    output = tmp_path / "out.jsonl"
    many = run_edge(edge, "caption", Path(scenes[0]).parent, "--bundle", bundle, "--output", output)
    assert (many.stdout, many.stderr, many.returncode) == ("", "", 0)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["image"] for row in rows] == scenes and [row["caption"] for row in rows] == captions
    checked = run_edge(edge, "verify", bundle, "--json")
    assert json.loads(checked.stdout)["graphs"] == ["image_encoder", "text_decoder"]
    told = run_edge(edge, "info", bundle, "--json")
    assert json.loads(told.stdout)["task"] == "captioning"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["caption", "PHOTO", "--bundle", "VQA"], 2, "a bundle for vqa cannot caption: that takes one for captioning"),
        (["answer", "PHOTO", "--bundle", "CAPTIONS", "--question", "what?"], 2, "cannot answer questions"),
        (["caption", "nothing.jpg", "--bundle", "CAPTIONS"], 2, "there is no file or folder nothing.jpg"),
        (["caption", "CAPTIONS", "--bundle", "CAPTIONS"], 2, "broken image"),
        (["caption", "PHOTO", "--bundle", "PHOTO"], 2, "is no intact bundle"),
        (["caption", "PHOTO", "--bundle", "CAPTIONS", "--public-key", "PHOTO"], 2, "is not signed"),
        (["classify", "PHOTO", "--bundle", "CLASSES", "--classes", "a,b"], 2, "knows its own classes only"),
        (["caption", "PHOTO", "--bundle", "CAPTIONS", "--output", "/tmp"], 2, "/tmp is a folder: name a file"),
        (["caption", "PHOTO", "--bundle", "CAPTIONS", "--output", "/proc/x"], 2, "choose another --output"),
        (["caption", "PHOTO", "--bundle", "/"], 2, "there is no file /"),
    ],
)
def test_refusals_are_one_line(edge, cases, scenes, arguments, code, message):
    names = {"PHOTO": scenes[0], "VQA": cases["vqa"]["bundle"], "CAPTIONS": cases["captioning"]["bundle"]}
    names["CLASSES"] = cases["classification"]["bundle"]
    done = run_edge(edge, *[names.get(word, word) for word in arguments])
    assert done.returncode == code and message in done.stderr and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_full_disk_is_one_line(edge, cases, scenes):
    command = [edge / "vlprune-edge", "caption", scenes[0], "--bundle", cases["captioning"]["bundle"]]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 3
    assert done.stderr == "error: no space left on the disk: free some, or choose another --output\n"


def test_without_the_operators_packed_bundles_are_refused(edge, cases, scenes):
    (library,) = edge.parent.rglob("libvlprune_ops*")
    hidden = library.with_suffix(".hidden")
    library.rename(hidden)
    try:
        done = run_edge(edge, "caption", scenes[0], "--bundle", cases["captioning"]["bundle"])
        plain = run_edge(edge, "answer", scenes[0], "--bundle", cases["vqa"]["bundle"], "--question", "what color?")
    finally:
        hidden.rename(library)
    assert done.returncode == 3 and done.stderr.count("\n") == 1
    assert "the operators for packed graphs were not built" in done.stderr and "vlprune-edge" in done.stderr
    assert plain.returncode == 0
