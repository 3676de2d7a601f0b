"""Reader of BLIP's VQA JSON.

    train   [{"question_id": 1, "question": "what is it?", "answer": ["a dog", "dog"], "image": "1.jpg",
              "dataset": "vqa"}, ...]
    test    the same with "answer": "a dog"

Image paths are relative to the folder of the file. `answer_list.json` beside it, a list of texts, closes the list of
answers. Fields not named here (`weight`, for one) are ignored: how many annotators gave an answer is its weight.
"""

from collections.abc import Sequence
from pathlib import Path
from reprlib import repr as short
from typing import Any

from vlprune.data.images import ImageFiles
from vlprune.data.records import BrokenRecordError, ImageFinder, read_records, sift, text, texts
from vlprune.data.sets import Question, VqaData
from vlprune.errors import RequestError


def read_vqa(
    path: Path, skip_broken: bool = False, name: str | None = None, records: list[Any] | None = None
) -> VqaData:
    """Read a VQA JSON of either form.

    Args:
        path: the file.
        skip_broken: leave broken records out and count them.
        name: name of the data set; the file's when not given.
        records: the content of the file if it has been read.

    Returns:
        VqaData: the questions in order; their images exist but have not been decoded.

    Raises:
        RequestError: the file, one of its records, or the answer list beside it is broken.
    """
    find = ImageFinder(path.parent)
    records = read_records(path) if records is None else records
    identifiers: set[tuple[str, str | int]] = set()  # within each dataset, as several are often joined

    def parse(number: int, record: dict[str, Any]) -> tuple[int, str, Path, str, list[str]]:
        image, file = find(record.get("image"))
        question = text(record.get("question"), "question")
        answers = texts(record.get("answer"), "answer")
        identifier = record.get("question_id")
        if identifier is not None:
            if not isinstance(identifier, int | str) or isinstance(identifier, bool):
                raise BrokenRecordError("wrong question_id", f"{short(identifier)} is neither a number nor a text")
            key = (str(record.get("dataset")), identifier)
            if key in identifiers:
                raise BrokenRecordError("duplicate question_id", short(identifier))
            identifiers.add(key)
        return number, image, file, question, answers

    rows, reasons = sift(path, records, parse, skip_broken)
    place: dict[str, int] = {}
    paths: list[Path] = []
    numbers: list[int] = []
    questions: list[Question] = []
    for number, image, file, question, answers in rows:
        if image not in place:
            place[image] = len(paths)
            paths.append(file)
            numbers.append(number)
        questions.append(Question(place[image], question, answers))
    answer_list = _read_answer_list(path.with_name("answer_list.json"))
    return VqaData(name or path.stem, ImageFiles(path, paths, numbers), questions, answer_list, reasons)


def _read_answer_list(path: Path) -> list[str] | None:
    if not path.is_file():
        return None
    answers = []
    for number, record in enumerate(read_records(path), start=1):
        try:
            answers.append(text(record, "answer"))
        except BrokenRecordError as error:
            raise RequestError(f"{path}, record {number}: {error}: correct it") from None
    if len(set(answers)) < len(answers):
        twice = next(answer for i, answer in enumerate(answers) if answer in answers[:i])
        raise RequestError(f"{path} lists the answer {twice!r} twice: keep one")
    return answers


def is_vqa_record(record: Any) -> bool:
    """Tell whether a record looks like one of this module's, broken or not.

    Args:
        record: anything read from JSON.

    Returns:
        bool: True when it has a question.
    """
    return isinstance(record, dict) and "question" in record


def vqa_split(records: Sequence[Any]) -> str:
    """Tell which split a VQA JSON is made for.

    Args:
        records: its content.

    Returns:
        str: "train" when an answer is a list, else "test".
    """
    return "train" if any(isinstance(r, dict) and isinstance(r.get("answer"), list) for r in records) else "test"
