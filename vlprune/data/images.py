"""Image files opened as RGB."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlprune.data.records import one_line
from vlprune.errors import RequestError


# Only formats that Pillow decodes itself: EPS, for one, would start another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
MAX_PIXELS = 89_478_485  # a quarter of a gigabyte of RGB; above this Pillow warns, and we refuse
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BrokenImageError(Exception):
    """A file that is no image, or not a whole one."""


def load_image(path: Path | str, thumbnail: bool = False) -> Image.Image:
    """Read an image file as a viewer shows it: upright as its EXIF data say, on white where it is transparent.

    Args:
        path: a JPEG, PNG, WebP, GIF (first frame), BMP, TIFF or PPM file.
        thumbnail: decode a JPEG at an eighth of its size, which is faster and yet reads every byte of it.

    Returns:
        Image.Image: RGB.

    Raises:
        BrokenImageError: the file is missing, no image, truncated, or larger than 89 million pixels.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BrokenImageError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
            if thumbnail:
                image.draft(None, (1, 1))
            return _to_rgb(ImageOps.exif_transpose(image))
    except BrokenImageError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on malformed files
        text = "no image in a known format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise BrokenImageError(text or type(error).__name__) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode == "F":
        raise BrokenImageError("floating-point pixels, which have no agreed range")
    return image.convert("RGB")


class ImageFiles(Sequence[Image.Image]):
    """Image files, opened when asked for; a broken one raises `RequestError` naming it and its record.

    Args:
        source: the file with the records, or the folder of the images.
        paths: the image files.
        numbers: per image, the number (from 1) of the record of `source` that names it first; None = a folder.
    """

    def __init__(self, source: Path, paths: Sequence[Path], numbers: Sequence[int] | None = None) -> None:
        self.source = source
        self.paths = list(paths)
        self.numbers = None if numbers is None else list(numbers)

    def __len__(self) -> int:
        return len(self.paths)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        try:
            return load_image(self.paths[index])
        except BrokenImageError as error:
            raise self.error(index, str(error)) from error

    def error(self, index: int, why: str) -> RequestError:
        """Make the error that reports a broken image.

        Args:
            index: which image.
            why: what is wrong with it.

        Returns:
            RequestError: one line.
        """
        what = one_line(f"broken image {self.paths[index]} ({why})")
        where = self.source if self.numbers is None else f"{self.source}, record {self.numbers[index]}"
        return RequestError(f"{where}: {what}: replace it, or pass --skip-broken")

    def subset(self, indices: Sequence[int]) -> "ImageFiles":
        """Keep some of the images.

        Args:
            indices: which, in their new order.

        Returns:
            ImageFiles: these images.
        """
        numbers = None if self.numbers is None else [self.numbers[i] for i in indices]
        return ImageFiles(self.source, [self.paths[i] for i in indices], numbers)
