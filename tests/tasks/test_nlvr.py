"""Judging sentences on graphs that know the truth from both images."""

import numpy as np
import pytest

from vlprune.data.sets import NlvrData, Pair
from vlprune.tasks.nlvr import evaluate, make_spec


SENTENCES = ("the left one is larger", "the right one is larger by far")


def make_data(n=24, images=7):
    rng = np.random.default_rng(0)
    pairs = []
    for i in range(n):
        left, right = rng.integers(images, size=2).tolist()
        sentence = SENTENCES[i % 2]
        pairs.append(Pair(left, right, sentence, left > right if i % 2 == 0 else right > left))
    return NlvrData("fake", range(images), pairs)


class Model:
    """Images are their number; tells which is larger, right but for pairs with image `wrong`."""

    def __init__(self, wrong=None):
        self.wrong = wrong
        self.encoded = []
        self.graphs = {"image_encoder": self.image_encoder, "pair_classifier": self.pair_classifier}

    def image_encoder(self, feeds):
        images = feeds["pixel_values"][:, 0, 0, 0]
        self.encoded.append(images.astype(int).tolist())
        return {"image_states": np.tile(images[:, None, None], (1, 3, 4)).astype(np.float32)}

    def pair_classifier(self, feeds):
        assert (feeds["input_ids"][:, 0] == 5).all() and feeds.keys() == {
            "input_ids", "attention_mask", "image_states.0", "image_states.1"
        }  # fmt: skip
        left, right = (feeds[f"image_states.{i}"][:, 0, 0] for i in range(2))
        swapped = feeds["attention_mask"].sum(1) > 7  # the longer sentence
        true = np.where(swapped, right > left, left > right)
        if self.wrong is not None:
            true ^= (left == self.wrong) | (right == self.wrong)
        return {"logits": np.stack([1.0 - true, true], 1).astype(np.float32)}


@pytest.mark.parametrize("batch_size", [1, 3, 5, 100])
def test_every_pair_is_judged(processor, batch_size):
    model, data = Model(), make_data()
    scores = evaluate(model.graphs, make_spec(processor), processor, data, batch_size)
    assert scores.values == {"accuracy": 1.0} and scores.n == 24 and scores.ci95["accuracy"] == (1.0, 1.0)
    assert scores.outputs == [{"answer": pair.label, "accuracy": 1.0} for pair in data.pairs]
    assert all(len(part) <= batch_size for part in model.encoded)


def test_an_image_is_encoded_once_per_batch(processor):
    model = Model()
    evaluate(model.graphs, make_spec(processor), processor, make_data(), 24)
    assert model.encoded == [list(range(7))]


def test_wrong_answers_count(processor):
    data = make_data()
    scores = evaluate(Model(wrong=3).graphs, make_spec(processor), processor, data, 5)
    right = [3 not in (pair.left, pair.right) for pair in data.pairs]
    assert 0 < sum(right) < 24
    assert scores.values["accuracy"] == pytest.approx(np.mean(right))
    assert [output["accuracy"] for output in scores.outputs] == right
    assert [output["answer"] == pair.label for output, pair in zip(scores.outputs, data.pairs, strict=True)] == right


def test_pairs_of_one_sentence_are_resampled_together(processor):
    pairs = [Pair(i % 7, (i + 1) % 7, f"sentence {i // 2}", True) for i in range(40)]
    alone = [Pair(pair.left, pair.right, f"sentence {i} x", True) for i, pair in enumerate(pairs)]
    model = Model()
    # Both pairs of a sentence are judged alike.
    model.graphs["pair_classifier"] = lambda feeds: {"logits": np.eye(2)[(feeds["input_ids"][:, 2] % 2)]}

    def width(pairs):
        low, high = evaluate(model.graphs, make_spec(processor), processor, NlvrData("x", range(7), pairs)).ci95[
            "accuracy"
        ]
        return high - low

    assert width(pairs) > 1.2 * width(alone)


def test_spec(processor):
    spec = make_spec(processor)
    assert (spec["task"], spec["max_length"], spec["enc_token_id"]) == ("nlvr", 64, 5)
    assert make_spec(processor, max_length=9)["max_length"] == 9
