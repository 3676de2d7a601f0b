"""The embedded data: drawn scenes of one to three coloured shapes, with captions, questions and answers, or classes.

A scene follows from (split, index) alone. Its canonical caption names every object and how they lie, so it determines
the scene up to jitter; a hash of that caption sends the scene to `train` or to `test`, hence no test scene, however it
is jittered, ever occurs in training. Within `test`, no caption is true of the image of another scene.

The classes are those of scenes with a single object: its colour and shape. Of the ten ways (size and place) in which a
class can look, two or more are for `test` alone: those of captions in `test`, as far as there are any.

Objects stand in the cells of a 4 x 4 grid, a little off centre: easier than photographs on purpose, so that a small
vision transformer whose patches are the cells learns them within half an hour on one core.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import combinations
from math import cos, pi, sin
from typing import overload
from zlib import crc32

import numpy as np
from PIL import Image, ImageDraw

from vlprune.data.sets import CaptionData, ClassData, Question, VqaData
from vlprune.errors import RequestError


SIZE = 64  # pixels, both sides of an image
COLORS = {
    "red": (215, 25, 30),
    "green": (25, 150, 50),
    "blue": (30, 60, 220),
    "yellow": (240, 215, 0),
    "purple": (140, 40, 170),
    "orange": (250, 125, 10),
    "black": (15, 15, 15),
    "cyan": (0, 200, 220),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "star")
SIZES = {"small": (8.5, 9.5), "large": (12.5, 13.5)}  # width and height in pixels
NUMBERS = ("one", "two", "three")
ANSWERS = (*COLORS, *SHAPES, *SIZES, *NUMBERS, "yes", "no")
CLASSES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
QUESTIONS_PER_SCENE = 3

# Where a single object may be -> (words, columns, rows of the grid); several objects form a row or a column.
_PLACES = {
    "left": ("on the left", (0,), (1, 2)),
    "right": ("on the right", (3,), (1, 2)),
    "top": ("at the top", (1, 2), (0,)),
    "bottom": ("at the bottom", (1, 2), (3,)),
    "middle": ("in the middle", (1, 2), (1, 2)),
}
TEMPLATES = tuple(f"a {size} {{}} alone {words}" for size in SIZES for words, _, _ in _PLACES.values())
_TEST_WAYS = 2  # of ten
_RELATIONS = {"row": ("left of", "right of"), "column": ("above", "below")}
_COUNT_WEIGHTS = (0.1, 0.7, 0.2)  # of scenes with one, two, three objects

_WORDS = """
    a an picture of only alone on in at the top bottom middle left right above below
    what how many is are there color shape size object objects ?
"""
VOCABULARY = (*_WORDS.split(), *ANSWERS)  # every word of captions, prompt, questions and answers

_SEED = 20240607
_SPLITS = ("train", "test")
_SCALE = 4  # drawn this much larger, then averaged down: smooth edges
_GRID, _CELL, _JITTER = 4, 16, 0.7  # cells per side, pixels per cell, how far a centre may lie off the cell's


@dataclass(frozen=True)
class Item:
    """One object of a scene: how it is called, and where it is drawn (centre and width in pixels)."""

    size: str
    color: str
    shape: str
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0

    def __str__(self) -> str:
        return f"{self.size} {self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One scene.

    Attributes:
        split: "train" or "test".
        index: its number in the split.
        layout: "row" or "column", or the place of a single object ("left", "right", "top", "bottom", "middle").
        items: one to three objects, from left to right in a row, from top to bottom in a column.
        background: RGB of the background.
    """

    split: str
    index: int
    layout: str
    items: tuple[Item, ...]
    background: tuple[int, int, int]

    @cached_property
    def captions(self) -> tuple[str, str]:
        """The canonical caption, and the same seen from the other end."""
        return _captions(self.layout, self.items)

    def draw(self) -> Image.Image:
        """Draw the scene.

        Returns:
            Image.Image: RGB, 64 x 64 pixels.
        """
        canvas = Image.new("RGB", (SIZE * _SCALE, SIZE * _SCALE), self.background)
        draw = ImageDraw.Draw(canvas)
        for item in self.items:
            _draw(draw, item)
        return canvas.reduce(_SCALE)

    def questions(self) -> list[tuple[str, str]]:
        """Ask about the scene, each question of another kind and with only one right answer.

        Returns:
            list[tuple[str, str]]: questions and their answers.
        """
        rng = np.random.default_rng([_SEED, _SPLITS.index(self.split), self.index, 1])
        kinds = [choices for ask in _QUESTIONS if (choices := list(ask(self, rng)))]
        some = [kinds[i] for i in rng.permutation(len(kinds))[:QUESTIONS_PER_SCENE]]
        return [choices[rng.integers(len(choices))] for choices in some]


def _captions(layout: str, items: Sequence[Item]) -> tuple[str, str]:
    if layout in _PLACES:
        place = _PLACES[layout][0]
        return f"a {items[0]} alone {place}", f"only a {items[0]} {place}"
    forward, backward = _RELATIONS[layout]
    names = [f"a {item}" for item in items]
    return f" {forward} ".join(names), f" {backward} ".join(reversed(names))


def _draw(draw: ImageDraw.ImageDraw, item: Item) -> None:
    x, y, half = item.x * _SCALE, item.y * _SCALE, item.width * _SCALE / 2
    if item.shape == "circle":
        draw.ellipse((x - half, y - half, x + half, y + half), fill=COLORS[item.color])
        return
    outline = [(x + half * u, y + half * v) for u, v in _OUTLINES[item.shape]]
    draw.polygon(outline, fill=COLORS[item.color])


def _star() -> list[tuple[float, float]]:
    radii = (1.08, 0.45)
    return [(radii[i % 2] * sin(i * pi / 5), -radii[i % 2] * cos(i * pi / 5)) for i in range(10)]


_ARM = 0.36
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.92, -0.92), (0.92, -0.92), (0.92, 0.92), (-0.92, 0.92)],
    "triangle": [(0, -1), (1, 0.95), (-1, 0.95)],
    "diamond": [(0, -1.05), (0.8, 0), (0, 1.05), (-0.8, 0)],
    "cross": [
        *((-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)),
        *((_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)),
    ],
    "star": _star(),
}


# Questions: each kind yields (question, answer) pairs that have exactly one right answer in the scene.


_Ask = Callable[["Scene", np.random.Generator], Iterator[tuple[str, str]]]


def _unique(scene: Scene, attribute: str) -> Iterator[Item]:
    values = [getattr(item, attribute) for item in scene.items]
    return (item for item, value in zip(scene.items, values, strict=True) if values.count(value) == 1)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _ask_color(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    return ((f"what color is the {item.shape}?", item.color) for item in _unique(scene, "shape"))


def _ask_shape(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    return ((f"what shape is the {item.color} object?", item.shape) for item in _unique(scene, "color"))


def _ask_size(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    return ((f"what size is the {item.shape}?", item.size) for item in _unique(scene, "shape"))


def _ask_count(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    yield "how many objects are there?", NUMBERS[len(scene.items) - 1]


def _ask_presence(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    item = scene.items[rng.integers(len(scene.items))]
    if rng.integers(2):
        yield f"is there {_article(item.color)} {item.color} {item.shape}?", "yes"
        return
    there = {(other.color, other.shape) for other in scene.items}
    # Half of what the absent object is called is true of a present one, so that both words must be looked at.
    absent = [(c, item.shape) for c in COLORS] if rng.integers(2) else [(item.color, s) for s in SHAPES]
    absent = [pair for pair in absent if pair not in there]
    color, shape = absent[rng.integers(len(absent))]
    yield f"is there {_article(color)} {color} {shape}?", "no"


def _ask_relation(scene: Scene, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    if len(scene.items) != 2:
        return
    first, second = scene.items
    forward, backward = _RELATIONS[scene.layout]
    for subject, relation, reference in ((first, forward, second), (second, backward, first)):
        yield f"what shape is {relation} the {reference.color} {reference.shape}?", subject.shape
        yield f"what color is the object {relation} the {reference.color} {reference.shape}?", subject.color


_QUESTIONS: tuple[_Ask, ...] = (_ask_color, _ask_shape, _ask_size, _ask_count, _ask_presence, _ask_relation)


# Making scenes.


def _describe(rng: np.random.Generator) -> tuple[str, tuple[Item, ...]]:
    """Draw what is in a scene and how it lies."""
    count = 1 + int(np.searchsorted(np.cumsum(_COUNT_WEIGHTS), rng.random(), side="right").clip(max=2))
    kinds: list[tuple[str, str]] = []
    while len(kinds) < count:
        kind = (tuple(COLORS)[rng.integers(len(COLORS))], SHAPES[rng.integers(len(SHAPES))])
        if kind not in kinds:
            kinds.append(kind)
    sizes = [tuple(SIZES)[rng.integers(2)] for _ in kinds]
    layouts = tuple(_PLACES) if count == 1 else tuple(_RELATIONS)
    items = tuple(Item(size, *kind) for size, kind in zip(sizes, kinds, strict=True))
    return layouts[rng.integers(len(layouts))], items


def _place(rng: np.random.Generator, layout: str, items: Sequence[Item]) -> tuple[Item, ...]:
    """Put each object into a cell of its own, in one row or column, and jitter sizes and places."""
    widths = [SIZES[item.size][0] + rng.random() * (SIZES[item.size][1] - SIZES[item.size][0]) for item in items]
    if layout in _PLACES:
        _, columns, rows = _PLACES[layout]
        cells = [(columns[rng.integers(len(columns))], rows[rng.integers(len(rows))])]
    else:
        lane = int(rng.integers(_GRID))
        along = sorted(rng.permutation(_GRID)[: len(items)].tolist())
        cells = [(place, lane) if layout == "row" else (lane, place) for place in along]
    jitter = _JITTER * (2 * rng.random((len(cells), 2)) - 1)
    spots = (np.array(cells) + 0.5) * _CELL + jitter
    return tuple(
        Item(item.size, item.color, item.shape, float(x), float(y), width)
        for item, (x, y), width in zip(items, spots, widths, strict=True)
    )


def _in_test(layout: str, items: Sequence[Item]) -> bool:
    return crc32(_captions(layout, items)[0].encode()) % 10 == 0


def _finish(split: str, index: int, rng: np.random.Generator, layout: str, items: Sequence[Item]) -> Scene:
    red, green, blue = (int(value) for value in rng.integers(228, 256, size=3))
    return Scene(split, index, layout, _place(rng, layout, items), (red, green, blue))


@lru_cache(maxsize=50_000)
def _train_scene(index: int) -> Scene:
    rng = np.random.default_rng([_SEED, 0, index])
    while True:
        layout, items = _describe(rng)
        if not _in_test(layout, items):
            return _finish("train", index, rng, layout, items)


class _TestScenes:
    """The test scenes in order; each is admitted only if it can be told from all before it by every caption."""

    def __init__(self) -> None:
        self.scenes: list[Scene] = []
        self.tried = 0
        self.captions: set[str] = set()  # canonical captions of the admitted scenes
        self.truths: set[str] = set()  # all canonical captions that are true of an admitted scene

    def __getitem__(self, index: int) -> Scene:
        while len(self.scenes) <= index:
            rng = np.random.default_rng([_SEED, 1, self.tried])
            self.tried += 1
            layout, items = _describe(rng)
            if not _in_test(layout, items):
                continue
            caption = _captions(layout, items)[0]
            truths = {caption}
            if layout in _RELATIONS:  # of three objects in a row, each two are in a row
                truths |= {_captions(layout, pair)[0] for pair in combinations(items, 2)}
            if caption not in self.truths and not truths & self.captions:
                self.captions.add(caption)
                self.truths |= truths
                self.scenes.append(_finish("test", len(self.scenes), rng, layout, items))
        return self.scenes[index]


_test_scenes = _TestScenes()


def scene(split: str, index: int) -> Scene:
    """Make one scene.

    Args:
        split: "train" (unlimited) or "test" (thousands).
        index: number of the scene in its split, from 0.

    Returns:
        Scene: always the same for the same arguments.

    Raises:
        RequestError: there is no such split.
    """
    if split not in _SPLITS:
        raise RequestError(f"the scenes have no split {split!r}: choose train or test")
    return _train_scene(index) if split == "train" else _test_scenes[index]


def single(split: str, index: int) -> Scene:
    """Make one scene of a single object; its class is `CLASSES[index % len(CLASSES)]`.

    Args:
        split: "train" or "test".
        index: number of the scene in its split, from 0.

    Returns:
        Scene: always the same for the same arguments.
    """
    rng = np.random.default_rng([_SEED, 2 + _SPLITS.index(split), index])
    ways = _ways(index % len(CLASSES))[split]
    layout, item = ways[rng.integers(len(ways))]
    return _finish(split, index, rng, layout, [item])


@lru_cache
def _ways(label: int) -> dict[str, list[tuple[str, Item]]]:
    """The ways a class can look, per split."""
    color, shape = CLASSES[label].split()
    ways = [(layout, Item(size, color, shape)) for layout in _PLACES for size in SIZES]
    ways.sort(key=lambda way: crc32(_captions(way[0], [way[1]])[0].encode()) % 10)  # 0 is a test caption, see _in_test
    tested = max(_TEST_WAYS, sum(_in_test(layout, [item]) for layout, item in ways))
    return {"train": ways[tested:], "test": ways[:tested]}


# A drawn image takes 12 kB: the cache holds at most 150 MB.
@lru_cache(maxsize=12_000)
def _image(split: str, index: int, alone: bool) -> Image.Image:
    return (single if alone else scene)(split, index).draw()


class SceneImages(Sequence[Image.Image]):
    """The images of the first `n` scenes of a split, drawn when asked for and kept while there is room.

    Args:
        split: "train" or "test".
        n: how many.
        alone: scenes of a single object (see `single`).
    """

    def __init__(self, split: str, n: int, alone: bool = False) -> None:
        self.split = split
        self.n = n
        self.alone = alone

    def __len__(self) -> int:
        return self.n

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.n))]
        return _image(self.split, range(self.n)[index], self.alone).copy()


def scenes_captions(split: str, n: int) -> CaptionData:
    """Give the first scenes of a split with their captions.

    Args:
        split: "train" or "test".
        n: number of scenes.

    Returns:
        CaptionData: two captions per image, the canonical one first.
    """
    captions = [list(scene(split, i).captions) for i in range(n)]
    return CaptionData("scenes", SceneImages(split, n), captions)


def scenes_vqa(split: str, n: int) -> VqaData:
    """Give the first questions on the scenes of a split, three per scene.

    Args:
        split: "train" or "test".
        n: number of questions.

    Returns:
        VqaData: questions with one answer each, and the closed list of answers.
    """
    scenes = -(-n // QUESTIONS_PER_SCENE)
    asked = [(i, *pair) for i in range(scenes) for pair in scene(split, i).questions()][:n]
    questions = [Question(i, question, [answer]) for i, question, answer in asked]
    return VqaData("scenes", SceneImages(split, scenes), questions, list(ANSWERS))


def scenes_classes(split: str, n: int) -> ClassData:
    """Give scenes of a single object, whose colour and shape is their class, in turns of all 48 classes.

    Args:
        split: "train" or "test".
        n: number of images.

    Returns:
        ClassData: its templates are captions of such scenes.
    """
    if split not in _SPLITS:
        raise RequestError(f"the scenes have no split {split!r}: choose train or test")
    labels = [i % len(CLASSES) for i in range(n)]
    return ClassData("scenes", SceneImages(split, n, alone=True), labels, list(CLASSES), templates=TEMPLATES)
