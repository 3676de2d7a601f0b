"""Image classification on a graph whose right answers are known."""

import numpy as np
import pytest

from vlprune.data.sets import ClassData
from vlprune.errors import RequestError
from vlprune.tasks.classification import evaluate, make_spec


LABELS = ["ant", "bee, wild bee", "cat", "dog", "eel", "fox"]


def run(processor, logits, labels, classes=LABELS, batch_size=2, names=LABELS):
    table = np.asarray(logits, np.float32)

    def classifier(feeds):
        assert feeds["pixel_values"].dtype == np.float32
        return {"logits": table[feeds["pixel_values"][:, 0, 0, 0].astype(int)]}

    data = ClassData("fake", range(len(labels)), labels, list(classes))
    spec = make_spec(processor, names)
    return evaluate({"image_classifier": classifier}, spec, processor, data, batch_size=batch_size)


def test_ranks_and_accuracy(processor):
    logits = [[9, 1, 2, 3, 4, 5], [9, 1, 2, 3, 4, 5], [9, 1, 2, 3, 4, 5]]
    scores = run(processor, logits, [0, 5, 1])
    assert scores.outputs == [{"label": "ant", "rank": rank} for rank in (1, 2, 6)]
    assert scores.values == {"top1": pytest.approx(1 / 3), "top5": pytest.approx(2 / 3)} and scores.n == 3
    assert scores.ci95["top1"][0] <= 1 / 3 <= scores.ci95["top1"][1]


def test_some_of_the_labels_by_name(processor):
    scores = run(processor, [[0, 5, 1, 0, 9, 0], [0, 5, 1, 0, 9, 0]], [0, 1], classes=["Eel", "wild_bee"])
    assert [output["rank"] for output in scores.outputs] == [1, 2]
    with pytest.raises(RequestError, match="'gnu' is none of them"):
        run(processor, [[0] * 6], [0], classes=["gnu"])


def test_ties_and_nan_count_against_the_model(processor):
    scores = run(processor, [[1] * 6, [np.nan] * 6, [np.nan, 0, 0, 0, 0, 0]], [0, 0, 0])
    assert [output["rank"] for output in scores.outputs] == [6, 6, 6]


def test_two_labels_have_no_top5(processor):
    assert run(processor, [[1, 0]], [0], ["cat", "dog"], names=["cat", "dog"]).values == {"top1": 1.0}


def test_the_spec_tells_all(processor):
    assert make_spec(processor, LABELS) == {
        "schema_version": 1,
        "family": processor.family,
        "task": "classification",
        "image_size": 2,
        "labels": LABELS,
    }
