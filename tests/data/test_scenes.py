"""The embedded scenes, checked against a solver that looks only at the names and coordinates of the objects."""

import re
import subprocess
import sys
from collections import Counter
from hashlib import sha256
from itertools import combinations

import numpy as np
import pytest

from vlprune.data.scenes import ANSWERS, COLORS, SHAPES, SIZE, SIZES, VOCABULARY, scene, scenes_captions, scenes_vqa
from vlprune.errors import RequestError


TEST = [scene("test", i) for i in range(1000)]
TRAIN = [scene("train", i) for i in range(2000)]

HASH = """
import sys
from hashlib import sha256
from vlprune.data.scenes import scenes_captions, scenes_vqa
print([sha256(scenes_captions(s, 20).images[i].tobytes()).hexdigest() for s in ("train", "test") for i in (0, 7, 19)])
print(scenes_captions("test", 20).captions, scenes_vqa("train", 60).questions)
"""


def say(item):
    return f"a {item.size} {item.color} {item.shape}"


def relation(a, b):
    """How a lies to b, if that is beyond doubt: at least twice as far in one direction as in the other."""
    dx, dy = b.x - a.x, b.y - a.y
    if abs(dx) > 2 * abs(dy):
        return "left of" if dx > 0 else "right of"
    if abs(dy) > 2 * abs(dx):
        return "above" if dy > 0 else "below"
    return None


def holds(caption, items):
    """Is the caption true of these objects?"""
    if match := re.fullmatch(r"(?:(a .*) alone|only (a .*)) (on|at|in) the (\w+)", caption):
        place = match[4]
        if len(items) > 1 or say(items[0]) != (match[1] or match[2]):
            return False
        x, y = items[0].x, items[0].y
        third = SIZE / 3
        where = {"left": x < third, "right": x > 2 * third, "top": y < third, "bottom": y > 2 * third}
        return where[place] if place in where else not any(where.values())
    parts = re.split(r" (left of|right of|above|below) ", caption)
    named = parts[::2]
    candidates = [[item for item in items if say(item) == name] for name in named]
    if not all(candidates):
        return False
    chain = [found[0] for found in candidates]  # no scene has two objects of the same name
    return all(relation(a, b) == word for a, word, b in zip(chain, parts[1::2], chain[1:], strict=False))


def solve(question, items):
    """Every answer that the objects give to the question: exactly one when it is unambiguous."""
    if question == "how many objects are there?":
        return {("one", "two", "three")[len(items) - 1]}
    if match := re.fullmatch(r"what color is the (\w+)\?", question):
        return {(item.color, i) for i, item in enumerate(items) if item.shape == match[1]}
    if match := re.fullmatch(r"what shape is the (\w+) object\?", question):
        return {(item.shape, i) for i, item in enumerate(items) if item.color == match[1]}
    if match := re.fullmatch(r"what size is the (\w+)\?", question):
        return {(item.size, i) for i, item in enumerate(items) if item.shape == match[1]}
    if match := re.fullmatch(r"is there an? (\w+) (\w+)\?", question):
        return {"yes" if any((item.color, item.shape) == match.groups() for item in items) else "no"}
    pattern = r"what (?:(shape) is|color is the object) (left of|right of|above|below) the (\w+) (\w+)\?"
    match = re.fullmatch(pattern, question)
    assert match, f"unknown question: {question}"
    references = [item for item in items if (item.color, item.shape) == (match[3], match[4])]
    assert len(references) == 1
    related = [item for item in items if item is not references[0] and relation(item, references[0]) == match[2]]
    return {(item.shape if match[1] else item.color, i) for i, item in enumerate(related)}


def test_same_scenes_in_another_process():
    here = "\n".join(
        [
            str(
                [
                    sha256(scenes_captions(split, 20).images[i].tobytes()).hexdigest()
                    for split in ("train", "test")
                    for i in (0, 7, 19)
                ]
            ),
            f"{scenes_captions('test', 20).captions} {scenes_vqa('train', 60).questions}",
        ]
    )
    there = subprocess.run([sys.executable, "-c", HASH], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


def test_scenes_stay_what_the_shipped_weights_were_trained_on():
    assert scene("train", 0).captions[0] == "a small orange triangle above a large cyan triangle"
    assert scene("test", 0).captions[0] == "a large orange square left of a small purple circle"
    digest = sha256("\n".join(s.captions[0] for s in TRAIN[:500] + TEST[:500]).encode()).hexdigest()
    assert digest[:16] == "f0d1c3fc6924cc46"


def test_order_of_asking_does_not_matter():
    code = "from vlprune.data.scenes import scene; print(scene('test', 30).captions, scene('test', 3).captions)"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == f"{TEST[30].captions} {TEST[3].captions}"


def test_train_and_test_share_no_scene():
    train = {frozenset(s.captions) for s in TRAIN} | {
        frozenset(scene("train", i).captions) for i in range(2000, 12_000)
    }
    assert not train & {frozenset(s.captions) for s in TEST}


def test_test_captions_are_different():
    captions = [caption for s in TEST for caption in s.captions]
    assert len(set(captions)) == 2 * len(TEST)


def test_test_captions_are_true_of_their_own_scene_only():
    for s in TEST[:500]:
        for caption in s.captions:
            true_of = [other.index for other in TEST[:500] if holds(caption, other.items)]
            assert true_of == [s.index], caption


def test_train_captions_are_true():
    assert all(holds(caption, s.items) for s in TRAIN for caption in s.captions)


def test_objects_lie_apart_and_inside():
    for s in TRAIN + TEST:
        for item in s.items:
            low, high = SIZES[item.size]
            assert low <= item.width <= high
            reach = item.width / 2 * 1.08  # the tips of stars
            assert reach <= item.x <= SIZE - reach and reach <= item.y <= SIZE - reach
        for a, b in combinations(s.items, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) >= (a.width + b.width) / 2 + 1
            assert relation(a, b) is not None


def test_image_shows_what_the_scene_says():
    for s in TEST[:200]:
        pixels = np.asarray(s.draw()).astype(int)
        assert pixels.shape == (SIZE, SIZE, 3)
        assert tuple(pixels[0, 0]) == s.background
        for item in s.items:
            colour = pixels[int(item.y), int(item.x)]
            nearest = min(COLORS, key=lambda name: np.abs(colour - COLORS[name]).sum())
            assert nearest == item.color
        foreground = (np.abs(pixels - s.background).sum(-1) > 60).sum()
        extent = sum(item.width**2 for item in s.items)
        assert 0.25 * extent < foreground < 1.1 * extent


def test_images_are_kept_apart_from_their_users():
    images = scenes_captions("train", 3).images
    before = images[1].tobytes()
    images[1].paste((0, 0, 0), (0, 0, SIZE, SIZE))
    assert images[1].tobytes() == before
    assert len(images[:2]) == 2 and images[-1].tobytes() == images[2].tobytes()
    with pytest.raises(IndexError):
        images[3]


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer_is_right_and_the_only_one(split):
    data = scenes_vqa(split, 3000)
    for question in data.questions:
        items = scene(split, question.image).items
        solutions = {s if isinstance(s, str) else s[0] for s in solve(question.question, items)}
        assert len(solve(question.question, items)) == 1, question
        assert solutions == set(question.answers), question
        assert question.answers[0] in data.answer_list


@pytest.mark.parametrize("split", ["train", "test"])
def test_blind_answers_are_mostly_wrong(split):
    questions = scenes_vqa(split, 3000).questions
    answers = Counter(question.answers[0] for question in questions)
    assert answers.most_common(1)[0][1] / len(questions) < 0.35
    assert set(answers) == set(ANSWERS)
    presence = Counter(q.answers[0] for q in questions if q.question.startswith("is there"))
    assert 0.4 < presence["yes"] / presence.total() < 0.6
    # The best answer per question text: what a model could reach without looking.
    blind: dict[str, Counter[str]] = {}
    for question in questions:
        text = re.sub("|".join((*COLORS, *SHAPES)), "*", question.question)
        blind.setdefault(text, Counter())[question.answers[0]] += 1
    assert sum(max(count.values()) for count in blind.values()) / len(questions) < 0.5


def test_questions_on_one_scene_are_of_different_kinds():
    data = scenes_vqa("test", 100)
    assert len(data.questions) == 100 and len(data.images) == 34
    asked = Counter(question.image for question in data.questions)
    assert [asked[i] for i in range(34)] == [3] * 33 + [1]
    assert len({(q.image, q.question) for q in data.questions}) == 100


def test_words_are_few_and_known():
    captions = [caption for s in TRAIN + TEST for caption in s.captions]
    questions = [(q.question, q.answers[0]) for q in scenes_vqa("train", 3000).questions]
    used = {word for caption in captions for word in caption.split()}
    used |= {word for pair in questions for text in pair for word in text.replace("?", " ?").split()}
    assert used | {"picture"} == set(VOCABULARY)  # "a picture of" is the prompt
    assert len(VOCABULARY) == len(set(VOCABULARY)) <= 80
    assert max(len(caption.split()) for caption in captions) <= 20


def test_unknown_split():
    with pytest.raises(RequestError, match="no split 'val': choose train or test"):
        scenes_captions("val", 3)
