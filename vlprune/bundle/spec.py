"""task.json of a bundle, checked before anything is computed with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import RequestError
from .manifest import Manifest


MAX_SIDE, MAX_TOKENS, MAX_BEAMS, MAX_NAMES = 2048, 4096, 64, 50_000


def _integer(most: int, least: int = 0) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and least <= value <= most


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 1000


def _texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_NAMES and all(map(_text, value))


def _ids(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= MAX_TOKENS and all(map(_TOKEN, value))


def _shapes(value: Any) -> bool:
    size = _integer(2**16, 1)
    return (
        isinstance(value, list)
        and 0 < len(value) <= 256
        and all(isinstance(pair, list) and len(pair) == 2 and all(map(size, pair)) for pair in value)
    )


_TOKEN = _integer(2**31)
_LENGTH = _integer(MAX_TOKENS, 1)
_READS = {"max_length": _LENGTH, "pad_token_id": _TOKEN}
_WRITES = {
    **_READS,
    "sep_token_id": _TOKEN,
    "dec_token_id": _TOKEN,
    "beams": _integer(MAX_BEAMS, 1),
    "decoder": _text,
    "past_shapes": _shapes,
}
_KEYS: Mapping[str, Mapping[str, Callable[[Any], bool]]] = {
    "retrieval": _READS,
    "captioning": {**_WRITES, "prompt_ids": _ids, "min_length": _integer(MAX_TOKENS)},
    "vqa": {
        **_WRITES,
        "answers": lambda value: value is None or (_texts(value) and len(value) > 0),
        "answer_ids": lambda value: value is None or (isinstance(value, list) and all(map(_ids, value))),
        "rank_k": _integer(MAX_NAMES, 1),
        "max_answer_length": _LENGTH,
    },
    "zero-shot": {**_READS, "classes": _texts, "templates": lambda value: _texts(value) and 0 < len(value) <= 200},
    "classification": {"labels": lambda value: _texts(value) and len(value) > 0},
    "nlvr": _READS,
}
_OPTIONAL = ("cls_token_id", "enc_token_id", "dec_token_id", "sep_token_id")


def check_spec(value: Any, manifest: Manifest) -> dict[str, Any]:
    """Refuse a task.json that is not what the task's runner reads.

    Args:
        value: its content.
        manifest: of the bundle.

    Returns:
        dict[str, Any]: the spec.

    Raises:
        RequestError: a key is missing, of a wrong kind, or out of range.
    """
    if not isinstance(value, dict) or any(value.get(key) != manifest[key] for key in ("task", "family")):
        raise RequestError("task.json of the bundle is of another task than its manifest tells: get the bundle again")
    checks = {"image_size": _integer(MAX_SIDE, 1), **_KEYS[manifest["task"]]}
    checks |= {key: _TOKEN for key in _OPTIONAL if key in value}
    for key, sound in checks.items():
        if key not in value or not sound(value[key]):
            found = ascii(value.get(key))[:80]
            raise RequestError(f"task.json of the bundle has {key} = {found}: get the bundle again")
    answers, ids = value.get("answers"), value.get("answer_ids")
    if answers is not None and (
        ids is None or len(ids) != len(answers) or min(map(len, ids)) < 2 or len({row[0] for row in ids}) > 1
    ):
        raise RequestError("task.json of the bundle has answers without tokens: get the bundle again")
    if value["task"] == "captioning" and len(value["prompt_ids"]) >= value["max_length"]:
        raise RequestError("task.json of the bundle has a prompt that fills the whole caption: get the bundle again")
    return value
