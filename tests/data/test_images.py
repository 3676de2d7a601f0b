"""Every kind of image file becomes upright RGB, or is refused."""

import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from vlprune.data import decode
from vlprune.data.images import BrokenImageError, load_image


def pixel(path, x=0, y=0):
    image = load_image(path)
    assert image.mode == "RGB"
    return image.getpixel((x, y))


def close(a, b, tolerance=6):
    return all(abs(x - y) <= tolerance for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("mode", "colour", "name", "expected"),
    [
        ("RGB", (200, 100, 50), "a.png", (200, 100, 50)),
        ("RGB", (200, 100, 50), "a.webp", (200, 100, 50)),
        ("RGB", (200, 100, 50), "a.bmp", (200, 100, 50)),
        ("RGB", (200, 100, 50), "a.tif", (200, 100, 50)),
        ("L", 90, "a.png", (90, 90, 90)),
        ("L", 90, "a.jpg", (90, 90, 90)),
        ("LA", (90, 255), "a.png", (90, 90, 90)),
        ("1", 1, "a.png", (255, 255, 255)),
        ("I;16", 90 * 257, "a.png", (90, 90, 90)),
        ("I;16", 90 * 257, "a.tif", (90, 90, 90)),
        ("RGBA", (200, 100, 50, 255), "a.png", (200, 100, 50)),
        ("RGBA", (200, 100, 50, 0), "a.png", (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), "a.jpg", (255, 0, 0)),
        ("CMYK", (0, 255, 255, 0), "a.tif", (255, 0, 0)),
    ],
)
def test_modes(tmp_path, mode, colour, name, expected):
    Image.new(mode, (16, 16), colour).save(tmp_path / name)
    assert close(pixel(tmp_path / name), expected)


def test_palette(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "a.gif")
    image.save(tmp_path / "clear.png", transparency=1)
    image.save(tmp_path / "half.png", transparency=bytes([255, 0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixel(tmp_path / "a.png") == pixel(tmp_path / "a.gif") == (10, 200, 30)
        assert pixel(tmp_path / "clear.png") == pixel(tmp_path / "half.png") == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8))
    turns = Image.Transpose
    back = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_90,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_270,
    }
    stored = upright.transpose(back[orientation]) if orientation in back else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert load_image(tmp_path / "a.png").tobytes() == upright.tobytes()


def png(width, height, body=b""):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("thumbnail", [False, True])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "progressive"])
def test_truncated(tmp_path, kind, thumbnail):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    path = tmp_path / "image"
    if kind == "progressive":
        noise.save(path, format="JPEG", progressive=True)
    else:
        noise.save(path, format=kind)
    load_image(path, thumbnail)
    whole = path.read_bytes()
    for length in (len(whole) * 9 // 10, len(whole) // 2, 30, 1):
        path.write_bytes(whole[:length])
        with pytest.raises(BrokenImageError):
            load_image(path, thumbnail)


@pytest.mark.parametrize("thumbnail", [False, True])
def test_no_image(tmp_path, thumbnail):
    path = tmp_path / "a.png"
    for content in (b"", b"hello", b"GIF89a", bytes(1000), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        path.write_bytes(content)
        with pytest.raises(BrokenImageError, match="no image in a known format"):
            load_image(path, thumbnail)
    with pytest.raises(BrokenImageError, match="No such file"):
        load_image(tmp_path / "nothing.png", thumbnail)


@pytest.mark.parametrize("size", [(12_000, 12_000), (60_000, 60_000)])
def test_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, size, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(*size))
    monkeypatch.setattr(decode, "to_rgb", lambda image: pytest.fail("decoded"))
    with pytest.raises(BrokenImageError, match="pixels"):
        load_image(tmp_path / "a.png")


def test_floating_point_is_refused(tmp_path):
    Image.new("F", (4, 4), 0.5).save(tmp_path / "a.tif")
    with pytest.raises(BrokenImageError, match="floating-point"):
        load_image(tmp_path / "a.tif")
