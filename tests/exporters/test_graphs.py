"""The graphs: ONNX Runtime against PyTorch, PyTorch against transformers, cached against uncached decoding."""

import numpy as np
import pytest
import torch
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval, BlipForQuestionAnswering

from vlprune import exporters
from vlprune.errors import RequestError
from vlprune.exporters.blip import graphs as blip_graphs
from vlprune.exporters.graphs import flatten, nest
from vlprune.models.blip import run_text

from .conftest import SIZE, TASKS, WORDS, make_model, random_feeds


SHAPES = [(1, 1, 0), (1, 17, 0), (2, 3, 0), (5, 11, 0), (1, 1, 16), (2, 1, 1), (5, 4, 7), (3, 17, 2)]
CLOSE = {"atol": 2e-5, "rtol": 0}


def assert_close(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name].shape == expected[name].shape, name
        assert got[name].dtype == np.float32
        np.testing.assert_allclose(got[name], expected[name], err_msg=name, **CLOSE)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("batch,length,past", SHAPES)
def test_onnx_equals_pytorch_for_any_batch_and_length(small, exported, task, batch, length, past):
    made = exported[task]
    for name, graph in blip_graphs(small.model, task).items():
        feeds = random_feeds(graph, batch, length, past, states=length + 3, seed=batch * length + past)
        before = {key: value.copy() for key, value in feeds.items()}
        expected = made.torch[name](feeds)
        assert_close(made.onnx[name](feeds), expected)
        assert all(np.array_equal(feeds[key], before[key]) for key in feeds), "a graph changed its inputs"
        assert {k: v.shape for k, v in expected.items()} == declared(graph, batch, length, past)


def declared(graph, batch, length, past):
    sizes = {"batch": batch, "length": length, "past": past, "past + length": past + length}
    return {name: tuple(sizes.get(size, size) for size in axes) for name, axes in graph.outputs.items()}


def test_names_are_the_contract(exported):
    def names(made):
        found = {}
        for name, graph in made.onnx.items():
            inputs = [value.name for value in graph.session.get_inputs()]
            outputs = [value.name for value in graph.session.get_outputs()]
            found[name] = (inputs, outputs)
        return found

    text = ["input_ids", "attention_mask"]
    cross = ["cross_key.0", "cross_key.1", "cross_value.0", "cross_value.1"]
    past = [name.replace("cross", "past") for name in cross]
    decoder = ([*text, "cross_mask", *past, *cross], ["logits", *[name.replace("cross", "present") for name in cross]])
    assert names(exported["retrieval"]) == {
        "image_encoder": (["pixel_values"], ["image_states", "image_embeds"]),
        "text_encoder": (text, ["text_embeds"]),
        "itm": ([*text, "image_states"], ["itm_logits"]),
    }
    assert names(exported["captioning"]) == {"image_encoder": (["pixel_values"], cross), "text_decoder": decoder}
    assert names(exported["vqa"]) == {
        "image_encoder": (["pixel_values"], ["image_states"]),
        "question_encoder": ([*text, "image_states"], cross),
        "answer_decoder": decoder,
    }


@pytest.mark.parametrize("side", ["torch", "onnx"])
@pytest.mark.parametrize("cuts", [[9], [1, 2, 3, 4, 5, 6, 7, 8, 9], [3, 4, 9], [4, 9]])
def test_decoding_in_steps_equals_one_uncached_pass(small, exported, side, cuts):
    decoder = getattr(exported["captioning"], side)["text_decoder"]
    feeds = random_feeds(blip_graphs(small.model, "captioning")["text_decoder"], 3, 9, seed=4)
    ids, mask = feeds["input_ids"], feeds["attention_mask"]
    cross = {name: feeds[name] for name in feeds if name.startswith("cross")}
    past = {name: feeds[name] for name in feeds if name.startswith("past")}
    logits, start = [], 0
    for end in cuts:
        outputs = decoder({"input_ids": ids[:, start:end], "attention_mask": mask[:, :end], **cross, **past})
        past = {name: outputs[name.replace("past", "present")] for name in past}
        logits.append(outputs["logits"])
        start = end
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    lists = nest({name: tensor for name, tensor in tensors.items() if name[:9] in ("cross_key", "cross_val")})
    with torch.no_grad():
        states, _ = run_text(
            small.model.text_decoder.bert,
            tensors["input_ids"],
            tensors["attention_mask"],
            causal=True,
            cross=list(zip(lists["cross_key"], lists["cross_value"], strict=True)),
            cross_mask=tensors["cross_mask"],
        )
        expected = small.model.lm_logits(states).numpy()
    np.testing.assert_allclose(np.concatenate(logits, axis=1), expected, **CLOSE)


@pytest.mark.parametrize("side", ["torch", "onnx"])
def test_padding_of_a_question_changes_nothing(exported, side):
    """transformers ignores the mask of the question; here neither length nor content of the padding matters."""
    graphs = getattr(exported["vqa"], side)
    rng = np.random.default_rng(1)
    states = graphs["image_encoder"]({"pixel_values": rng.normal(size=(1, 3, SIZE, SIZE)).astype(np.float32)})

    def logits(ids, mask):
        question = {"input_ids": ids, "attention_mask": mask, **states}
        cross = graphs["question_encoder"](question)
        answer = np.array([[4, 7, 8]])
        past = {
            f"past_{kind}.{layer}": np.zeros((1, 2, 0, 16), np.float32) for kind in ("key", "value") for layer in (0, 1)
        }
        feeds = {"input_ids": answer, "attention_mask": np.ones_like(answer), "cross_mask": mask, **cross, **past}
        return graphs["answer_decoder"](feeds)["logits"]

    ids = rng.integers(6, len(WORDS), (1, 5))
    bare = logits(ids, np.ones_like(ids))
    for junk in (0, 9):
        longer = np.concatenate([ids, np.full((1, 6), junk)], axis=1)
        mask = np.concatenate([np.ones_like(ids), np.zeros((1, 6), np.int64)], axis=1)
        np.testing.assert_allclose(logits(longer, mask), bare, **CLOSE)
        assert np.abs(logits(longer, np.ones_like(longer)) - bare).max() > 0.01, "the mask has no effect at all"


def test_other_rows_of_a_batch_change_nothing(small, exported):
    for task in TASKS:
        for name, graph in blip_graphs(small.model, task).items():
            feeds = random_feeds(graph, 4, 6, past=3, seed=8)
            together = exported[task].onnx[name](feeds)
            alone = exported[task].onnx[name]({key: value[2:3] for key, value in feeds.items()})
            for key, value in alone.items():
                np.testing.assert_allclose(together[key][2:3], value, **CLOSE)


# --- against transformers ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(3)
    pixels = rng.normal(size=(2, 3, SIZE, SIZE)).astype(np.float32)
    ids = rng.integers(6, len(WORDS), (2, 7))
    return pixels, ids, np.ones_like(ids)


def theirs(model, task, kind, tmp_path):
    model.for_task(task).save(tmp_path)
    loaded, info = kind.from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not info["missing_keys"] and not info["mismatched_keys"]
    return loaded.eval()


def test_retrieval_equals_transformers(small, exported, inputs, tmp_path):
    pixels, ids, mask = inputs
    model = theirs(small.model, "retrieval", BlipForImageTextRetrieval, tmp_path)
    ours = exported["retrieval"].onnx
    image = ours["image_encoder"]({"pixel_values": pixels})
    text = ours["text_encoder"]({"input_ids": ids, "attention_mask": mask})
    match = ours["itm"]({"input_ids": ids, "attention_mask": mask, "image_states": image["image_states"]})
    tensors = {"input_ids": torch.from_numpy(ids), "pixel_values": torch.from_numpy(pixels)}
    with torch.no_grad():
        itc = model(**tensors, attention_mask=torch.from_numpy(mask), use_itm_head=False).itm_score
        itm = model(**tensors, attention_mask=torch.from_numpy(mask), use_itm_head=True).itm_score
    np.testing.assert_allclose(image["image_embeds"] @ text["text_embeds"].T, itc.numpy(), **CLOSE)
    np.testing.assert_allclose(match["itm_logits"], itm.numpy(), **CLOSE)
    assert np.ptp(itm.numpy()) > 0.01


def test_captioning_equals_transformers(small, exported, inputs, tmp_path):
    pixels, ids, _ = inputs
    model = theirs(small.model, "captioning", BlipForConditionalGeneration, tmp_path)
    made = exported["captioning"]
    with torch.no_grad():
        expected = model(pixel_values=torch.from_numpy(pixels), input_ids=torch.from_numpy(ids)).logits
    cross = made.onnx["image_encoder"]({"pixel_values": pixels})
    assert_logits(made, cross, np.ones((2, cross["cross_key.0"].shape[2]), np.int64), ids, expected)


def test_vqa_equals_transformers(small, exported, inputs, tmp_path):
    pixels, ids, mask = inputs
    model = theirs(small.model, "vqa", BlipForQuestionAnswering, tmp_path)
    made = exported["vqa"]
    with torch.no_grad():
        states = model.vision_model(torch.from_numpy(pixels)).last_hidden_state
        question = model.text_encoder(torch.from_numpy(ids), encoder_hidden_states=states).last_hidden_state
        expected = model.text_decoder(torch.from_numpy(ids), encoder_hidden_states=question).logits
    encoded = made.onnx["image_encoder"]({"pixel_values": pixels})
    cross = made.onnx["question_encoder"]({"input_ids": ids, "attention_mask": mask, **encoded})
    assert_logits(made, cross, mask, ids, expected)


def assert_logits(made, cross, cross_mask, ids, expected):
    empty = {
        f"past_{kind}.{layer}": np.zeros((len(ids), heads, 0, width), np.float32)
        for kind in ("key", "value")
        for layer, (heads, width) in enumerate(made.spec["past_shapes"])
    }
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "cross_mask": cross_mask, **cross, **empty}
    logits = made.onnx[made.spec["decoder"]](feeds)["logits"]
    np.testing.assert_allclose(logits, expected.numpy(), **CLOSE)
    assert np.ptp(logits) > 1


# --- small parts ------------------------------------------------------------------------------------------------------


def test_nest_and_flatten_are_inverse():
    flat = {"a": 1, "b.0": 2, "b.1": 3, "c": 4}
    assert nest(flat) == {"a": 1, "b": [2, 3], "c": 4}
    assert flatten(nest(flat)) == flat


def test_torch_graphs_take_any_array_and_follow_the_weights():
    model = make_model(seed=1).train()
    graph = exporters.torch_graphs(model, "captioning")["image_encoder"]
    assert not model.training
    pixels = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3)).astype(np.float32).transpose(0, 3, 1, 2)
    pixels.setflags(write=False)
    first = graph({"pixel_values": pixels})["cross_key.0"]
    with torch.no_grad():
        model.vision_model.post_layernorm.weight.mul_(2)
    assert not np.allclose(first, graph({"pixel_values": pixels})["cross_key.0"])


def test_a_task_the_model_lacks_is_refused(small):
    with pytest.raises(RequestError, match="has no graphs for vqa: it offers captioning"):
        blip_graphs(small.model.for_task("captioning"), "vqa")
