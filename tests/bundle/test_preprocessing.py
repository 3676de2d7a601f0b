"""A bundle sees the same pixels and tokens as the training side, to the last bit."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlprune import models
from vlprune.bundle.runner import DEFAULT, open_picture
from vlprune.bundle.text import Texts
from vlprune.data.images import load_image
from vlprune.models.pixels import read_pixels


TEXTS = [
    "a picture of a red circle",
    "",
    "A Dog's life; isn't it? No!",
    "naïve café über 東京 🙂 [SEP] <|endoftext|> \t\n",
    "one, two . three ! 'm n't 3.5 %",
    "word " * 100,
    "supercalifragilisticexpialidocious" * 3,
]


def processor_of(name, duals, small_models):
    if name == "siglip":
        return models.load(str(duals("siglip").folder)).processor
    return models.load(str(small_models["pretraining"]) if name == "small" else name).processor


@pytest.fixture(scope="module", params=["blip-tiny", "clip-tiny", "siglip", "small"])
def pair(request, duals, small_models, tmp_path_factory):
    """The training side's processor, and what a bundle of it has."""
    processor = processor_of(request.param, duals, small_models)
    folder = tmp_path_factory.mktemp("processor")
    processor.save(folder)
    length = getattr(processor, "length", 35)
    spec = {"family": processor.family, "max_length": length, **processor.special_ids()}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    texts = Texts((folder / "tokenizer.json").read_bytes(), config, spec)
    return processor, texts, read_pixels(folder, DEFAULT), length


def test_tokens(pair):
    processor, texts, _, length = pair
    firsts = ("cls", "enc", "dec") if processor.family == "blip" else ("cls",)
    for first in firsts:
        for given in (TEXTS, *([text] for text in TEXTS)):
            for limit in (length, 6):
                for expected, found in zip(
                    processor.texts(given, first, limit), texts.texts(given, first, limit), strict=True
                ):
                    np.testing.assert_array_equal(found, expected)
                    assert found.dtype == expected.dtype


def test_decoding(pair):
    processor, texts, _, length = pair
    if processor.family != "blip":
        pytest.skip("nothing is decoded")
    for text in TEXTS:
        ids = processor.texts([text], "dec", length)[0][0].tolist()
        assert texts.decode(ids) == processor.decode(ids)
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(0, len(processor.tokenizer), 12).tolist()
        assert texts.decode(ids) == processor.decode(ids)


def same_pixels(processor, pixels, path):
    expected = processor.images([load_image(path)])
    np.testing.assert_array_equal(pixels.images([open_picture(path)]), expected)
    assert np.isfinite(expected).all()


def odd_images(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (37, 53, 3), dtype=np.uint8)
    rgb = Image.fromarray(colors)
    made = {
        "grey.png": rgb.convert("L"),
        "bilevel.png": rgb.convert("1"),
        "alpha.png": Image.fromarray(np.dstack([colors, colors[..., :1]])),
        "grey-alpha.png": rgb.convert("LA"),
        "palette.gif": rgb.convert("P"),
        "cmyk.jpg": rgb.convert("CMYK"),
        "grey16.png": Image.fromarray(rng.integers(0, 65536, (41, 29), dtype=np.uint16)),
        "grey16.tif": Image.fromarray(rng.integers(0, 65536, (41, 29), dtype=np.uint16)),
        "thin.png": rgb.resize((400, 3)),
        "pixel.png": rgb.resize((1, 1)),
        "large.webp": rgb.resize((1301, 999)),
        "plain.ppm": rgb,
        "plain.bmp": rgb,
    }
    for name, image in made.items():
        image.save(folder / name)
    palette = rgb.convert("P")
    palette.save(folder / "transparent.png", transparency=3)
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        rgb.save(folder / f"turned-{turn}.jpg", exif=exif)
    return sorted(folder.iterdir())


def test_pixels_of_odd_images(pair, tmp_path):
    processor, _, pixels, _ = pair
    paths = odd_images(tmp_path)
    assert len(paths) == 22
    for path in paths:
        same_pixels(processor, pixels, path)


def test_pixels_of_photographs(pair, shared):
    processor, _, pixels, _ = pair
    photographs = sorted((shared / "data/flickr8k").rglob("*.jpg"))[::400][:25]
    if not photographs:
        pytest.skip("no photographs: shared/data/flickr8k is not there")
    for path in photographs:
        same_pixels(processor, pixels, path)


@pytest.mark.parametrize("name", ["blip-tiny", "clip-tiny"])
def test_pixels_are_those_of_transformers(name, tmp_path, duals, small_models, shared):
    from transformers import BlipImageProcessor, CLIPImageProcessor

    kind = {"blip-tiny": BlipImageProcessor, "clip-tiny": CLIPImageProcessor}[name]
    processor_of(name, duals, small_models).save(tmp_path)
    theirs, pixels = kind.from_pretrained(tmp_path), read_pixels(tmp_path, DEFAULT)
    photographs = sorted((shared / "data/flickr8k").rglob("*.jpg"))[::800][:10]
    if not photographs:
        pytest.skip("no photographs: shared/data/flickr8k is not there")
    for path in photographs:
        image = load_image(path)
        np.testing.assert_array_equal(
            pixels.images([image]), theirs(image, return_tensors="np")["pixel_values"].astype(np.float32)
        )
