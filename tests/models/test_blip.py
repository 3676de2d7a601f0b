"""BLIP's own forward pass against transformers', sharing, padding, losses and the list of prunable layers."""

import pytest
import torch
from torch import nn

import vlprune
from vlprune.errors import RequestError
from vlprune.models.blip import cross_keys_values, run_text
from vlprune.models.family import apply_masks, masks_for


TASKS = ("retrieval", "captioning", "vqa")


def inputs(length: int = 7, batch: int = 3, size: int = 32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(6, 50, (batch, length), generator=generator)
    ids[:, 0] = 2
    return {
        "pixel_values": torch.randn(batch, 3, size, size, generator=generator),
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
    }


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 0.05  # or the comparison says nothing
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def outputs(model: vlprune.models.blip.Blip, task: str, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """All that a task computes; `their_outputs` is the same by transformers."""
    ids, mask, states = given["input_ids"], given["attention_mask"], model.image_states(given["pixel_values"])
    if task == "retrieval":
        match = model.itm_logits(ids, mask, cross_keys_values(model.text_encoder, states))
        return [match, model.image_embeds(states) @ model.text_embeds(ids, mask).T]
    if task == "captioning":
        return [model._decoder_logits(ids, mask, states, None)]
    question, _ = run_text(model.text_encoder, ids, mask, cross=cross_keys_values(model.text_encoder, states))
    answers = ids[:, :4]
    return [model._decoder_logits(answers, torch.ones_like(answers), question, mask)]


@torch.no_grad()
def their_outputs(model: nn.Module, task: str, given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    if task == "retrieval":
        return [model(**given, use_itm_head=use).itm_score for use in (True, False)]
    if task == "captioning":
        return [model(**given).logits]
    caught = []
    hook = model.text_decoder.register_forward_hook(lambda module, args, output: caught.append(output.logits))
    answers = given["input_ids"][:, :4]
    model(**given, decoder_input_ids=answers, decoder_attention_mask=torch.ones_like(answers))
    hook.remove()
    return caught


# --- transformers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_logits_equal_those_of_transformers(task, hugging_face):
    folder, theirs = hugging_face(task)
    model = vlprune.load(str(folder))
    assert model.tasks == (task,)
    for length, batch in ((7, 3), (12, 1)):
        given = inputs(length, batch)
        for ours, wanted in zip(outputs(model, task, given), their_outputs(theirs, task, given), strict=True):
            close(ours, wanted)


@pytest.mark.parametrize("task", ["retrieval", "captioning"])
def test_towers_of_different_width(task, checkpoints, tmp_path):
    theirs = checkpoints.write_hugging_face(tmp_path, task, vision=48)
    for ours, wanted in zip(
        outputs(vlprune.load(str(tmp_path)), task, inputs()), their_outputs(theirs, task, inputs()), strict=True
    ):
        close(ours, wanted)


@pytest.mark.parametrize("task", TASKS)
def test_transformers_reads_what_is_saved(task, whole, checkpoints, tmp_path):
    model = whole.for_task(task)
    model.save(tmp_path)
    theirs, notes = checkpoints.classes[task].from_pretrained(tmp_path, output_loading_info=True)
    assert not notes["missing_keys"] and not notes["mismatched_keys"]
    assert set(notes["unexpected_keys"]) <= {"temp"}
    for ours, wanted in zip(outputs(model, task, inputs()), their_outputs(theirs.eval(), task, inputs()), strict=True):
        close(ours, wanted)


@pytest.mark.parametrize("size", [16, 48])
def test_positions_are_interpolated_as_in_transformers(size, hugging_face):
    folder, theirs = hugging_face("retrieval")
    model = vlprune.load(str(folder), image_size=size)
    assert model.processor.image_size == model.config.vision_config.image_size == size
    pixels = inputs(size=size)["pixel_values"]
    with torch.no_grad():
        wanted = theirs.vision_model(pixels, interpolate_pos_encoding=True).last_hidden_state
        close(model.image_states(pixels), wanted)


@pytest.mark.parametrize("size", [20, 31, 1])
def test_sizes_that_do_not_fit_the_patches_are_refused(size, hugging_face):
    with pytest.raises(RequestError, match="multiple of the patch size 8"):
        vlprune.load(str(hugging_face("retrieval")[0]), image_size=size)


# --- padding ----------------------------------------------------------------------------------------------------------


def padded(given: dict[str, torch.Tensor], extra: int) -> dict[str, torch.Tensor]:
    """The same texts, followed by rubbish that the mask excludes."""
    rows = len(given["input_ids"])
    return {
        "pixel_values": given["pixel_values"],
        "input_ids": torch.cat([given["input_ids"], torch.full((rows, extra), 9)], 1),
        "attention_mask": torch.cat([given["attention_mask"], torch.zeros(rows, extra, dtype=torch.long)], 1),
    }


@pytest.mark.parametrize("task", ["retrieval", "vqa"])
def test_outputs_do_not_depend_on_padding(task, whole):
    for plain, other in zip(outputs(whole, task, inputs()), outputs(whole, task, padded(inputs(), 6)), strict=True):
        torch.testing.assert_close(plain, other, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_towers_in_pieces_give_the_embeddings(whole):
    given = padded(inputs(), 6)
    expected = [
        whole.image_embeds(whole.image_states(given["pixel_values"])),
        whole.text_embeds(given["input_ids"], given["attention_mask"]),
    ]
    for steps, embeds in zip((whole.image_tower(), whole.text_tower()), expected, strict=True):
        states = [steps.start(given)]
        for layer in steps.layers:
            states.append(layer(states[-1]))
        assert torch.equal(steps.finish(states[-1]), embeds)
        assert torch.equal(steps.embeds(given), embeds)
        assert len(steps.layers) == 2
        resumed = steps.layers[1](states[1])  # a state can be gone on from again
        assert torch.equal(steps.finish(resumed), embeds)
        assert not torch.equal(steps.finish(states[1]), embeds)


def test_cross_attention_reads_only_what_the_mask_allows(whole):
    with torch.no_grad():
        model, given = whole.for_task("vqa"), inputs()
        answers = given["input_ids"][:, :4]
        states = torch.randn(3, 9, 32)
        mask = torch.tensor([[1] * 3 + [0] * 6] * 3)
        some = model._decoder_logits(answers, torch.ones_like(answers), states, mask)
        cut = model._decoder_logits(answers, torch.ones_like(answers), states[:, :3], None)
        everything = model._decoder_logits(answers, torch.ones_like(answers), states, None)
    close(some, cut)
    assert (some - everything).abs().max() > 0.1


def test_the_answer_loss_is_that_of_each_question_alone(whole):
    model = whole.for_task("vqa")
    questions = ["how many objects are there ?", "is there a large red circle left of a small blue square ?"]
    answers = [["two", "three", "two"], ["yes"]]
    pixels = inputs(batch=2)["pixel_values"].numpy()
    with torch.no_grad():
        together = model.loss("vqa", model.vqa_batch(pixels, [0, 1], questions, answers))
        alone = [
            model.loss("vqa", model.vqa_batch(pixels[i : i + 1], [0], [questions[i]], [answers[i]])) for i in (0, 1)
        ]
        weighted = [
            model.loss("vqa", model.vqa_batch(pixels[:1], [0], [questions[0]], [[answer]]))
            for answer in ("two", "three")
        ]
    torch.testing.assert_close(together, sum(alone) / 2, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone[0], 2 / 3 * weighted[0] + 1 / 3 * weighted[1], atol=1e-5, rtol=1e-5)


def test_the_caption_loss_skips_prompt_and_padding(whole):
    model = whole.for_task("captioning")
    captions = ["a red circle", "a small blue square left of a large red star"]
    pixels = inputs(batch=2)["pixel_values"].numpy()
    with torch.no_grad():
        batch = model.caption_batch(pixels, captions, [0, 1])
        tokens = batch["decoder_mask"].sum(1) - batch["prompt_length"]
        assert tokens.tolist() == [4, 11]  # the words and [SEP]
        alone = [
            model.loss("captioning", model.caption_batch(pixels[i : i + 1], captions[i : i + 1], [i])) for i in (0, 1)
        ]
        together = model.loss("captioning", batch)
    torch.testing.assert_close(together, (tokens * torch.stack(alone)).sum() / 15, atol=1e-5, rtol=1e-5)


def test_another_caption_of_the_same_image_is_no_negative(whole):
    model = whole.for_task("retrieval")
    pixels = inputs(batch=1)["pixel_values"].repeat(2, 1, 1, 1).numpy()
    with torch.no_grad():
        itc, itm = model._contrastive_losses(
            batch := model.caption_batch(pixels, ["a red"] * 2, [5, 5]), model.image_states(batch["pixel_values"])
        )
    assert itm == 0  # there is no other image
    torch.testing.assert_close(itc, torch.tensor(2.0).log())  # two equally right pairs


# --- sharing ----------------------------------------------------------------------------------------------------------


def test_sharing_is_found_on_load_saved_as_copies_and_restored(whole, tmp_path):
    assert whole.tied and whole.tasks == TASKS
    for folder, model in ((tmp_path / "all", whole), (tmp_path / "vqa", whole.for_task("vqa"))):
        folder.mkdir()
        model.save(folder)
        loaded = vlprune.load(str(folder))
        assert loaded.tied and loaded.tasks == model.tasks
        encoder, decoder = loaded.text_encoder.encoder.layer[1], loaded.text_decoder.bert.encoder.layer[1]
        assert encoder.output.dense.weight is decoder.output.dense.weight
        assert encoder.crossattention.self.key.bias is decoder.crossattention.self.key.bias
        assert encoder.attention.self.query.weight is not decoder.attention.self.query.weight
        words = loaded.text_decoder.bert.embeddings.word_embeddings.weight
        assert loaded.text_decoder.cls.predictions.decoder.weight is words
        assert words is loaded.text_encoder.embeddings.word_embeddings.weight
        assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)


def test_copies_that_differ_in_one_bit_stay_apart(whole, tmp_path):
    model = whole.for_task("vqa")
    decoder = model.text_decoder.bert.encoder.layer[0].output.dense
    decoder.weight = nn.Parameter(decoder.weight.detach().clone())
    decoder.weight.data[0, 0] += 1e-4
    assert not model.tied
    model.save(tmp_path)
    assert not vlprune.load(str(tmp_path)).tied


def test_question_answering_of_transformers_is_not_shared(hugging_face):
    model = vlprune.load(str(hugging_face("vqa")[0]))
    assert not model.tied
    assert all(len(layer.modules) == 1 for layer in model.layers())
    assert len(model.layers()) == 2 * 4 + 2 * 2 * 10


def test_task_copies_are_independent_and_keep_sharing(whole):
    copy = whole.for_task("vqa")
    assert copy.tied and copy.tasks == ("vqa",)
    assert copy.parts == {"vision_model", "text_encoder", "text_decoder"}
    copy.vision_model.post_layernorm.weight.data.zero_()
    assert whole.vision_model.post_layernorm.weight.any()
    assert whole.parts > copy.parts


# --- prunable layers --------------------------------------------------------------------------------------------------


def test_layers_are_every_linear_of_the_towers_once(whole):
    layers = whole.layers()
    assert len({id(layer.weight) for layer in layers}) == len(layers) == 2 * 4 + 2 * 10 + 2 * 4
    linears = {name: m for name, m in whole.named_modules() if isinstance(m, nn.Linear)}
    covered = {id(m) for layer in layers for m in layer.modules}
    rest = {name for name, m in linears.items() if id(m) not in covered}
    assert rest == {
        "vision_proj",
        "text_proj",
        "itm_head",
        "text_decoder.cls.predictions.transform.dense",
        "text_decoder.cls.predictions.decoder",
    }
    for layer in layers:
        assert linears[layer.name] in layer.modules
        assert layer.modality == ("vision" if layer.name.startswith("vision_model") else "text")
        from_image = layer.modality == "vision" or ".crossattention.self.key" in layer.name
        from_image = from_image or ".crossattention.self.value" in layer.name
        assert layer.tokens == ("vision" if from_image else "text")
        own = "attention.self" in layer.name or ".attention.output" in layer.name
        own = own and "crossattention" not in layer.name
        assert len(layer.modules) == (1 if layer.modality == "vision" or own else 2), layer.name


@pytest.mark.parametrize("task", TASKS)
def test_masks_reach_every_copy_of_a_weight(task, whole):
    masks = {layer.name: torch.rand(layer.weight.shape) < 0.5 for layer in whole.layers()}
    part = whole.for_task(task)
    renamed = masks_for(part.layers(), whole.layers(), masks)
    assert renamed.keys() == {layer.name for layer in part.layers()}
    apply_masks(whole.layers(), masks, {})
    apply_masks(part.layers(), renamed, {})
    wanted = whole.for_task(task).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in part.state_dict().items())
    assert sum(int((tensor == 0).sum()) for tensor in part.state_dict().values()) > 1000


def test_calibration_runs_every_layer_and_masks_padding(whole):
    from contextlib import contextmanager

    rows: dict[str, int] = {}
    now: dict[str, torch.Tensor | None] = {}

    @contextmanager
    def valid(**masks):
        now.update({"text": None, "vision": None, **masks})
        yield

    for layer in whole.layers():
        for module in layer.modules:

            def hook(module, args, name=layer.name, tokens=layer.tokens):
                mask, shape = now[tokens], args[0].shape[:-1]
                assert mask is None or mask.shape == shape
                rows[name] = rows.get(name, 0) + int(shape.numel() if mask is None else mask.sum())

            module.register_forward_pre_hook(hook)
    batch = whole.caption_batch(
        inputs(batch=2)["pixel_values"].numpy(), ["a red circle", "a large blue star above"], [0, 1]
    )
    words, patches = int(batch["attention_mask"].sum()), 2 * 17
    with torch.no_grad():
        whole.calibrate(batch, valid)
    assert rows.keys() == {layer.name for layer in whole.layers()}
    assert rows["vision_model.encoder.layers.1.mlp.fc2"] == patches
    assert rows["text_encoder.encoder.layer.1.attention.self.query"] == 2 * words  # alone and matched
    assert rows["text_encoder.encoder.layer.1.output.dense"] == 3 * words  # and the decoder
    assert rows["text_decoder.bert.encoder.layer.1.attention.self.query"] == words
    assert rows["text_encoder.encoder.layer.1.crossattention.self.query"] == 2 * words
    assert rows["text_encoder.encoder.layer.1.crossattention.self.key"] == 2 * patches


@pytest.mark.parametrize("task", TASKS)
def test_heads_are_what_stands_outside_the_towers(task, whole):
    part = whole.for_task(task)
    names = {id(p): n for n, p in part.named_parameters()}
    heads = {names[id(p)] for p in part.head_parameters(task)}
    outside = {n for n in names.values() if not n.startswith(("vision_model.", "text_encoder.", "text_decoder.bert."))}
    assert heads == outside
