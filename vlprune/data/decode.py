"""One image file as RGB pixels.

Imports only numpy and Pillow, and is shared with the edge runner: a photograph must give both the same pixels.
"""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


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
            return to_rgb(ImageOps.exif_transpose(image))
    except BrokenImageError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on malformed files
        text = getattr(error, "strerror", None) or str(error)
        text = "no image in a known format" if isinstance(error, UnidentifiedImageError) else text
        raise BrokenImageError(text or type(error).__name__) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Make an image RGB, as a viewer shows it: on white where it is transparent, 16-bit grey scaled down.

    Args:
        image: of any mode but floating-point.

    Returns:
        Image.Image: RGB.

    Raises:
        BrokenImageError: its pixels are floating-point numbers.
    """
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
