"""Reader of images sorted into folders, one per class: the layout of ImageNet and of most data sets for classification.

    DIR/train/<class>/*.jpg    DIR/test/<class>/*.jpg (or val)     both splits
    DIR/<class>/*.jpg                                              one split, to be scored or calibrated on

Classes are numbered in the order of their folders' names. `DIR/classes.txt` (a name per line) or `DIR/classes.json` (a
list in that order, or {folder: name}) tells their readable names, `DIR/templates.txt` the texts a zero-shot classifier
puts them into ("a photo of a {}."), one per line. Hidden files, and files that are not called images, are ignored.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from reprlib import repr as short

from vlprune.data.images import ImageFiles
from vlprune.data.records import BrokenRecordError, ImageFinder, MissingSplitError, one_line, skipped_text, text
from vlprune.data.sets import ClassData
from vlprune.errors import RequestError
from vlprune.files import read_json


SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
# The first that fits.
_FOLDERS = {"train": ("train", "training"), "test": ("test", "val", "valid", "validation", "dev")}


def find_splits(folder: Path) -> dict[str, Path]:
    """Tell where the splits of a data set are.

    A folder named like a split is one if it has class folders in it: ImageNet's `test`, without classes, is passed over
    for its `val`, and a class may be called "train".

    Args:
        folder: the data set.

    Returns:
        dict[str, Path]: folder of the split "train" and of "test", as far as they are there; {} = class folders only.
    """
    found = {}
    for split, names in _FOLDERS.items():
        for path in (folder / name for name in names):
            if path.is_dir() and _folders(path):
                found[split] = path
                break
    return found


def read_classes(folder: Path, split: str | None, skip_broken: bool = False) -> ClassData:
    """Read one split of a data set.

    Args:
        folder: see the module.
        split: "train" or "test"; None = train, or whatever there is, images without class folders too: to calibrate.
        skip_broken: leave broken images, empty classes, and test classes unknown in train out, and count them.

    Returns:
        ClassData: its images exist but have not been decoded; they stand in turns, one of each class after the other,
            so that the first ones are of all classes.

    Raises:
        RequestError: the split is not there, has no images, or a class of it is empty or unknown in train.
    """
    name = folder.resolve().name
    splits = find_splits(folder)
    if splits:
        wanted = split or ("train" if "train" in splits else "test")
        if wanted not in splits:
            raise MissingSplitError(
                f"{folder} has no {wanted}/<class>/ folders beside {next(iter(splits.values())).name}/: "
                f"put the images of the {wanted} split there"
            )
        return read_pair(splits.get("train"), splits[wanted], folder, name, skip_broken)
    if not _folders(folder) and split is None:
        paths, reasons = _images(folder, list(_files(folder)), skip_broken)
        return ClassData(name, ImageFiles(folder, paths), [0] * len(paths), [name], reasons)
    if split == "train":
        raise MissingSplitError(
            f"{folder} has one split only, to score on: pass --finetune none, or put images to train on into "
            "train/<class>/ there, the others into test/<class>/"
        )
    return read_pair(None, folder, folder, name, skip_broken)


def read_pair(train: Path | None, folder: Path, home: Path, name: str, skip_broken: bool = False) -> ClassData:
    """Read the images of one folder, with the classes of another.

    Args:
        train: folder of the split that tells the classes; None = `folder`.
        folder: of the split to read.
        home: where the readable names are.
        name: of the data set.
        skip_broken: see `read_classes`.

    Returns:
        ClassData: see `read_classes`.

    Raises:
        RequestError: see `read_classes`.
    """
    there = _folders(folder)
    known = _folders(train) if train else there
    if not known:
        raise RequestError(f"{train or folder} has no folders of classes: put the images into one folder per class")
    reasons: Counter[str] = Counter()
    found: list[tuple[int, int, Path]] = []  # place in its class, class, image
    for one in there:
        files = [f"{one}/{path}" for path in _files(folder / one)]
        try:
            if one not in known:
                raise BrokenRecordError("unknown class", f"{short(one)} is in {folder.name} but not in {train}")
            if not files:
                raise BrokenRecordError("empty class", f"{folder / one} has no images ({', '.join(SUFFIXES[:3])}, ...)")
        except BrokenRecordError as error:
            if not skip_broken:
                raise RequestError(one_line(f"{folder}: {error}: correct it, or pass --skip-broken")) from None
            reasons[error.reason] += max(1, len(files)) if one not in known else 1
            continue
        paths, why = _images(folder, files, skip_broken)
        reasons.update(why)
        found += [(place, known.index(one), path) for place, path in enumerate(paths)]
    if not found:
        raise RequestError(f"{folder} has no usable image ({skipped_text(dict(reasons))}): correct it")
    found.sort()
    images = ImageFiles(folder, [path for _, _, path in found])
    classes = _names(home, known)
    return ClassData(name, images, [label for _, label, _ in found], classes, dict(reasons), _templates(home))


def match_labels(labels: Sequence[str], data: ClassData) -> list[int]:
    """Find the labels of a model that the classes of a data set stand for.

    They match by name (without regard to case; one of a label's names, where commas separate several, is enough). Where
    no name says otherwise, as many classes as there are labels stand in the labels' order: that of the folders' names,
    by which models are trained.

    Args:
        labels: what the model tells apart.
        data: the data set.

    Returns:
        list[int]: per class of the data, the index of its label.

    Raises:
        RequestError: a class is no label of the model.
    """
    wanted, given = [_plain(label) for label in labels], [_plain(name) for name in data.classes]
    if wanted == given:
        return list(range(len(wanted)))
    places: dict[str, set[int]] = {}
    for place, label in enumerate(wanted):
        for name in {label, *(part.strip() for part in label.split(","))}:
            places.setdefault(name, set()).add(place)
    matches = [next(iter(places[name])) if len(places.get(name, ())) == 1 else None for name in given]
    known = [match for match in matches if match is not None]
    if len(known) == len(given) == len(set(known)):
        return known
    if len(given) == len(wanted) and all(match in (None, place) for place, match in enumerate(matches)):
        return list(range(len(wanted)))
    stranger = data.classes[matches.index(None)] if None in matches else data.classes[0]
    raise RequestError(
        one_line(
            f"{data.name} has {len(given)} classes, the model {len(wanted)} labels, and {short(stranger)} is none of "
            f"them ({', '.join(labels[:3])}, ...): name the classes like the labels in classes.txt"
        )
    )


def _plain(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


def _folders(folder: Path) -> list[str]:
    """Names of the visible folders in a folder, sorted."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise RequestError(f"cannot read the folder {folder} ({error.strerror}): check the path") from error


def _files(folder: Path) -> Iterator[str]:
    """Paths of the images in a folder and the folders in it, relative to it, sorted."""
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inner = os.path.relpath(path, folder)
        for name in sorted(files):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield name if inner == "." else f"{inner}/{name}"


def _images(folder: Path, names: Sequence[str], skip_broken: bool) -> tuple[list[Path], dict[str, int]]:
    """Look for the images of a folder: links may lead nowhere, or out of it."""
    find = ImageFinder(folder)
    reasons: Counter[str] = Counter()
    paths = []
    for name in names:
        try:
            paths.append(find(name)[1])
        except BrokenRecordError as error:
            if not skip_broken:
                raise RequestError(f"{folder}: {error}: correct it, or pass --skip-broken") from None
            reasons[error.reason] += 1
    return paths, dict(reasons)


def _names(home: Path, folders: list[str]) -> list[str]:
    """Readable names of the classes, the folders' own where nobody tells others."""
    lines, listed = home / "classes.txt", home / "classes.json"
    if lines.is_file():
        return _listed(lines, _lines(lines), folders)
    if not listed.is_file():
        return [folder.replace("_", " ") for folder in folders]
    content = read_json(listed)
    if isinstance(content, dict):
        if missing := [folder for folder in folders if folder not in content]:
            raise RequestError(one_line(f"{listed} does not name the class {short(missing[0])}: add it"))
        content = [content[folder] for folder in folders]
    if not isinstance(content, list):
        raise RequestError(f"{listed} holds {short(content)}: give a list of names, or names by folder")
    return _listed(listed, content, folders)


def _listed(path: Path, given: Sequence[object], folders: list[str]) -> list[str]:
    if len(given) != len(folders):
        raise RequestError(
            f"{path} has {len(given)} names for {len(folders)} class folders: give one each, in their order"
        )
    return [_text(path, number, name, "name") for number, name in enumerate(given, start=1)]


def _templates(home: Path) -> tuple[str, ...]:
    path = home / "templates.txt"
    if not path.is_file():
        return ()
    found = tuple(_text(path, number, line, "template") for number, line in enumerate(_lines(path), start=1))
    for template in found:
        if template.count("{}") != 1:
            raise RequestError(one_line(f"{path}: {short(template)} must hold {{}} once, for the name of the class"))
    if not found:
        raise RequestError(f"{path} is empty: give one template per line, as in: a photo of a {{}}.")
    return found


def _text(path: Path, number: int, value: object, what: str) -> str:
    try:
        return text(value, what)
    except BrokenRecordError as error:
        raise RequestError(f"{path}, {what} {number}: {error}: correct it") from None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").rstrip("\n").split("\n") if path.stat().st_size else []
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {path} ({getattr(error, 'strerror', None) or 'not UTF-8 text'})") from error
