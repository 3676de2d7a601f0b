"""What every reader returns: images opened on demand, with captions, questions and answers, classes, or in pairs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from PIL import Image

from vlprune.data.images import ImageFiles


@dataclass(frozen=True)
class CaptionData:
    """Images with captions, for calibration, retrieval and captioning.

    Attributes:
        name: short name of the data set, for reports.
        images: N images; indexing opens one as RGB.
        captions: per image, one or more captions that are true of it.
        reasons: why records were skipped -> how many; empty unless broken records are skipped.
    """

    name: str
    images: Sequence[Image.Image]
    captions: list[list[str]]
    reasons: dict[str, int] = field(default_factory=dict)

    holds: ClassVar[str] = "captions"

    @property
    def samples(self) -> int:
        """Number of images, which are scored one by one."""
        return len(self.captions)

    @property
    def skipped(self) -> int:
        """Number of records left out because they were broken."""
        return sum(self.reasons.values())

    def keep(self, indices: Sequence[int]) -> "CaptionData":
        """Keep some of the images, with their captions.

        Args:
            indices: the images to keep, in their new order.

        Returns:
            CaptionData: of these images.
        """
        captions = [self.captions[i] for i in indices]
        return replace(self, images=_subset(self.images, indices), captions=captions)


@dataclass(frozen=True)
class Question:
    """One question about one image.

    Attributes:
        image: index into the images of its data set.
        question: the question.
        answers: one answer per annotator (the official VQA score counts them), or a single one.
    """

    image: int
    question: str
    answers: list[str]


@dataclass(frozen=True)
class VqaData:
    """Images with questions and answers.

    Attributes:
        name: short name of the data set, for reports.
        images: N images; indexing opens one as RGB.
        questions: the questions, each naming its image by index.
        answer_list: the closed list of answers to rank, None when answers are to be generated.
        reasons: why records were skipped -> how many; empty unless broken records are skipped.
    """

    name: str
    images: Sequence[Image.Image]
    questions: list[Question]
    answer_list: list[str] | None
    reasons: dict[str, int] = field(default_factory=dict)

    holds: ClassVar[str] = "questions"

    @property
    def samples(self) -> int:
        """Number of questions, which are scored one by one."""
        return len(self.questions)

    @property
    def skipped(self) -> int:
        """Number of records left out because they were broken."""
        return sum(self.reasons.values())

    def keep(self, indices: Sequence[int]) -> "VqaData":
        """Keep some of the images, with the questions about them.

        Args:
            indices: the images to keep, in their new order.

        Returns:
            VqaData: of these images, which its questions name by their new index.
        """
        place = {old: new for new, old in enumerate(indices)}
        questions = [replace(q, image=place[q.image]) for q in self.questions if q.image in place]
        return replace(self, images=_subset(self.images, indices), questions=questions)


@dataclass(frozen=True)
class ClassData:
    """Images with one class each.

    Attributes:
        name: short name of the data set, for reports.
        images: N images; indexing opens one as RGB.
        labels: per image, the index of its class.
        classes: names of the classes, as a person says them.
        reasons: why records were skipped -> how many; empty unless broken records are skipped.
        templates: texts with "{}" where the name of a class goes, if the data set has its own.
    """

    name: str
    images: Sequence[Image.Image]
    labels: list[int]
    classes: list[str]
    reasons: dict[str, int] = field(default_factory=dict)
    templates: tuple[str, ...] = ()

    holds: ClassVar[str] = "classes"

    @property
    def samples(self) -> int:
        """Number of images, which are scored one by one."""
        return len(self.labels)

    @property
    def skipped(self) -> int:
        """Number of records left out because they were broken."""
        return sum(self.reasons.values())

    def keep(self, indices: Sequence[int]) -> "ClassData":
        """Keep some of the images; the classes stay, even those without an image.

        Args:
            indices: the images to keep, in their new order.

        Returns:
            ClassData: of these images.
        """
        return replace(self, images=_subset(self.images, indices), labels=[self.labels[i] for i in indices])


@dataclass(frozen=True)
class Pair:
    """One sentence about two images.

    Attributes:
        left: index of the first image among the images of its data set.
        right: of the second.
        sentence: says something about both.
        label: whether it is true.
    """

    left: int
    right: int
    sentence: str
    label: bool


@dataclass(frozen=True)
class NlvrData:
    """Pairs of images with a sentence each, true or false.

    Attributes:
        name: short name of the data set, for reports.
        images: N images; indexing opens one as RGB.
        pairs: the sentences, each naming its images by index.
        reasons: why records were skipped -> how many; empty unless broken records are skipped.
    """

    name: str
    images: Sequence[Image.Image]
    pairs: list[Pair]
    reasons: dict[str, int] = field(default_factory=dict)

    holds: ClassVar[str] = "pairs of images"

    @property
    def samples(self) -> int:
        """Number of sentences, which are scored one by one."""
        return len(self.pairs)

    @property
    def skipped(self) -> int:
        """Number of records left out because they were broken."""
        return sum(self.reasons.values())

    def keep(self, indices: Sequence[int]) -> "NlvrData":
        """Keep some of the images, with the sentences about two of them.

        Args:
            indices: the images to keep, in their new order.

        Returns:
            NlvrData: of these images, which its pairs name by their new index.
        """
        place = {old: new for new, old in enumerate(indices)}
        known = [pair for pair in self.pairs if {pair.left, pair.right} <= place.keys()]
        pairs = [replace(pair, left=place[pair.left], right=place[pair.right]) for pair in known]
        return replace(self, images=_subset(self.images, indices), pairs=pairs)


Data = CaptionData | VqaData | ClassData | NlvrData
KINDS: dict[str, type[Data]] = {  # what a task reads
    "retrieval": CaptionData,
    "captioning": CaptionData,
    "vqa": VqaData,
    "zero-shot": ClassData,
    "classification": ClassData,
    "nlvr": NlvrData,
}


def _subset(images: Sequence[Image.Image], indices: Sequence[int]) -> Sequence[Image.Image]:
    return images.subset(indices) if isinstance(images, ImageFiles) else [images[i] for i in indices]
