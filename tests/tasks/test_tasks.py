"""The registry of tasks."""

import pytest

from vlprune.data.sets import CaptionData, VqaData
from vlprune.errors import RequestError
from vlprune.tasks import PRIMARY, TASKS, evaluate, get_task


def test_registry():
    assert list(TASKS) == ["retrieval", "captioning", "vqa"]
    assert PRIMARY == {"retrieval": "mean_r1", "captioning": "cider", "vqa": "accuracy"}


def test_unknown_task():
    with pytest.raises(RequestError, match="unknown task 'retreival': did you mean retrieval\\?"):
        get_task("retreival")
    with pytest.raises(RequestError, match="choose from retrieval, captioning, vqa"):
        get_task("x")


@pytest.mark.parametrize("task", ["retrieval", "captioning", "vqa"])
def test_no_samples(task, processor):
    data = VqaData("empty", [], [], None) if task == "vqa" else CaptionData("empty", [], [])
    with pytest.raises(RequestError, match=f"empty has no samples to score {task} on"):
        evaluate(task, {}, {}, processor, data)
