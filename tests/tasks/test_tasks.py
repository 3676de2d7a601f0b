"""The registry of tasks."""

import pytest

from vlprune import names
from vlprune.data.sets import KINDS, CaptionData, ClassData, NlvrData, VqaData
from vlprune.errors import RequestError
from vlprune.tasks import PRIMARY, TASKS, evaluate, get_task


def test_registry():
    assert tuple(TASKS) == names.TASKS == tuple(KINDS)
    assert PRIMARY["retrieval"] == "mean_r1" and PRIMARY["zero-shot"] == PRIMARY["classification"] == "top1"


def test_unknown_task():
    with pytest.raises(RequestError, match="unknown task 'retreival': did you mean retrieval\\?"):
        get_task("retreival")
    with pytest.raises(RequestError, match="choose from retrieval, captioning, vqa, zero-shot, classification"):
        get_task("x")


@pytest.mark.parametrize("task", KINDS)
def test_no_samples(task, processor):
    empty = {
        VqaData: VqaData("empty", [], [], None),
        CaptionData: CaptionData("empty", [], []),
        ClassData: ClassData("empty", [], [], ["cat"]),
        NlvrData: NlvrData("empty", [], []),
    }
    data = empty[KINDS[task]]
    with pytest.raises(RequestError, match=f"empty has no samples to score {task} on"):
        evaluate(task, {}, {}, processor, data)
