"""CLIP and SigLIP: the same as transformers; padding, pieces, losses; what is prunable; files nobody should trust."""

import copy
import json
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import vlprune
from vlprune.errors import RequestError
from vlprune.models.clip import Clip
from vlprune.models.family import fingerprint
from vlprune.models.siglip import Siglip


KINDS = ("clip", "legacy", "siglip")
TEXTS = ["a small red circle", "the large green square on the left of a red cross", "circle"]


def load(duals, kind, **options):
    return vlprune.load(str(duals(kind).folder), **options)


def inputs(model, texts=TEXTS, seed=3) -> dict[str, torch.Tensor]:
    """Real texts, padded as the family pads them, and random pixels."""
    ids, mask = model.processor.texts(texts)
    pixels = torch.randn(len(texts), 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return {"pixel_values": pixels, "input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


@torch.no_grad()
def embeds(model, given) -> tuple[torch.Tensor, torch.Tensor]:
    return model.image_embeds(given["pixel_values"]), model.text_embeds(given["input_ids"], given["attention_mask"])


def refused(folder, **options) -> str:
    with pytest.raises(RequestError) as caught:
        vlprune.load(str(folder), **options)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


@pytest.fixture
def folder(duals, tmp_path):
    """Copies a checkpoint that a test may spoil."""
    return lambda kind: shutil.copytree(duals(kind).folder, tmp_path / kind)


def edit(path, change) -> None:
    """Change a JSON file, or the tensors of a safetensors file, in place."""
    if path.suffix == ".json":
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})


# --- the same as transformers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:1]], ids=["padded", "unpadded"])
def test_logits_are_those_of_transformers(kind, texts, duals):
    model = load(duals, kind)
    assert isinstance(model, Siglip if kind == "siglip" else Clip)
    assert model.tasks == ("retrieval", "zero-shot") and not model.training
    given = inputs(model, texts)
    zeros = int((given["attention_mask"] == 0).sum())
    assert (zeros > 0) == (len(texts) > 1 and kind != "siglip")
    with torch.no_grad():
        theirs = duals(kind).model(**given)
        image, text = embeds(model, given)
        logits = image @ text.T * model.logit_scale.exp()
        if kind == "siglip":
            logits = logits + model.logit_bias
    torch.testing.assert_close(image, theirs.image_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(text, theirs.text_embeds, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, theirs.logits_per_image, atol=2e-5, rtol=0)
    if len(texts) > 1:  # or the comparison says little
        assert theirs.logits_per_image.std() > 0.05 and not torch.allclose(image[0], image[1], atol=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_transformers(kind, duals):
    model = load(duals, kind)
    options = {"padding": "max_length", "max_length": 16} if kind == "siglip" else {"padding": True}
    long = "a large red square above the large red square above the large red square above the large square"
    theirs = duals(kind).tokenizer([*TEXTS, long], truncation=True, return_tensors="np", **options)
    ids, mask = model.processor.texts([*TEXTS, long])
    assert ids.shape == (4, 16) and ids.dtype == mask.dtype == np.int64
    np.testing.assert_array_equal(ids, theirs["input_ids"])
    assert (ids[:, -1] == model.processor.special_ids()["eos_token_id"]).all()
    if kind == "siglip":
        assert mask.all()  # it was trained to read padding
    else:
        np.testing.assert_array_equal(mask, theirs["attention_mask"])
    short, _ = model.processor.texts([long], max_length=6)
    assert short.shape == (1, 16 if kind == "siglip" else 6)
    assert short[0, 5] == model.processor.special_ids()["eos_token_id"]


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_transformers_to_the_last_bit(kind, duals):
    from PIL import Image

    rng = np.random.default_rng(0)
    shapes = [(97, 61), (5, 9), (32, 32), (640, 481), (33, 500), (31, 64)]
    images = [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for width, height in shapes]
    found = load(duals, kind).processor.images(images)
    expected = np.stack(duals(kind).processor(images)["pixel_values"])
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [16, 48])
def test_other_image_sizes_are_interpolated(kind, size, duals):
    model = load(duals, kind, image_size=size)
    assert model.processor.image_size == model.config.vision_config.image_size == size
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = duals(kind).model.get_image_features(pixels, interpolate_pos_encoding=True)
        ours = model.image_embeds(pixels)
    torch.testing.assert_close(ours, F.normalize(theirs, dim=-1), atol=1e-5, rtol=0)
    assert "patch size 8" in refused(duals(kind).folder, image_size=20)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_models_are_read_by_transformers_and_by_us(kind, duals, tmp_path):
    model = load(duals, kind)
    model.options = {"finetune": {"lr": 1e-4}}
    model.save(tmp_path)
    again, given = vlprune.load(str(tmp_path)), inputs(model)
    assert again.options == model.options and fingerprint(again.layers()) == fingerprint(model.layers())
    assert again.state_dict().keys() == duals(kind).model.state_dict().keys()
    assert all(map(torch.equal, embeds(again, given), embeds(model, given)))
    assert again.processor.pixels == model.processor.pixels
    assert all(map(np.array_equal, again.processor.texts(TEXTS), model.processor.texts(TEXTS)))
    by_transformers = type(duals(kind).model).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        theirs = by_transformers(**given)
    torch.testing.assert_close(theirs.text_embeds, embeds(model, given)[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(theirs.image_embeds, embeds(model, given)[0], atol=1e-5, rtol=0)


def test_weights_of_half_precision_become_float32(duals, tmp_path):
    model = load(duals, "clip")
    model.save(tmp_path, torch.float16)
    again = vlprune.load(str(tmp_path))
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in again.parameters())


def test_old_checkpoints_with_position_ids(folder, duals):
    path = folder("legacy")
    ids = {f"{t}_model.embeddings.position_ids": torch.arange(9)[None] for t in ("vision", "text")}
    edit(path / "model.safetensors", lambda tensors: tensors.update(ids))
    assert fingerprint(vlprune.load(str(path)).layers()) == fingerprint(load(duals, "legacy").layers())


# --- padding and pieces -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "legacy"])
def test_padding_changes_nothing(kind, duals):
    model = load(duals, kind)
    given = inputs(model, TEXTS[:1])
    extra = torch.full((1, 5), model.processor.pad_id)
    padded = {
        **given,
        "input_ids": torch.cat([given["input_ids"], extra], 1),
        "attention_mask": torch.cat([given["attention_mask"], torch.zeros_like(extra)], 1),
    }
    torch.testing.assert_close(embeds(model, padded)[1], embeds(model, given)[1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_masked_tokens_are_not_read(kind, duals):
    model = load(duals, kind)
    given = inputs(model)
    given["attention_mask"][:, 1] = 0
    first = embeds(model, given)[1]
    given["input_ids"][:, 1] = 5
    torch.testing.assert_close(embeds(model, given)[1], first, atol=1e-6, rtol=0)
    given["attention_mask"][:, 1] = 1
    assert (embeds(model, given)[1] - first).abs().max() > 1e-3


def test_text_of_clip_reads_only_what_stands_before(duals):
    """Causal: states of the first tokens do not depend on later ones."""
    model = load(duals, "clip")
    given = inputs(model, [TEXTS[1]])
    steps = model.text_tower()

    def states(ids):
        state = steps.start({**given, "input_ids": ids})
        for layer in steps.layers:
            state = layer(state)
        return state["x"]

    changed = given["input_ids"].clone()
    changed[:, 5] = 7
    with torch.no_grad():
        a, b = states(given["input_ids"]), states(changed)
    assert torch.equal(a[:, :5], b[:, :5]) and not torch.allclose(a[:, 6:], b[:, 6:], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_towers_in_pieces_give_the_embeddings(kind, duals):
    model = load(duals, kind)
    given = inputs(model)
    for steps, expected in zip((model.image_tower(), model.text_tower()), embeds(model, given), strict=True):
        states = [steps.start(given)]
        for layer in steps.layers:
            states.append(layer(states[-1]))
        assert len(steps.layers) == 2
        assert torch.equal(steps.finish(states[-1]), expected)
        assert torch.equal(steps.finish(steps.layers[1](states[1])), expected)  # a state can be gone on from again
        assert not torch.equal(steps.finish(states[1]), expected)
        torch.testing.assert_close(expected.norm(dim=-1), torch.ones(3))


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_loss_is_that_of_transformers(kind, duals):
    model = load(duals, kind)
    batch = {**inputs(model), "image_index": torch.tensor([4, 9, 2])}
    with torch.no_grad():
        given = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")}
        expected = duals(kind).model(**given, return_loss=True).loss
    torch.testing.assert_close(model.loss("retrieval", batch), expected, atol=1e-5, rtol=1e-5)
    assert model.pretraining_loss(batch).keys() == {"itc"}


def test_another_caption_of_the_same_image_is_no_negative(duals):
    """Of two captions of one image, and one of another, by hand."""
    image = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), dim=-1)
    text = F.normalize(torch.tensor([[1.0, 0.2], [0.8, 0.1], [0.1, 1.0]]), dim=-1)
    owner = torch.tensor([5, 5, 7])
    same = owner[:, None] == owner[None, :]
    clip, siglip = load(duals, "clip"), load(duals, "siglip")
    logits = clip.logit_scale.exp() * image @ text.T
    rows = -logits.log_softmax(1)
    columns = -logits.log_softmax(0)
    by_hand = [(rows[i, :2].mean() if i < 2 else rows[2, 2]) for i in range(3)]
    by_hand += [(columns[:2, j].mean() if j < 2 else columns[2, 2]) for j in range(3)]
    torch.testing.assert_close(clip.contrastive_loss(image, text, same), torch.stack(by_hand).mean())
    pairs = siglip.logit_scale.exp() * image @ text.T + siglip.logit_bias
    by_hand = [-F.logsigmoid(pairs[i, j] if same[i, j] else -pairs[i, j]) for i in range(3) for j in range(3)]
    torch.testing.assert_close(siglip.contrastive_loss(image, text, same), torch.stack(by_hand).sum() / 3)


def test_the_temperature_of_clip_stays_where_the_authors_clip_it(duals):
    model = load(duals, "clip")
    model.logit_scale.data.fill_(9.0)
    model.loss("retrieval", {**inputs(model), "image_index": torch.arange(3)})
    assert float(model.logit_scale.detach().exp()) == pytest.approx(100, rel=1e-6)


# --- what is pruned ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_layers_are_every_linear_of_the_towers_once(kind, duals):
    model = load(duals, kind)
    layers = model.layers()
    names = [layer.name for layer in layers]
    assert len(names) == len(set(names)) == 2 * 2 * 6
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    heads = {"visual_projection", "text_projection"}
    if kind == "siglip":
        pooling = ("attention.out_proj", "mlp.fc1", "mlp.fc2")
        heads = {"text_model.head", *(f"vision_model.head.{part}" for part in pooling)}
    assert linears - set(names) == heads
    for layer in layers:
        assert layer.modules == (model.get_submodule(layer.name),)
        assert layer.names == (layer.name,)
        assert layer.modality == layer.tokens == layer.name.split("_")[0]
    assert [layer.modality for layer in layers] == ["vision"] * 12 + ["text"] * 12


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_groups_and_towers(kind, duals):
    model = load(duals, kind)
    groups = model.groups()
    assert len(groups) == 8 and [g.modality for g in groups] == ["vision"] * 4 + ["text"] * 4
    for group in groups:
        assert group.names == (group.name,) and group.modules == (model.get_submodule(group.name),)
        assert f"layers.{group.layer}." in group.name and group.tower == group.modality
        units = int(np.prod(group.shape))
        assert all(linear.out_features == units and offset == 0 for linear, offset in group.inner)
        assert all(linear.in_features == units for linear in group.outer)
        if group.kind == "attention":
            assert group.shape == (4, 12 if group.modality == "vision" else 8)
            paths = [model.get_submodule(f"{group.name}.{p}_proj") for p in ("q", "k", "v", "out")]
            assert [linear for linear, _ in group.inner] + list(group.outer) == paths
    used = {id(linear) for g in groups for linear in (*g.outer, *(linear for linear, _ in g.inner))}
    assert used == {id(layer.modules[0]) for layer in model.layers()}
    assert [(t.name, t.modality, t.stacks, t.depth) for t in model.towers()] == [
        ("vision", "vision", ("vision_model.encoder.layers",), 2),
        ("text", "text", ("text_model.encoder.layers",), 2),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_cut_models_equal_masked_ones_and_reload(kind, duals, tmp_path):
    from vlprune.structured import Plan, cut, zero

    model = load(duals, kind)
    units = {}
    for number, group in enumerate(model.groups()):
        if group.kind == "attention":  # one head, or half of the dimensions of three
            kept = torch.zeros(group.shape, dtype=torch.bool)
            kept[number % 4] = True
            if number % 4:
                kept = (torch.arange(group.shape[1]) % 2 == 0).expand(group.shape).clone()
                kept[number % 3] = False
        else:
            kept = torch.arange(group.shape[0]) % (3 + number) == 1
        units[group.name] = kept
    plan = Plan(units, {"text": torch.tensor([False, True])})
    masked, given = copy.deepcopy(model), inputs(model)
    zero(masked, plan)
    cut(model, plan)
    before = embeds(load(duals, kind), given)
    for ours, theirs, whole in zip(embeds(model, given), embeds(masked, given), before, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
        assert not torch.allclose(ours, whole, atol=0.05)
    assert sum(p.numel() for p in model.parameters()) < 0.9 * sum(p.numel() for p in masked.parameters())
    model.save(tmp_path)
    again = vlprune.load(str(tmp_path))
    assert all(map(torch.equal, embeds(again, given), embeds(model, given)))
    assert [g.shape for g in again.groups()] == [g.shape for g in model.groups()]
    assert again.towers()[1].depth == 1
    batch = {**given, "image_index": torch.arange(3)}
    again.loss("retrieval", batch).backward()  # and it trains
    assert all(p.grad is not None for p in again.parameters())


EXTREMES = {
    "one head": lambda shape: torch.arange(shape[0])[:, None].expand(shape) == 2 if len(shape) == 2 else None,
    "one dimension of each head": lambda shape: torch.arange(shape[1]).expand(shape) == 5 if len(shape) == 2 else None,
    "one neuron": lambda shape: torch.arange(*shape) == 7 if len(shape) == 1 else None,
    "one of everything": lambda shape: torch.arange(int(np.prod(shape))).view(shape) == 3,
    "one layer": lambda shape: None,
}


@pytest.mark.parametrize("left", EXTREMES)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_extreme_cuts_equal_masked_models(kind, left, duals, tmp_path):
    from vlprune.structured import Plan, cut, zero

    model = load(duals, kind)
    units = {group.name: kept for group in model.groups() if (kept := EXTREMES[left](group.shape)) is not None}
    layers = {"vision": torch.tensor([True, False]), "text": torch.tensor([False, True])} if "layer" in left else {}
    plan = Plan({name: kept.clone() for name, kept in units.items()}, layers)
    masked, given = copy.deepcopy(model), inputs(model)
    zero(masked, plan)
    cut(model, plan)
    for ours, theirs in zip(embeds(model, given), embeds(masked, given), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    model.save(tmp_path)
    assert all(map(torch.equal, embeds(vlprune.load(str(tmp_path)), given), embeds(model, given)))
    assert all(len(steps().layers) == (1 if layers else 2) for steps in (model.image_tower, model.text_tower))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_calibration_runs_every_layer_and_masks_padding(kind, duals):
    model = load(duals, kind)
    rows: dict[str, int] = {}
    now: dict[str, torch.Tensor | None] = {}

    @contextmanager
    def valid(**masks):
        now.update({"text": None, "vision": None, **masks})
        yield

    for layer in model.layers():

        def hook(module, args, name=layer.name, tokens=layer.tokens):
            mask, shape = now[tokens], args[0].shape[:-1]
            assert mask is None or mask.shape == shape
            rows[name] = rows.get(name, 0) + int(shape.numel() if mask is None else mask.sum())

        layer.modules[0].register_forward_pre_hook(hook)
    batch = model.caption_batch(inputs(model)["pixel_values"].numpy(), TEXTS, [0, 1, 2])
    assert batch["image_index"].tolist() == [0, 1, 2]
    with torch.no_grad():
        model.calibrate(batch, valid)
    words = int(batch["attention_mask"].sum())
    assert words == (48 if kind == "siglip" else 6 + 13 + 3)
    patches = 3 * (16 if kind == "siglip" else 17)
    assert rows == {n.name: words if n.modality == "text" else patches for n in model.layers()}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_heads_are_what_stands_outside_the_towers(kind, duals):
    model = load(duals, kind)
    heads = {id(p) for p in model.head_parameters("retrieval")}
    rest = {name for name, p in model.named_parameters() if id(p) not in heads}
    assert all(".encoder.layers." in n or ".embeddings." in n or "norm" in n for n in rest)
    assert id(model.logit_scale) in heads and len(heads) == (3 if kind == "clip" else 15)


def test_task_copies_are_independent(duals):
    model = load(duals, "clip")
    part = model.for_task("zero-shot")
    assert part.tasks == ("zero-shot",) and model.tasks == ("retrieval", "zero-shot")
    part.logit_scale.data.fill_(0)
    assert float(model.logit_scale.detach()) == 1.5
    with pytest.raises(RequestError, match="cannot do vqa: it offers retrieval, zero-shot"):
        model.for_task("vqa")
    with pytest.raises(RequestError, match="cannot do retrieval: it offers zero-shot"):
        part.for_task("retrieval")


# --- files that cannot be trusted -------------------------------------------------------------------------------------


def test_unknown_types_name_the_known(folder):
    path = folder("clip")
    edit(path / "config.json", lambda config: config.update(model_type="flava"))
    message = refused(path)
    assert "'flava'" in message and all(kind in message for kind in ("'blip'", "'clip'", "'siglip'", "'vit'"))


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("value", [0, -3, 2**40, 1.5, "12", None, True, []])
def test_sizes_that_are_none(kind, value, folder):
    path = folder(kind)
    original = (path / "config.json").read_text()
    fields = [("vision_config", n) for n in (*SIZES, "image_size", "patch_size")]
    fields += [("text_config", n) for n in (*SIZES, "vocab_size", "max_position_embeddings")]
    for part, name in fields:
        (path / "config.json").write_text(original)
        edit(path / "config.json", lambda config, part=part, name=name: config[part].update({name: value}))
        refused(path)


@pytest.mark.parametrize(
    ("part", "name", "value", "told"),
    [
        ("vision_config", "num_attention_heads", 5, "not a multiple of its 5 heads"),
        ("vision_config", "num_hidden_layers", 3, "holds 2 layers"),
        ("vision_config", "num_channels", 4, "num_channels = 4"),
        ("vision_config", "hidden_act", "no_such", "config"),
        ("vision_config", "hidden_act", 3, "hidden_act = 3"),
        ("vision_config", "layer_norm_eps", "1e-5", "layer_norm_eps"),
        ("vision_config", "image_size", 64, "says the model sees 64"),
        ("text_config", "vocab_size", 7, "the tokenizer has"),
        ("text_config", "hidden_size", 64, "its config says"),
    ],
)
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_configs_that_do_not_fit(kind, part, name, value, told, folder):
    path = folder(kind)
    edit(path / "config.json", lambda config: config[part].update({name: value}))
    assert told in refused(path)


def test_an_end_token_that_no_text_has_is_refused(folder):
    path = folder("clip")
    for value in (11, "x", None, 2.0, True):
        edit(path / "config.json", lambda config, value=value: config["text_config"].update(eos_token_id=value))
        assert "the tokenizer ends them with" in refused(path)


def test_siglip_without_a_head_embeds_no_images(folder):
    path = folder("siglip")
    edit(path / "config.json", lambda config: config["vision_config"].update(vision_use_head=False))
    assert "no pooling head" in refused(path)


def test_joint_spaces_of_two_widths_are_refused(folder):
    path = folder("siglip")
    edit(path / "config.json", lambda config: config["text_config"].update(projection_size=40))
    assert "vectors of 40 numbers, images of 48" in refused(path)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_tensors_that_are_missing_unknown_misshapen_or_not_finite(kind, folder):
    path = folder(kind)
    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    name = "text_model.encoder.layers.1.self_attn.k_proj.weight"
    for change, told in (
        (lambda t: t.pop(name), f"lacks {name}"),
        (lambda t: t.update({"text_model.surprise": torch.zeros(2)}), "holds unknown text_model.surprise"),
        (lambda t: t.update({name: torch.zeros(32, 31)}), f"{name} has shape [32, 31]"),
        (lambda t: t[name].__setitem__((3, 4), float("nan")), f"{name} holds NaN or infinity"),
        (lambda t: t.update({"logit_scale": torch.zeros(2)}), "logit_scale has shape [2]"),
    ):
        weights.write_bytes(whole)
        edit(weights, change)
        assert told in refused(path)
    weights.write_bytes(whole[: len(whole) // 2])
    assert "no intact safetensors file" in refused(path)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_sizes_of_a_cut_model_are_not_believed(kind, folder):
    path = folder(kind)
    name = "vision_model.encoder.layers.0.mlp"
    for sizes in ({name: [73]}, {name: [0]}, {name: [4, 4]}, {"nowhere": [3]}, {name: "12"}, [3], {name: [10**12]}):
        edit(path / "config.json", lambda config, sizes=sizes: config.update(vlprune={"sizes": sizes}))
        assert "vlprune.sizes" in refused(path)
    edit(path / "config.json", lambda config: config.update(vlprune={"sizes": {name: [12]}}))
    assert "its config says [12, 48]" in refused(path)


def test_tokenizers_that_are_missing_or_broken(folder):
    clip, siglip = folder("clip"), folder("siglip")
    (clip / "tokenizer.json").write_text("{")
    assert "cannot be read" in refused(clip)
    (clip / "tokenizer.json").unlink()
    vlprune.load(str(clip))  # of vocab.json and merges.txt
    (clip / "merges.txt").unlink()
    assert "has no tokenizer" in refused(clip)
    (siglip / "tokenizer.json").unlink()
    assert "has no tokenizer.json: take it" in refused(siglip)
    (siglip / "spiece.model").write_bytes(b"x")
    assert "spiece.model alone is not read" in refused(siglip)


def test_tokenizers_without_padding(folder):
    path = folder("siglip")
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        edit(path / file, lambda config: config.pop("pad_token"))
    assert "has no pad_token" in refused(path)


def test_code_beside_a_checkpoint_does_not_run(folder, tmp_path):
    path, trap = folder("clip"), tmp_path / "ran"
    code = f"open({str(trap)!r}, 'w')\nclass X: pass\n"
    for name in ("modeling_clip.py", "tokenization_clip.py", "configuration_clip.py"):
        (path / name).write_text(code)
    remote = {
        "AutoConfig": "configuration_clip.X",
        "AutoModel": "modeling_clip.X",
        "AutoTokenizer": "tokenization_clip.X",
    }
    edit(path / "config.json", lambda config: config.update(auto_map=remote))
    edit(path / "tokenizer_config.json", lambda config: config.update(auto_map=remote))
    vlprune.load(str(path))
    assert not trap.exists()
