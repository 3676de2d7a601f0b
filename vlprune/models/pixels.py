"""Images to pixel values as `preprocessor_config.json` says, in numpy.

Repeats transformers' CLIP, SigLIP, ViT and DeiT image processors (the slow ones) to the last bit: Pillow's resize,
rescale in float64, normalisation in float32. So evaluation, export checks and runners without PyTorch see one input.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import RequestError
from ..files import read_json


@dataclass(frozen=True)
class Pixels:
    """Resize, crop the centre, rescale to [0, 1], normalise.

    Attributes:
        image_size: side of the square the model sees, in pixels.
        edge: length of the shortest edge before the crop; None = resized to the square as it is, without a crop.
        square: with `edge`: resized to a square of that side, not with the image's proportions.
        resample: Pillow's filter, 2 = bilinear, 3 = bicubic.
        mean: per channel, for pixels in [0, 1].
        std: per channel.
    """

    image_size: int
    edge: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int = 3
    square: bool = False

    def at(self, image_size: int) -> Pixels:
        """Give the same for another size, the crop in proportion.

        Args:
            image_size: pixels.

        Returns:
            Pixels: for that size.
        """
        edge = None if self.edge is None else max(image_size, round(self.edge * image_size / self.image_size))
        return replace(self, image_size=image_size, edge=edge)

    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Resize, crop, rescale and normalise.

        Args:
            images: images of any size.

        Returns:
            np.ndarray: float32 [B, 3, image_size, image_size].
        """
        return self.normalise(self.resize(images))

    def resize(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Resize and crop.

        Args:
            images: images of any size.

        Returns:
            np.ndarray: uint8 [B, image_size, image_size, 3].
        """
        pixels = np.empty((len(images), self.image_size, self.image_size, 3), np.uint8)
        for row, image in zip(pixels, images, strict=True):
            width, height = self._target(*image.size)
            left, top = (width - self.image_size) // 2, (height - self.image_size) // 2
            resized = np.asarray(image.convert("RGB").resize((width, height), self.resample))
            row[:] = resized[top : top + self.image_size, left : left + self.image_size]
        return pixels

    def _target(self, width: int, height: int) -> tuple[int, int]:
        """Tell the size before the crop; never smaller than the crop."""
        if self.edge is None:
            return self.image_size, self.image_size
        if self.square:
            return self.edge, self.edge
        long = int(self.edge * max(width, height) / min(width, height))
        return (self.edge, long) if width <= height else (long, self.edge)

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """Turn resized pixels into model input.

        Args:
            pixels: uint8 [B, image_size, image_size, 3].

        Returns:
            np.ndarray: float32 [B, 3, image_size, image_size].
        """
        # float64 for the rescale, then float32: what transformers does.
        scaled = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        return np.ascontiguousarray(((scaled - mean) / std).transpose(0, 3, 1, 2))

    def settings(self) -> dict[str, Any]:
        """Give what `preprocessor_config.json` says of this.

        Returns:
            dict[str, Any]: without the names of transformers' classes.
        """
        side = {"height": self.image_size, "width": self.image_size}
        if self.edge is None:
            size: dict[str, int] = side
        else:
            size = {"height": self.edge, "width": self.edge} if self.square else {"shortest_edge": self.edge}
        return {
            "do_convert_rgb": True,
            "do_resize": True,
            "size": size,
            "resample": self.resample,
            "do_center_crop": self.edge is not None,
            **({} if self.edge is None else {"crop_size": side}),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }


def read_pixels(folder: Path, default: Pixels) -> Pixels:
    """Read a folder's `preprocessor_config.json`.

    Args:
        folder: a Hugging Face folder.
        default: what the family's image processor does where the file says nothing; `edge` None = it does not crop.

    Returns:
        Pixels: at the size of the file.

    Raises:
        RequestError: the file is broken, or asks for steps this preprocessing does not do.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return default
    config = read_json(path)
    if not isinstance(config, dict):
        raise RequestError(f"{path} must hold a JSON object")

    def refuse(key: str, only: str) -> RequestError:
        return RequestError(f"{path}: {key} = {json.dumps(config[key])[:80]} is not supported, only {only}")

    for key in ("do_resize", "do_rescale", "do_normalize"):
        if config.get(key, True) is not True:
            raise refuse(key, "true")
    if config.get("rescale_factor", 1 / 255) != 1 / 255:
        raise refuse("rescale_factor", "1/255")
    resample = config.get("resample", default.resample)
    if resample not in (0, 1, 2, 3, 4, 5) or isinstance(resample, bool):
        raise refuse("resample", "a filter of Pillow, 0 to 5")
    crops = config.get("do_center_crop", default.edge is not None)
    if not isinstance(crops, bool):
        raise refuse("do_center_crop", "true or false")
    size, square = default.edge or default.image_size, default.square or not crops
    if "size" in config:
        given = config["size"]
        if isinstance(given, dict) and given.keys() == {"shortest_edge"}:
            size, square = given["shortest_edge"], False
        elif isinstance(given, dict) and given.keys() == {"height", "width"} and given["height"] == given["width"]:
            size, square = given["height"], True
        else:
            size = given
        if not _is_size(size):
            raise refuse("size", "one number of pixels, {shortest_edge} or equal {height, width}")
    if not crops:
        if not square:
            raise refuse("size", "a square where nothing is cropped")
        edge, side = None, size
    else:
        edge, side = size, default.image_size
        if "crop_size" in config:
            given = config["crop_size"]
            if isinstance(given, dict) and given.keys() == {"height", "width"} and given["height"] == given["width"]:
                given = given["height"]
            if not _is_size(given) or given > size:
                raise refuse("crop_size", "a square no larger than the resized image")
            side = given
    mean, std = (
        _three(config, path, key, value) for key, value in (("image_mean", default.mean), ("image_std", default.std))
    )
    if min(std) <= 0:
        raise RequestError(f"{path}: image_std must be positive")
    return Pixels(side, edge, mean, std, resample, square and edge is not None)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**14


def _three(config: dict[str, Any], path: Path, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
    values = config.get(key, default)
    if not (
        isinstance(values, list | tuple)
        and len(values) == 3
        and all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e30 for v in values)
    ):
        raise RequestError(f"{path}: {key} must be three numbers")
    return tuple(float(v) for v in values)
