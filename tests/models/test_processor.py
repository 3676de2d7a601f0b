"""Pixels equal transformers' own to the last bit; tokenizers keep their special tokens, are repeatable and reload."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import BertTokenizerFast, BlipImageProcessor

from vlprune.models.processor import (
    CLIP_MEAN,
    CLIP_STD,
    SPECIAL,
    Processor,
    load_tokenizer,
    word_tokenizer,
    wordpiece_tokenizer,
)


PHOTOGRAPHS = Path(__file__).parents[2].parent / "shared" / "data" / "flickr8k" / "images"
CAPTIONS = ["A dog runs.", "The dog is running on grass", "two Dogs run , a café", "running and jumping dogs"] * 3


def processor(tokenizer: BertTokenizerFast, image_size: int = 32) -> Processor:
    ids = tokenizer.convert_tokens_to_ids
    return Processor(tokenizer, image_size, ids("[DEC]"), ids("[ENC]"))


def noise(width: int, height: int, mode: str) -> Image.Image:
    channels = {"RGB": 3, "L": 1}[mode]
    values = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(values.squeeze(), mode)


def transformers_pixels(images: list[Image.Image], size: int) -> np.ndarray:
    reference = BlipImageProcessor(
        size={"height": size, "width": size},
        resample=3,
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    )
    return reference(images, return_tensors="np")["pixel_values"]


@pytest.mark.parametrize("size", [32, 96, 384])
def test_pixels_equal_transformers(size: int) -> None:
    shapes = [(97, 61), (5, 9), (384, 384), (640, 481), (33, 500)]
    images = [noise(*shape, "RGB") for shape in shapes] + [noise(50, 41, "L")]
    ours = processor(word_tokenizer(["a"]), size).images(images)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, transformers_pixels([image.convert("RGB") for image in images], size))


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="the photographs of ../shared/data/flickr8k are not there")
@pytest.mark.parametrize("size", [96, 224, 250])
def test_pixels_of_photographs_equal_transformers(size: int) -> None:
    photographs = [Image.open(path) for path in sorted(PHOTOGRAPHS.glob("*.jpg"))[:4]]
    photographs.append(photographs[0].crop((3, 5, 200, 111)))
    np.testing.assert_array_equal(
        processor(word_tokenizer(["a"]), size).images(photographs), transformers_pixels(photographs, size)
    )


def test_wordpiece_splits_only_what_it_does_not_know() -> None:
    tokenizer = wordpiece_tokenizer([*CAPTIONS, "zebra"], 120)
    assert len(tokenizer) <= 120
    assert tokenizer.convert_ids_to_tokens(range(len(SPECIAL))) == list(SPECIAL)
    assert tokenizer.tokenize("The DOG") == ["the", "dog"]
    pieces = tokenizer.tokenize("zebras")
    assert len(pieces) > 1 and "".join(p.removeprefix("##") for p in pieces) == "zebras"
    assert tokenizer.tokenize("Café") == tokenizer.tokenize("cafe")
    assert tokenizer.tokenize("☃") == ["[UNK]"]


def test_wordpiece_is_repeatable() -> None:
    first, second = (wordpiece_tokenizer(CAPTIONS, 50).get_vocab() for _ in range(2))
    assert first == second
    assert sorted(first.values()) == list(range(len(first)))


def test_first_tokens_padding_and_truncation() -> None:
    tested = processor(wordpiece_tokenizer(CAPTIONS, 80))
    cls, sep, pad = (tested.tokenizer.convert_tokens_to_ids(t) for t in ("[CLS]", "[SEP]", "[PAD]"))
    ids, mask = tested.texts(["dog", "the dog is running on grass"], "cls", max_length=6)
    assert ids.shape == mask.shape == (2, 6) and ids.dtype == mask.dtype == np.int64
    assert ids[0].tolist() == [cls, tested.tokenizer.convert_tokens_to_ids("dog"), sep, pad, pad, pad]
    assert mask[0].tolist() == [1, 1, 1, 0, 0, 0]
    assert ids[1, -1] == sep and mask[1].all()
    firsts = {kind: int(tested.texts(["dog"], kind)[0][0, 0]) for kind in ("cls", "enc", "dec")}
    assert tested.tokenizer.convert_ids_to_tokens(list(firsts.values())) == ["[CLS]", "[ENC]", "[DEC]"]
    prompt = tested.prompt_ids("the dog")
    assert prompt == tested.texts(["the dog"], "dec")[0][0, :-1].tolist()


def test_tokenizer_survives_saving(tmp_path: Path) -> None:
    before = processor(wordpiece_tokenizer(CAPTIONS, 80))
    before.save(tmp_path)
    after = processor(load_tokenizer(tmp_path))
    for kind in ("cls", "enc", "dec"):
        np.testing.assert_array_equal(before.texts(CAPTIONS, kind)[0], after.texts(CAPTIONS, kind)[0])
    ids, _ = after.texts(["the dog is running , on grass"], "dec")
    assert after.decode(ids[0]) == before.decode(ids[0]) == "the dog is running, on grass"
