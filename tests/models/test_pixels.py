"""Preprocessing of images: every form of preprocessor_config.json, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessor, SiglipImageProcessor

from vlprune.errors import RequestError
from vlprune.models.pixels import Pixels, read_pixels


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CLIP = Pixels(224, 224, MEAN, STD)
SIGLIP = Pixels(224, None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


IMAGES = [noise(*shape) for shape in ((97, 61), (5, 9), (224, 224), (640, 481), (33, 300), (225, 224))]


def read(folder, config, default=CLIP) -> Pixels:
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return read_pixels(folder, default)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 64, "crop_size": 64},  # as OpenAI's files say it
        {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}, "rescale_factor": 1 / 255},
        {"size": {"shortest_edge": 70}, "crop_size": 33, "resample": 2},
        {"size": {"shortest_edge": 64}, "crop_size": 64, "image_mean": [0.5] * 3, "image_std": [0.2, 0.3, 0.4]},
        {"size": {"height": 70, "width": 70}, "crop_size": 64},
    ],
    ids=range(5),
)
def test_clip_pixels_are_those_of_transformers(settings, tmp_path):
    expected = np.stack(CLIPImageProcessor(**settings)(IMAGES)["pixel_values"])
    pixels = read(tmp_path, settings)
    np.testing.assert_array_equal(pixels.images(IMAGES), expected)
    again = read(tmp_path, pixels.settings())
    assert again == pixels
    theirs = CLIPImageProcessor.from_pretrained(tmp_path)
    np.testing.assert_array_equal(np.stack(theirs(IMAGES)["pixel_values"]), expected)


def test_siglip_pixels_are_those_of_transformers(tmp_path):
    expected = np.stack(SiglipImageProcessor(size={"height": 48, "width": 48}, resample=3)(IMAGES)["pixel_values"])
    pixels = read(tmp_path, {"size": {"height": 48, "width": 48}, "resample": 3}, SIGLIP)
    np.testing.assert_array_equal(pixels.images(IMAGES), expected)
    assert read(tmp_path, pixels.settings(), SIGLIP) == pixels


def test_other_modes_become_rgb():
    gray = noise(60, 41, "L")
    np.testing.assert_array_equal(CLIP.images([gray]), CLIP.images([gray.convert("RGB")]))


def test_without_a_file_the_family_decides(tmp_path):
    assert read_pixels(tmp_path, CLIP) == CLIP
    assert read(tmp_path, {}) == CLIP and read(tmp_path, {}, SIGLIP) == SIGLIP


def test_another_size_keeps_the_proportion_of_the_crop():
    pixels = Pixels(224, 256, MEAN, STD)
    assert pixels.at(224) == pixels
    assert (pixels.at(384).image_size, pixels.at(384).edge) == (384, 439)
    assert (pixels.at(3).image_size, pixels.at(3).edge) == (3, 3)
    assert SIGLIP.at(64).edge is None


@pytest.mark.parametrize(
    "config",
    [
        {"do_resize": False},
        {"do_rescale": False},
        {"do_normalize": 0},
        {"rescale_factor": 1 / 127.5},
        {"resample": 9},
        {"resample": True},
        {"do_center_crop": "yes"},
        {"do_center_crop": False, "size": {"shortest_edge": 64}},
        {"size": 0},
        {"size": 10**9},
        {"size": "big"},
        {"size": {"height": 3, "width": 4}},
        {"size": {"longest_edge": 64}},
        {"crop_size": 300},
        {"crop_size": {"height": 32, "width": 64}},
        {"crop_size": None},
        {"image_mean": [0.5, 0.5]},
        {"image_mean": ["a", "b", "c"]},
        {"image_std": [1, 1, 0]},
        {"image_std": [1, 1, float("inf")]},
        {"image_std": 3},
        [1],
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused(config, tmp_path):
    with pytest.raises(RequestError) as caught:
        read(tmp_path, config)
    assert "preprocessor_config.json" in str(caught.value) and "\n" not in str(caught.value)
