"""Zero-shot classification on graphs whose right answers are known."""

import numpy as np
import pytest

from vlprune.data.sets import ClassData
from vlprune.errors import RequestError
from vlprune.tasks.zero_shot import TEMPLATES, class_embeds, evaluate, make_spec


COLORS = ["red", "green", "blue", "dark red", "black", "white"]


class Model:
    """Image i looks as row i of a table [N, E]; a text is embedded by its words, whose sum shows in the embedding."""

    def __init__(self, processor, looks, words):
        self.processor = processor
        self.looks = np.asarray(looks, np.float32)
        self.words = {word: np.asarray(vector, np.float32) for word, vector in words.items()}
        self.texts, self.calls = [], 0
        self.graphs = {"image_encoder": self.image_encoder, "text_encoder": self.text_encoder}

    def image_encoder(self, feeds):
        return {"image_embeds": self.looks[feeds["pixel_values"][:, 0, 0, 0].astype(int)]}

    def text_encoder(self, feeds):
        self.calls += 1
        ids, mask = feeds["input_ids"], feeds["attention_mask"]
        assert ids.shape == mask.shape and mask[:, -1].any(), "a column of nothing but padding"
        rows = []
        for row, valid in zip(ids, mask, strict=True):
            text = [self.processor.words[i] for i in row[1 : valid.sum() - 1]]
            self.texts.append(" ".join(text))
            vector = sum(self.words.get(word, 0) for word in text)
            rows.append(vector / np.linalg.norm(vector))
        return {"text_embeds": np.array(rows, np.float32)}


def axis(i, width=6):
    return np.eye(width, dtype=np.float32)[i]


def colours(processor, looks):
    return Model(processor, looks, {"red": axis(0), "green": axis(1), "blue": axis(2), "dark": 2 * axis(3),
                                    "black": axis(4), "white": axis(5)})  # fmt: skip


def run(processor, labels, looks, classes=None, batch_size=2, spec=None):
    model = colours(processor, looks)
    data = ClassData("fake", range(len(labels)), labels, classes or COLORS)
    spec = spec or make_spec(processor, data.classes, ["a {}", "my {} w w w"])
    return evaluate(model.graphs, spec, processor, data, batch_size=batch_size), model


def test_all_right(processor):
    scores, model = run(processor, [0, 1, 2, 3], [axis(0), axis(1), axis(2), axis(0) + 2 * axis(3)])
    assert scores.values == {"top1": 1.0, "top5": 1.0} and scores.n == 4
    assert scores.ci95 == {"top1": (1.0, 1.0), "top5": (1.0, 1.0)}
    assert scores.outputs[3] == {"class": "dark red", "rank": 1}
    assert sorted(model.texts) == sorted(t.replace("{}", c) for c in COLORS for t in ("a {}", "my {} w w w"))
    assert model.calls == 6  # of two texts each: once for all images


def test_ranks_and_accuracy(processor):
    # "dark red" is mostly dark, so that a red image is red first, then dark red; a white one is black last.
    looks = [axis(0), axis(0), axis(5) - axis(4), axis(5)]
    scores, _ = run(processor, [0, 3, 4, 5], looks)
    assert [output["rank"] for output in scores.outputs] == [1, 2, 6, 1]
    assert scores.values == {"top1": 0.5, "top5": 0.75}
    low, high = scores.ci95["top1"]
    assert 0 <= low < 0.5 < high <= 1


def test_ties_count_against_the_model(processor):
    scores, _ = run(processor, [0, 1], [np.ones(6), np.zeros(6)], classes=["red", "green", "blue"])
    assert scores.values == {"top1": 0.0}  # of three classes no top 5


def test_classes_average_unit_texts_and_are_unit_again(processor):
    model = Model(processor, [], {"cat": axis(0, 2), "big": 9 * axis(1, 2)})
    spec = make_spec(processor, ["cat"], ["{}", "big {}"])
    (found,) = class_embeds(model.graphs, spec, processor)
    expected = axis(0, 2) + np.array([1, 9]) / np.sqrt(82)  # each text counts alike, however long its sum was
    np.testing.assert_allclose(found, expected / np.linalg.norm(expected), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found), 1, rtol=1e-6)


def test_batches_do_not_matter(processor):
    looks = np.random.default_rng(0).standard_normal((7, 6))
    results = [run(processor, [0, 1, 2, 3, 4, 5, 0], looks, batch_size=size)[0] for size in (1, 3, 50)]
    assert results[0].outputs == results[1].outputs == results[2].outputs


def test_the_spec_tells_all(processor):
    spec = make_spec(processor, ["cat", "dog"])
    assert spec["classes"] == ["cat", "dog"] and spec["templates"] == list(TEMPLATES)
    assert TEMPLATES[0] == "a photo of a {}." and all(template.count("{}") == 1 for template in TEMPLATES)
    assert make_spec(processor, ["cat"], ("the {}",))["templates"] == ["the {}"]
    assert (spec["task"], spec["image_size"], spec["pad_token_id"]) == ("zero-shot", 2, 0)


def test_data_in_another_order_than_the_spec(processor):
    spec = make_spec(processor, COLORS, ["a {}"])
    scores, _ = run(processor, [0, 1], [axis(2), axis(1)], classes=["Blue", "green"], spec=spec)
    assert scores.values == {"top1": 1.0, "top5": 1.0}  # the other four classes compete
    with pytest.raises(RequestError, match="'pink' is none of them"):
        run(processor, [0], [axis(0)], classes=["pink"], spec=spec)
