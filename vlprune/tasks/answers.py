"""Official VQA accuracy and its normalisation of answers (Antol et al., VQA, 2015; visualqa.org/evaluation.html)."""

import re
from collections.abc import Sequence


_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = {"a", "an", "the"}
# Contractions that lost their apostrophe, unless a word of its own is left (ill, well, were, shell, wed, shed, id).
_NEGATED = [
    "ai", "are", "ca", "could", "did", "does", "do", "had", "has", "have", "is", "might", "must", "need", "ought",
    "sha", "should", "was", "were", "wo", "would",
]  # fmt: skip
_PRONOUNS = {
    "'m": ["i"],
    "'d": ["he", "they", "you", "who", "it", "there", "that"],
    "'ll": ["they", "you", "who", "it", "that", "there"],
    "'re": ["they", "you"],
    "'s": ["he", "she", "that", "there", "here", "what", "where", "who", "how", "when", "why", "let", "everyone",
           "somebody", "someone", "something"],
    "'ve": ["i", "they", "we", "you", "could", "might", "must", "should", "would", "who"],
}  # fmt: skip
_CONTRACTIONS = (
    {word + "nt": word + "n't" for word in _NEGATED}
    | {word + end[1:]: word + end for end, words in _PRONOUNS.items() for word in words}
    | {"maam": "ma'am", "oclock": "o'clock", "yall": "y'all", "twas": "'twas"}
)
_PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_<>@`,?!&%$#*^|~-]")


def normalise_answer(answer: str) -> str:
    """Bring an answer to the form in which the official evaluation compares answers.

    Lower case; no period unless it is a decimal point; no comma between digits; other punctuation becomes a space,
    but apostrophes and colons stay; number words up to ten become digits; articles go; contractions get their
    apostrophe back.

    Args:
        answer: any text.

    Returns:
        str: the normalised answer, possibly empty.
    """
    text = re.sub(r"(?<=\d),(?=\d)", "", answer.lower())
    text = _PUNCTUATION.sub(" ", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", text)
    words = (_NUMBERS.get(word, word) for word in text.split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Score one answer.

    With several references (official: ten) the score is min(same / 3, 1), averaged over the sets that leave one
    reference out; with two or three references the divisor is one less than their number, so that full agreement
    scores 1. With one reference it is exact match. Answers are compared after `normalise_answer`.

    Args:
        answer: the answer given.
        references: what people answered, at least one.

    Returns:
        float: between 0 and 1.
    """
    given = normalise_answer(answer)
    total = len(references)
    same = sum(normalise_answer(reference) == given for reference in references)
    if total == 1:
        return float(same)
    enough = min(3, total - 1)
    left_out_same = min((same - 1) / enough, 1.0) if same else 0.0
    left_out_other = min(same / enough, 1.0)
    return (same * left_out_same + (total - same) * left_out_other) / total
