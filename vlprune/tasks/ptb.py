"""Caption words as the COCO caption evaluation counts them, without Java.

The COCO evaluation (Chen et al., 2015, arXiv 1504.00325) runs Stanford's PTBTokenizer with lower-casing and drops
punctuation. The rules here give the same words for captions: clitics come apart ("man 's", "do n't"), hyphens and
slashes stay inside words, abbreviations keep their period. Brackets become "-lrb-" and so on, and runs such as "!!!"
stay: the evaluation's list of punctuation misses them, and scores must stay comparable.
"""

import re


_SAME = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": " ", "…": " "})
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = re.compile(r"--+|\.{2,}|[\"`;]|''|(?<![!?])[!?](?![!?])|[,:](?!\d)|(?<!\d)[,:]")
_ALONE = re.compile(r"([()\[\]{}&%$*+=^|~<>°]|#(?=\d)|[!?]{2,})")
# What keeps its period: letters each with one (u.s., p.m.), titles, units, months and days of Stanford's list.
_ABBREVIATION = re.compile(
    r"(?:(?:[^\W\d_]\.)*[^\W\d_]|\d+0s|ph\.d|mr|mrs|ms|dr|st|mt|ft|sq|jr|sr|vs|etc|lt|col|gen|sgt|capt|rev|hon|prof|gov|"
    r"sen|rep|pres|ave|blvd|inc|co|corp|ltd|jan|feb|mar|apr|jun|jul|aug|sep|sept|oct|nov|dec|mon|tues|wed|thurs|fri)\."
)
_KEEPS_QUOTE = re.compile(r"'(?:em|til|cause|n'?|\d0s|s|m|d|re|ve|ll|t)(?![^\W_])")
_CLITIC = re.compile(r"((?<=.)n't|'(?:s|m|d|re|ve|ll))(?![^\W_])-?")
_JOINED = {
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "gimme": "gim me",
    "lemme": "lem me", "'twas": "'t was", "'tis": "'t is", "y'all": "y' all",
}  # fmt: skip


def caption_words(caption: str) -> list[str]:
    """Split a caption into the words that BLEU and CIDEr count.

    Args:
        caption: any text; upper case, punctuation and line breaks do not matter.

    Returns:
        list[str]: lower-case words without punctuation, empty when there are none.
    """
    text = _ALONE.sub(r" \1 ", _DROPPED.sub(" ", caption.lower().translate(_SAME)))
    words: list[str] = []
    for chunk in text.split():
        if chunk in _BRACKETS:
            words.append(_BRACKETS[chunk])
            continue
        if chunk.endswith(".") and not _ABBREVIATION.fullmatch(chunk):
            chunk = chunk[:-1]
        chunk = chunk.rstrip("-")
        if not chunk[1:2].isdigit():  # the sign of a number stays
            chunk = chunk.lstrip("-")
        chunk = _JOINED.get(chunk, chunk)
        if not _KEEPS_QUOTE.match(chunk):
            chunk = chunk.strip("'")
        words += _CLITIC.sub(r" \1 ", chunk).split()
    return words
