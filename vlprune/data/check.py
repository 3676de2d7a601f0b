"""The check that finds broken images before the work starts."""

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

from vlprune.data.images import BrokenImageError, ImageFiles, load_image
from vlprune.data.sets import Data
from vlprune.errors import RequestError
from vlprune.progress import track


D = TypeVar("D", bound=Data)


def check_images(data: D, skip_broken: bool = False) -> D:
    """Decode every image once, so that a broken one is found now and not in the middle of the work.

    Only decoding finds a truncated file. JPEGs are decoded at an eighth of their size (all bytes are still read), on as
    many threads as there are cores. Limit the data set to what will be used before checking it.

    Args:
        data: the data set.
        skip_broken: leave broken images out, with their captions and questions, and count them in `reasons`.

    Returns:
        D: the data set itself when nothing is broken, else one without the broken images.

    Raises:
        RequestError: an image is broken, or, when these are skipped, all are.
    """
    images = data.images
    if not isinstance(images, ImageFiles):
        return data  # drawn, not read

    good: list[int] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for i, why in enumerate(track(pool.map(_why_broken, images.paths), "Checking images", len(images))):
                if why is None:
                    good.append(i)
                elif not skip_broken:
                    raise images.error(i, why)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    if len(good) == len(images):
        return data
    if not good:
        raise RequestError(f"{images.source}: all {len(images)} images are broken: correct them")
    reasons = Counter(data.reasons) + Counter({"broken image": len(images) - len(good)})
    return cast(D, replace(data.keep(good), reasons=dict(reasons)))


def _why_broken(path: Path) -> str | None:
    try:
        load_image(path, thumbnail=True)
    except BrokenImageError as error:
        return str(error)
    return None
