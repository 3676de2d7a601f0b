"""Question answering on a decoder that knows the answer from the question and the image."""

import numpy as np
import pytest

from vlprune.data.sets import Question, VqaData
from vlprune.tasks.vqa import evaluate, make_spec


ANSWERS = ["red", "dark red", "dark blue", "blue", "very dark blue"]
IMAGES = 5


def make_data(images_of=(4, 0, 2, 0, 1, 3, 4, 2)):
    """The right answer to "color" about image i is answer i, to "color after this one" answer i + 1; in no order."""
    questions = []
    for place, image in enumerate(images_of):
        text, shift = (("color", 0), ("color after this one", 1))[place % 2]
        questions.append(Question(image, text, [ANSWERS[(image + shift) % len(ANSWERS)]]))
    return VqaData("fake", range(IMAGES), questions, ANSWERS)


class Model:
    def __init__(self, processor, answers=ANSWERS):
        self.scripts = [[4, *processor.ids(answer), 3, 3, 3] for answer in answers]
        self.images = []
        self.graphs = {
            "image_encoder": self.image_encoder,
            "question_encoder": self.question_encoder,
            "answer_decoder": self.answer_decoder,
        }

    def image_encoder(self, feeds):
        images = feeds["pixel_values"][:, 0, 0, 0]
        self.images.append(images.astype(int).tolist())
        return {"image_states": np.tile(images[:, None, None], (1, 3, 1)).astype(np.float32)}

    def question_encoder(self, feeds):
        assert (feeds["input_ids"][:, 0] == 5).all()
        shift = (feeds["attention_mask"].sum(1) > 3).astype(np.float32)  # the longer question
        answer = (feeds["image_states"][:, 0, 0] + shift) % len(self.scripts)
        cross = np.tile(answer[:, None, None, None], (1, 1, feeds["input_ids"].shape[1], 2))
        # Padding holds rubbish, which the decoder must be told not to read.
        cross = np.where(feeds["attention_mask"][:, None, :, None] == 1, cross, 99).astype(np.float32)
        return {"cross_key.0": cross, "cross_value.0": cross}

    def answer_decoder(self, feeds):
        ids, past, mask = feeds["input_ids"], feeds["past_key.0"], feeds["cross_mask"]
        batch, length = ids.shape
        answer = (feeds["cross_key.0"][:, 0, :, 0] * mask).sum(1) / mask.sum(1)
        logits = np.zeros((batch, length, 64), np.float32)
        for row, script in enumerate(answer.round().astype(int)):
            for step in range(length):
                place = past.shape[2] + step + 1
                logits[row, step, self.scripts[script][min(place, len(self.scripts[script]) - 1)]] = 20.0
        present = np.concatenate([past, np.zeros((batch, 1, length, 2), np.float32)], axis=2)
        return {"logits": logits, "present_key.0": present, "present_value.0": present}


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("ranked", [True, False])
def test_right_answers_in_the_order_of_the_data(processor, batch_size, ranked):
    data = make_data()
    spec = make_spec(processor, [(1, 2)], ANSWERS if ranked else None)
    scores = evaluate(Model(processor).graphs, spec, processor, data, batch_size=batch_size)
    assert scores.outputs == [{"answer": q.answers[0], "accuracy": 1.0} for q in data.questions]
    assert scores.values == {"accuracy": 1.0}
    assert scores.n == 8


def test_wrong_answers(processor):
    spec = make_spec(processor, [(1, 2)], ANSWERS)
    scores = evaluate(Model(processor, ANSWERS[1:] + ANSWERS[:1]).graphs, spec, processor, make_data())
    assert scores.values == {"accuracy": 0.0}


def test_few_candidates_can_miss_the_answer(processor):
    """Three answers start with "dark" or "very": with one candidate the first-token choice must already be right."""
    spec = make_spec(processor, [(1, 2)], ["dark red", "dark blue"], rank_k=1)
    data = VqaData("fake", range(1), [Question(0, "color", ["dark blue"])], None)
    model = Model(processor, ["dark blue"])
    assert evaluate(model.graphs, spec, processor, data).outputs[0]["answer"] == "dark red"
    spec["rank_k"] = 2
    assert evaluate(model.graphs, spec, processor, data).outputs[0]["answer"] == "dark blue"


def test_an_image_is_encoded_once_per_batch(processor):
    model = Model(processor)
    evaluate(model.graphs, make_spec(processor, [(1, 2)], ANSWERS), processor, make_data(), batch_size=4)
    assert model.images == [[0, 1, 2], [2, 3, 4]]


def test_several_references_use_the_official_score(processor):
    data = VqaData("fake", range(1), [Question(0, "color", ["Red."] * 2 + ["green"] * 8)], None)
    scores = evaluate(Model(processor).graphs, make_spec(processor, [(1, 2)], ANSWERS), processor, data)
    assert scores.values["accuracy"] == pytest.approx(0.6)


def test_spec(processor):
    spec = make_spec(processor, [(1, 2)], ["red", "dark red"])
    assert spec["answers"] == ["red", "dark red"]
    assert spec["answer_ids"] == [[4, 6, 3], [4, 7, 6, 3]]
    assert (spec["decoder"], spec["rank_k"], spec["beams"], spec["max_answer_length"]) == ("answer_decoder", 128, 3, 10)
    assert make_spec(processor, [(1, 2)], None)["answer_ids"] is None
