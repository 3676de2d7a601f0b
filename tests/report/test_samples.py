"""Which test samples are shown, and with which outputs."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlprune.data import CaptionData, ClassData, NlvrData, Pair, Question, VqaData
from vlprune.report import samples
from vlprune.report.samples import choose_samples, write_thumbnail


IMAGES = [Image.new("RGB", (4, 4))] * 10
ROW = {"runtime": "pytorch", "provider": "cpu", "precision": "fp32", "packed": False, "values": {}, "n": 10}


def scored(**outputs: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    return [({**ROW, "variant": name.replace("_", "-")}, found) for name, found in outputs.items()]


def test_disagreements_come_first_in_the_order_of_the_data() -> None:
    data = CaptionData("some", IMAGES, [[f"caption {i}", "another"] for i in range(10)])
    dense = [{"caption": f"a {i}"} for i in range(10)]
    pruned = [{"caption": f"a {i}" if i not in (3, 7) else "b"} for i in range(10)]
    rows, images = choose_samples("captioning", data, scored(dense=dense, omp=pruned))
    assert [row["sample"] for row in rows] == [3, 7, 0, 1, 2, 4] and images == [0, 1, 2, 3, 4, 7]
    assert [row["differs"] for row in rows] == [True, True, False, False, False, False]
    assert {(row["differing"], row["candidates"]) for row in rows} == {(2, 10)}
    assert rows[0]["images"] == ["samples/captioning/3.jpg"] and rows[0]["expected"] == ["caption 3", "another"]
    assert rows[0]["outputs"][1] == {
        "variant": "omp", "runtime": "pytorch", "provider": "cpu", "precision": "fp32", "packed": False, "text": "b",
    }  # fmt: skip


def test_fine_tuned_models_are_held_against_each_other() -> None:
    data = ClassData("some", IMAGES[:2], [0, 1], ["ant", "bee"])
    right = [{"label": "ant", "rank": 1}, {"label": "bee", "rank": 1}]
    wrong = [{"label": "bee", "rank": 2}, {"label": "bee", "rank": 1}]
    found = scored(dense=right, omp=wrong, dense_finetuned=right, omp_finetuned=right)
    rows, _ = choose_samples("classification", data, found)
    assert not any(row["differs"] for row in rows)
    rows, _ = choose_samples("classification", data, [*found, *scored(omp_finetuned=wrong)])
    assert [row["differs"] for row in rows] == [True, False]
    assert rows[0]["expected"] == ["ant"] and rows[0]["outputs"][-1]["rank"] == 2
    assert [output["correct"] for output in rows[0]["outputs"]] == [1, 0, 1, 1, 0]


def test_retrieval_is_shown_both_ways() -> None:
    data = CaptionData("some", IMAGES, [[f"caption {i}", "another"] for i in range(10)])
    dense = [{"i2t_rank": 1, "t2i_ranks": [1, 1], "text": f"caption {i}", "image": i} for i in range(10)]
    pruned = [*dense[:8], {"i2t_rank": 1, "t2i_ranks": [4, 1], "text": "another", "image": 2}, dense[9]]
    rows, images = choose_samples("retrieval", data, scored(dense=dense, omp=pruned))
    assert [row["sample"] for row in rows] == [0, 1, 2, 8, 0, 1] and images == [0, 1, 2, 8]
    assert not rows[0]["differs"]  # another right text is no disagreement
    text, image = rows[0], rows[3]
    assert text["images"] == ["samples/retrieval/0.jpg"] and text["question"] == ""
    assert (image["images"], image["question"], image["image"]) == ([], "caption 8", "samples/retrieval/8.jpg")
    assert (
        image["outputs"][1].items() >= {"image": "samples/retrieval/2.jpg", "rank": 4, "correct": 0, "text": ""}.items()
    )


def test_questions_and_pairs() -> None:
    question = Question(1, "what   is\nit?", ["dog", "dog", "cat"])
    rows, images = choose_samples(
        "vqa",
        VqaData("some", IMAGES, [question], None),
        scored(dense=[{"answer": "cat", "accuracy": 0.3}], omp=[{"answer": "dog", "accuracy": 1.0}]),
    )
    assert images == [1] and rows[0]["differs"]
    assert (rows[0]["question"], rows[0]["expected"]) == ("what is it?", ["dog", "cat"])
    assert [(output["text"], output["correct"]) for output in rows[0]["outputs"]] == [("cat", 0.3), ("dog", 1)]

    pairs = NlvrData("some", IMAGES, [Pair(3, 1, "both are black", False)])
    rows, images = choose_samples("nlvr", pairs, scored(dense=[{"answer": True, "accuracy": 0.0}]))
    assert images == [1, 3] and rows[0]["images"] == ["samples/nlvr/3.jpg", "samples/nlvr/1.jpg"]
    assert (rows[0]["outputs"][0]["text"], rows[0]["expected"]) == ("true", ["false"])


def test_long_texts_are_cut_and_fewer_outputs_are_candidates() -> None:
    data = CaptionData("some", IMAGES, [["x" * 1000]] * 10)
    found = scored(dense=[{"caption": "y" * 1000}] * 10, omp=[{"caption": "y"}] * 4)
    rows, _ = choose_samples("captioning", data, found)
    assert len(rows) == rows[0]["candidates"] == rows[0]["differing"] == 4
    assert len(rows[0]["expected"][0]) == len(rows[0]["outputs"][0]["text"]) == samples.LENGTH
    assert choose_samples("captioning", data, []) == ([], [])


@pytest.mark.parametrize(("size", "small"), [((640, 480), (160, 120)), ((64, 64), (64, 64))])
def test_thumbnails_are_small_and_say_nothing_else(
    size: tuple[int, int], small: tuple[int, int], tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x010F] = "secret camera"
    original = Image.new("RGB", size, "red")
    original.save(tmp_path / "photo.jpg", exif=exif, comment="secret place", icc_profile=b"secret profile")
    write_thumbnail(Image.open(tmp_path / "photo.jpg"), tmp_path / "small.jpg")
    content = (tmp_path / "small.jpg").read_bytes()
    assert b"secret" not in content and Image.open(tmp_path / "small.jpg").size == small
