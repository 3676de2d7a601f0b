"""Official VQA accuracy and its normalisation, on cases worked out by hand."""

import itertools

import pytest

from vlprune.tasks.answers import normalise_answer, vqa_accuracy


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("Yes", "yes"),
        ("  The  Dog. ", "dog"),
        ("a", ""),
        ("two", "2"),
        ("none", "0"),
        ("ten of an hour", "10 of hour"),
        ("2.5", "2.5"),
        ("st. john.", "st john"),
        ("1,000", "1000"),
        ("red, white", "red white"),
        ("black/white", "black white"),
        ("t-shirt", "t shirt"),
        ("dont", "don't"),
        ("girl's", "girl's"),
        ("2:50 pm", "2:50 pm"),
        ("its well", "its well"),
        ("theyre", "they're"),
        ("yes\nno\t!", "yes no"),
        ("what?!", "what"),
    ],
)
def test_normalised(answer, normal):
    assert normalise_answer(answer) == normal


def leave_one_out(answer, references):
    """The definition, literally: for each annotator left out, min(#same among the others / 3, 1); averaged."""
    scores = []
    for left_out in range(len(references)):
        others = references[:left_out] + references[left_out + 1 :]
        scores.append(min(others.count(answer) / 3, 1))
    return sum(scores) / len(scores)


@pytest.mark.parametrize(("same", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_ten_references(same, score):
    references = ["cat"] * same + ["dog"] * (10 - same)
    assert vqa_accuracy("cat", references) == pytest.approx(score)


@pytest.mark.parametrize("total", range(4, 12))
def test_equal_to_the_definition(total):
    for same in range(total + 1):
        references = ["cat"] * same + ["dog"] * (total - same)
        assert vqa_accuracy("cat", references) == pytest.approx(leave_one_out("cat", references))


def test_few_references():
    assert vqa_accuracy("Two.", ["2"]) == 1.0
    assert vqa_accuracy("two", ["3"]) == 0.0
    assert vqa_accuracy("yes", ["yes", "no"]) == 0.5
    assert vqa_accuracy("yes", ["yes"] * 3) == 1.0
    assert vqa_accuracy("yes", ["yes", "yes", "no"]) == pytest.approx((0.5 + 0.5 + 1) / 3)


def test_the_order_of_references_does_not_matter():
    references = ["a cat", "cat", "dog", "cats", "Cat!"]
    scores = {round(vqa_accuracy("cat", list(order)), 9) for order in itertools.permutations(references)}
    assert len(scores) == 1
