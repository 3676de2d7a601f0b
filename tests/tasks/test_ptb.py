"""Caption words against Stanford's PTBTokenizer as the COCO evaluation runs it."""

import json
import re
import shutil
from pathlib import Path

import pytest

from vlprune.tasks.ptb import caption_words


CAPTIONS = Path(__file__).parents[3] / "shared/data/flickr8k/flickr8k_test.json"


@pytest.mark.parametrize(
    ("caption", "words"),
    [  # what PTBTokenizer 3.4.1 gives
        ("A man's dog doesn't run.", "a man 's dog does n't run"),
        ("They're here; he'd won't\nstay!", "they 're here he 'd wo n't stay"),
        ("the dogs' toys and the boys' room", "the dogs toys and the boys room"),
        ("At 5 p.m. in the U.S.", "at 5 p.m. in the u.s."),
        ("Mr. and Mrs. Smith at St. John's.", "mr. and mrs. smith at st. john 's"),
        ("A 2-story, black-and-white house -- 1/2 built...", "a 2-story black-and-white house 1/2 built"),
        ("10,000 people at 3:30, others: later", "10,000 people at 3:30 others later"),
        ('A "stop" sign (red).', "a stop sign -lrb- red -rrb-"),
        ("50% off & #1 for $5.50", "50 % off & # 1 for $ 5.50"),
        ("I cannot, gonna", "i can not gon na"),
        ("12 o'clock rock 'n' roll of the '90s", "12 o'clock rock 'n' roll of the '90s"),
        ("jalapeño’s “quoted” it’s", "jalapeño 's quoted it 's"),
        ("huh!!! what?!", "huh !!! what ?!"),
        ("a t-shirt's. an ant's-eye-view", "a t-shirt 's an ant 's eye-view"),
        ("-5 degrees - cold", "-5 degrees cold"),
        ("...", ""),
        ("", ""),
    ],
)
def test_known_captions(caption, words):
    assert " ".join(caption_words(caption)) == words


def natural(caption: str) -> str:
    """Undo the spaces that Flickr8k's captions have around punctuation and clitics."""
    caption = re.sub(r" ([.,;:?!%)])", r"\1", caption)
    caption = re.sub(r" ('s|n't|'re|'ll|'ve|'m|'d)\b", r"\1", caption).replace("( ", "(")
    return re.sub(r'" ([^"]*) "', r'"\1"', caption)


@pytest.mark.skipif(shutil.which("java") is None, reason="PTBTokenizer needs java")
@pytest.mark.skipif(not CAPTIONS.exists(), reason="../shared/data/flickr8k is not there")
def test_equal_to_ptb_tokenizer_on_real_captions():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    spaced = [caption for record in json.loads(CAPTIONS.read_text()) for caption in record["caption"]]
    captions = spaced + [natural(caption) for caption in spaced]
    try:
        expected = PTBTokenizer().tokenize({i: [{"caption": caption}] for i, caption in enumerate(captions)})
    except OSError as error:  # it writes beside itself
        pytest.skip(f"PTBTokenizer cannot run here: {error}")
    different = [
        (caption, expected[i][0])
        for i, caption in enumerate(captions)
        if " ".join(caption_words(caption)) != expected[i][0]
    ]
    assert len(captions) == 10000
    assert different == [], f"{len(different)} of {len(captions)} captions differ"
