"""A bundle that runs: images and texts in, what its task is for out. No PyTorch, no transformers.

Preprocessing, tokenising, beam search and answer ranking are the code that the compressed model was scored with.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps

from ..data.decode import BrokenImageError, load_image, to_rgb
from ..errors import RequestError
from ..models.pixels import Pixels, read_pixels
from ..runtime import operators, predict
from ..runtime.session import OnnxGraph, session
from . import limits
from .manifest import Manifest, parse_json
from .spec import check_spec
from .text import Texts
from .unpack import unpack


T = TypeVar("T")
Picture = Image.Image | np.ndarray | str | Path  # uint8 [height, width, 3], or a file
SAMPLES = 256  # numbers of a long output that are kept to be compared
DEFAULT = Pixels(224, None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))  # a bundle's own file says all of it


class Match(NamedTuple):
    """How well an image and a text go together.

    Attributes:
        similarity: cosine of the two embeddings.
        probability: that they match, by the head that reads both; None where the model has none.
    """

    similarity: float
    probability: float | None


class Label(NamedTuple):
    """A class of an image.

    Attributes:
        name: of the class.
        score: probability (classification), or cosine to the class's texts (zero-shot).
    """

    name: str
    score: float


class Bundle:
    """A bundle whose files lie in a folder; made by `open_bundle`.

    Methods take one image or text, or a list of them, and return one result or as many. What the bundle's task does not
    offer is refused.

    Args:
        folder: that `unpack` filled. It is no longer needed afterwards, on systems that let open files be removed.
        manifest: that `unpack` returned.
        graphs: names of the graphs to open; None = all.
        threads: CPU threads of one operator, None = as many as the process may use.

    Attributes:
        manifest: what the bundle says of itself.
        spec: its task.json.

    Raises:
        RequestError: a file is broken, or ONNX Runtime refuses a graph.
        MachineError: the graphs are packed and the operators for that are missing.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, graphs: Sequence[str] | None = None, threads: int | None = None
    ) -> None:
        self.manifest = manifest
        self.spec: dict[str, Any] = check_spec(parse_json((folder / "task.json").read_bytes(), "task.json"), manifest)
        self.pixels = read_pixels(folder, DEFAULT)
        if self.pixels.image_size != self.spec["image_size"]:
            raise RequestError("preprocessor_config.json and task.json of the bundle differ in the size of images")
        self._texts: Texts | None = None
        if self.spec["task"] != "classification":
            config = folder / "tokenizer_config.json"
            described = parse_json(config.read_bytes(), config.name) if config.is_file() else {}
            if not (folder / "tokenizer.json").is_file() or not isinstance(described, dict):
                raise RequestError("the bundle has no tokenizer: get it again")
            self._texts = Texts((folder / "tokenizer.json").read_bytes(), described, self.spec)
        if manifest["packed"]:
            operators.library()  # or says what is missing, and the way out
        there = {file.stem: file for file in sorted((folder / "graphs").glob("*.onnx"))}
        wanted = there if graphs is None else {name: there[name] for name in graphs if name in there}
        self.graphs: dict[str, Any] = {
            name: OnnxGraph(session(file, threads=threads), name) for name, file in wanted.items()
        }
        self._classes: dict[tuple[str, ...], np.ndarray] = {}

    @property
    def task(self) -> str:
        """Name of the task."""
        return str(self.spec["task"])

    def preprocess(self, images: Sequence[Picture]) -> np.ndarray:
        """Turn images into what the graphs read.

        Args:
            images: B images.

        Returns:
            np.ndarray: float32 [B, 3, side, side].
        """
        return self.pixels.images([open_picture(image) for image in images])

    def texts(self, texts: Sequence[str], first: str) -> dict[str, np.ndarray]:
        """Turn texts into what the graphs read.

        Args:
            texts: B texts of at most 10,000 characters.
            first: see `Texts.texts`.

        Returns:
            dict[str, np.ndarray]: input_ids and attention_mask, int64 [B, T].

        Raises:
            RequestError: the task reads no texts, or a text is too long.
        """
        if self._texts is None:
            raise RequestError(f"a bundle for {self.task} reads no texts")
        if any(len(text) > limits.MAX_TEXT for text in texts):
            raise RequestError(f"a text has more than {limits.MAX_TEXT:,} characters: shorten it")
        ids, mask = self._texts.texts(texts, first)
        return {"input_ids": ids, "attention_mask": mask}

    def embed_image(self, images: Picture | Sequence[Picture]) -> np.ndarray:
        """Embed images, of retrieval and zero-shot bundles.

        Args:
            images: one, or B.

        Returns:
            np.ndarray: unit vectors, [E] or [B, E].
        """
        given, single = _listed(images)
        self._needs("embed images", ("retrieval", "zero-shot"), ["image_encoder"])
        with _fitting():
            embeds = self.graphs["image_encoder"]({"pixel_values": self.preprocess(given)})["image_embeds"]
            return np.asarray(embeds[0] if single else embeds)

    def embed_text(self, texts: str | Sequence[str]) -> np.ndarray:
        """Embed texts, of retrieval and zero-shot bundles.

        Args:
            texts: one, or B.

        Returns:
            np.ndarray: unit vectors, [E] or [B, E].
        """
        given, single = _listed(texts)
        self._needs("embed texts", ("retrieval", "zero-shot"), ["text_encoder"])
        with _fitting():
            embeds = self.graphs["text_encoder"](self.texts(given, "cls"))["text_embeds"]
            return np.asarray(embeds[0] if single else embeds)

    def match(self, images: Picture | Sequence[Picture], texts: str | Sequence[str]) -> Any:
        """Tell how well images and texts go together, pair by pair; of retrieval bundles.

        Args:
            images: one, or B.
            texts: one, or B.

        Returns:
            Any: a `Match`, or B of them.

        Raises:
            RequestError: there are not as many texts as images.
        """
        given, single = _listed(images)
        lines = _as_many(texts, given)
        self._needs("match", ("retrieval",), ["image_encoder", "text_encoder"])
        with _fitting():
            outputs = self.graphs["image_encoder"]({"pixel_values": self.preprocess(given)})
            similarity = (outputs["image_embeds"] * self.embed_text(lines)).sum(1)
            probability: list[float | None] = [None] * len(given)
            if "itm" in self.graphs:
                feeds = {**self.texts(lines, "enc"), "image_states": outputs["image_states"]}
                probability = _softmax(self.graphs["itm"](feeds)["itm_logits"])[:, 1].tolist()
            return _given([Match(float(s), p) for s, p in zip(similarity, probability, strict=True)], single)

    def caption(self, images: Picture | Sequence[Picture]) -> Any:
        """Describe images; of captioning bundles.

        Args:
            images: one, or B.

        Returns:
            Any: a text, or B of them.
        """
        given, single = _listed(images)
        self._needs("caption", ("captioning",), ["image_encoder", self.spec.get("decoder", "")])
        with _fitting():
            return _given(predict.captions(self.graphs, self.spec, self._texts, self.preprocess(given)), single)

    def answer(self, images: Picture | Sequence[Picture], questions: str | Sequence[str]) -> Any:
        """Answer questions about images; of vqa bundles.

        Args:
            images: one, or B.
            questions: one, or B.

        Returns:
            Any: a text, or B of them.

        Raises:
            RequestError: there are not as many questions as images.
        """
        given, single = _listed(images)
        lines = _as_many(questions, given)
        names = ["image_encoder", "question_encoder", self.spec.get("decoder", "")]
        self._needs("answer questions", ("vqa",), names)
        self.texts(lines, "enc")  # refuses what is too long
        with _fitting():
            states = self.graphs["image_encoder"]({"pixel_values": self.preprocess(given)})["image_states"]
            return _given(predict.answers(self.graphs, self.spec, self._texts, states, lines), single)

    def classify(self, images: Picture | Sequence[Picture], top: int = 5, classes: Sequence[str] | None = None) -> Any:
        """Tell the likeliest classes of images; of classification and zero-shot bundles.

        Args:
            images: one, or B.
            top: how many classes.
            classes: names to choose from, zero-shot only; None = those of the bundle.

        Returns:
            Any: a list of `Label`, likeliest first, or B of them.

        Raises:
            RequestError: there are no classes, or others were given to a classifier.
        """
        given, single = _listed(images)
        self._needs("classify", ("classification", "zero-shot"), [])
        names = self.spec["labels"] if self.task == "classification" else self.spec["classes"]
        if classes is not None:
            if self.task == "classification":
                raise RequestError("a classification bundle knows its own classes only: leave the others out")
            names = list(classes)
        if not names:
            raise RequestError("the bundle names no classes: give some, as in cat and dog")
        with _fitting():
            scores = self._class_scores(given, tuple(names))
            best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
            rows = [
                [Label(names[i], float(row[i])) for i in order]
                for row, order in zip(scores, best.tolist(), strict=True)
            ]
        return _given(rows, single)

    def judge(self, left: Picture, right: Picture, sentence: str) -> bool:
        """Tell whether a sentence is true of two images; of nlvr bundles.

        Args:
            left: an image.
            right: an image.
            sentence: about both.

        Returns:
            bool: it is true.
        """
        with _fitting():
            return bool(self._judge(left, right, sentence).argmax() == 1)

    def example(self, image: Picture, text: str) -> dict[str, Any]:
        """Compute what `verify` compares: a few numbers of every graph, and the task's own result.

        Args:
            image: any.
            text: a caption, a question or a sentence; tasks without texts ignore it.

        Returns:
            dict[str, Any]: lists of numbers and texts by name.
        """
        with _fitting():
            numbers = {name: _sampled(array) for name, array in self._outputs(image, text).items()}
        if self.task == "captioning":
            return {**numbers, "caption": self.caption(image)}
        return {**numbers, "answer": self.answer(image, text)} if self.task == "vqa" else numbers

    def _outputs(self, image: Picture, text: str) -> dict[str, np.ndarray]:
        if self.task == "nlvr":
            return {"logits": self._judge(image, image, text)}
        pixels = {"pixel_values": self.preprocess([image])}
        if self.task == "classification":
            return {"logits": self.graphs["image_classifier"](pixels)["logits"]}
        encoded = self.graphs["image_encoder"](pixels)
        if self.task == "captioning":
            return {"logits": self._first_logits(encoded, np.ones((1, encoded["cross_key.0"].shape[2]), np.int64))}
        if self.task == "vqa":
            feeds = {**self.texts([text], "enc"), "image_states": encoded["image_states"]}
            return {"logits": self._first_logits(self.graphs["question_encoder"](feeds), feeds["attention_mask"])}
        outputs = {"image_embeds": encoded["image_embeds"], "text_embeds": self.embed_text([text])}
        if "itm" in self.graphs:
            feeds = {**self.texts([text], "enc"), "image_states": encoded["image_states"]}
            outputs["itm_logits"] = self.graphs["itm"](feeds)["itm_logits"]
        return outputs

    def _first_logits(self, cross: Mapping[str, np.ndarray], mask: np.ndarray) -> np.ndarray:
        """Logits of the first word that the decoder may say."""
        start = self.spec["prompt_ids"] if self.task == "captioning" else [self.spec["dec_token_id"]]
        ids = np.array([start], np.int64)
        past = {
            f"past_{kind}.{layer}": np.zeros((1, heads, 0, width), np.float32)
            for layer, (heads, width) in enumerate(self.spec["past_shapes"])
            for kind in ("key", "value")
        }
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "cross_mask": mask, **cross, **past}
        return np.asarray(self.graphs[self.spec["decoder"]](feeds)["logits"][:, -1])

    def _judge(self, left: Picture, right: Picture, sentence: str) -> np.ndarray:
        self._needs("judge sentences", ("nlvr",), ["image_encoder", "pair_classifier"])
        states = self.graphs["image_encoder"]({"pixel_values": self.preprocess([left, right])})["image_states"]
        feeds = {**self.texts([sentence], "enc"), "image_states.0": states[:1], "image_states.1": states[1:]}
        return np.asarray(self.graphs["pair_classifier"](feeds)["logits"])

    def _class_scores(self, images: Sequence[Picture], names: tuple[str, ...]) -> np.ndarray:
        if self.task == "classification":
            self._needs("classify", (self.task,), ["image_classifier"])
            return _softmax(self.graphs["image_classifier"]({"pixel_values": self.preprocess(images)})["logits"])
        if names not in self._classes:
            self._needs("classify", (self.task,), ["text_encoder"])
            spec = {**self.spec, "classes": list(names)}
            self._classes = {names: predict.class_embeds(self.graphs, spec, self._texts)}
        return np.asarray(self.embed_image(images) @ self._classes[names].T)

    def _needs(self, what: str, tasks: Sequence[str], graphs: Sequence[str]) -> None:
        if self.task not in tasks:
            raise RequestError(f"a bundle for {self.task} cannot {what}: that takes one for {' or '.join(tasks)}")
        if missing := [name for name in graphs if name not in self.graphs]:
            raise RequestError(f"the graph {missing[0]} of the bundle was not opened, or it has none: open all graphs")


def open_bundle(
    path: Path | str,
    *,
    public_key: Path | str | None = None,
    graphs: Sequence[str] | None = None,
    threads: int | None = None,
) -> Bundle:
    """Check a bundle and open it.

    Its weights are rebuilt into a temporary folder (TMPDIR) that is gone before this returns: ONNX Runtime holds what
    it needs of them.

    Args:
        path: the file.
        public_key: of whom it must be signed by, a PEM file; None = by anybody or nobody.
        graphs: names of the graphs to open, to save memory where few are used; None = all.
        threads: CPU threads of one operator, None = as many as the process may use.

    Returns:
        Bundle: ready to run.

    Raises:
        RequestError: it is no intact bundle, or the signature is missing or wrong.
        MachineError: no space, or the bundle is packed and the operators for that are missing.
    """
    with tempfile.TemporaryDirectory(prefix="vlprune-") as folder:
        key = None if public_key is None else Path(public_key)
        manifest, _ = unpack(path, Path(folder), key)
        return Bundle(Path(folder), manifest, graphs, threads)


def open_picture(image: Picture) -> Image.Image:
    """Make an image upright and RGB, as the training side reads files.

    Args:
        image: a Pillow image, uint8 [height, width, 3], or a file.

    Returns:
        Image.Image: RGB.

    Raises:
        RequestError: it is none.
    """
    try:
        if isinstance(image, str | Path):
            return load_image(image)
        if isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        return to_rgb(ImageOps.exif_transpose(image))
    except BrokenImageError as error:
        raise RequestError(f"broken image {image} ({error}): replace it") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise RequestError(f"{type(image).__name__} is no image ({error}): give a file, or a Pillow image") from error


@contextmanager
def _fitting() -> Iterator[None]:
    """Graphs that give other outputs than their task has show as errors of these kinds."""
    try:
        yield
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())[:200]
        raise RequestError(
            f"the graphs of the bundle are not those of its task ({why}): get the bundle again"
        ) from error


def _listed(given: Any) -> tuple[list[Any], bool]:
    """Make a list of what may be one, and tell whether it was one."""
    single = isinstance(given, str | Path | Image.Image | np.ndarray)
    found = [given] if single else list(given)
    if not found:
        raise RequestError("nothing was given: give one image or text at least")
    return found, single


def _as_many(texts: str | Sequence[str], images: Sequence[Any]) -> list[str]:
    lines, _ = _listed(texts)
    if len(lines) != len(images):
        raise RequestError(f"{len(images)} images and {len(lines)} texts were given: give as many of both")
    return lines


def _given(found: list[T], single: bool) -> T | list[T]:
    return found[0] if single else found


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(-1, keepdims=True))


def _sampled(array: np.ndarray) -> list[float]:
    """Numbers all over an output."""
    flat = np.asarray(array, np.float64).ravel()
    return flat[np.linspace(0, len(flat) - 1, min(len(flat), SAMPLES)).astype(int)].tolist()
