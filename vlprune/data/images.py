"""Image files opened as RGB."""

from collections.abc import Sequence
from pathlib import Path
from typing import overload

from PIL import Image

from vlprune.data.decode import FORMATS, MAX_PIXELS, BrokenImageError, load_image
from vlprune.data.records import one_line
from vlprune.errors import RequestError


__all__ = ["FORMATS", "MAX_PIXELS", "BrokenImageError", "ImageFiles", "load_image"]


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
