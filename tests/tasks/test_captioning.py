"""Captioning on a decoder that recites a known caption per image."""

import numpy as np
import pytest

from vlprune.data.sets import CaptionData
from vlprune.tasks.captioning import evaluate, make_spec


CAPTIONS = ["a red dog runs", "two cats", "a green ball near the water", "grass", "a big house on a hill", "one bird"]
PROMPT = "a picture of "


def make_graphs(processor, spoken):
    """Image i's cross key holds i; the decoder reads its place from the length of the cache."""
    scripts = [[*processor.prompt_ids(PROMPT), *processor.ids(text), 3, 3] for text in spoken]

    def image_encoder(feeds):
        images = feeds["pixel_values"][:, 0, 0, 0].astype(np.float32)
        cross = np.tile(images[:, None, None, None], (1, 1, 5, 2))
        return {"cross_key.0": cross, "cross_value.0": cross}

    def text_decoder(feeds):
        ids, past = feeds["input_ids"], feeds["past_key.0"]
        batch, length = ids.shape
        assert feeds["cross_mask"].shape == (batch, 5)
        assert feeds["attention_mask"].shape == (batch, past.shape[2] + length)
        logits = np.zeros((batch, length, 64), np.float32)
        for row, image in enumerate(feeds["cross_key.0"][:, 0, 0, 0].astype(int)):
            for step in range(length):
                place = past.shape[2] + step + 1
                logits[row, step, scripts[image][min(place, len(scripts[image]) - 1)]] = 20.0
        present = np.concatenate([past, np.zeros((batch, 1, length, 2), np.float32)], axis=2)
        return {"logits": logits, "present_key.0": present, "present_value.0": present}

    return {"image_encoder": image_encoder, "text_decoder": text_decoder}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_right_captions(processor, beams, batch_size):
    data = CaptionData("fake", range(6), [[text.title() + ".", "something else"] for text in CAPTIONS])
    spec = make_spec(processor, [(1, 2)], beams=beams)
    scores = evaluate(make_graphs(processor, CAPTIONS), spec, processor, data, batch_size=batch_size)
    assert [output["caption"] for output in scores.outputs] == CAPTIONS  # the prompt is not part of the output
    assert scores.values["exact"] == 1.0
    assert scores.values["bleu_1"] == pytest.approx(1.0)
    assert scores.values["cider"] > 3
    assert scores.n == 6


def test_wrong_captions(processor):
    data = CaptionData("fake", range(6), [[text] for text in CAPTIONS])
    graphs = make_graphs(processor, CAPTIONS[1:] + CAPTIONS[:1])
    scores = evaluate(graphs, make_spec(processor, [(1, 2)]), processor, data)
    assert scores.values["exact"] == 0.0
    assert scores.values["cider"] < 0.3


def test_long_captions_are_cut(processor):
    data = CaptionData("fake", range(1), [["a b c"]])
    graphs = make_graphs(processor, ["w " * 30])
    spec = make_spec(processor, [(1, 2)], max_length=9)
    assert evaluate(graphs, spec, processor, data).outputs == [{"caption": "w w w w w"}]  # 9 less the prompt's 4


def test_spec(processor):
    spec = make_spec(processor, ((1, 2), (3, 4)))
    assert spec["prompt"] == PROMPT
    assert spec["prompt_ids"] == [4, 6, 7, 8]
    assert spec["past_shapes"] == [[1, 2], [3, 4]]
    assert (spec["task"], spec["decoder"]) == ("captioning", "text_decoder")
    assert (spec["beams"], spec["min_length"], spec["max_length"]) == (3, 5, 20)
