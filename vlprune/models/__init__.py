"""Models by name: one file per family; this registry imports no torch until a model is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from vlprune.names import METHODS


if TYPE_CHECKING:
    from vlprune.models.family import Model


@dataclass(frozen=True)
class FamilyInfo:
    """What a family reads and offers.

    Attributes:
        model_types: transformers' names of the architectures, as in "model_type" of config.json.
        tasks: what its models may offer; a checkpoint may offer less.
        summary: one line.
    """

    model_types: tuple[str, ...]
    tasks: tuple[str, ...]
    summary: str


@dataclass(frozen=True)
class ModelInfo:
    """What `vlprune models` shows of an alias.

    Attributes:
        family: file of `vlprune.models` that handles it.
        kind: "embedded" (in the package), "random" (seeded weights), "original" (the authors' .pth), "hub".
        checkpoint: where the weights come from.
        tasks: what it offers.
        summary: one line.
    """

    family: str
    kind: str
    checkpoint: str
    tasks: tuple[str, ...]
    summary: str


_PUBLISHED = "https://storage.googleapis.com/sfr-vision-language-research/BLIP/models/"
_ALL = ("retrieval", "captioning", "vqa")
_DUAL = ("retrieval", "zero-shot")
_CLASSES = ("classification",)

FAMILIES = {
    "blip": FamilyInfo(("blip",), _ALL, "vision encoder, text encoder and text decoder"),
    "blip_nlvr": FamilyInfo(
        (), ("nlvr",), "BLIP that reads two images: its checkpoints, or any BLIP's, to be fine-tuned"
    ),
    "clip": FamilyInfo(("clip",), _DUAL, "two encoders, softmax over the batch: OpenAI's, LAION's, any CLIPModel"),
    "siglip": FamilyInfo(("siglip",), _DUAL, "two encoders, a sigmoid per pair: any SiglipModel"),
    "vit": FamilyInfo(("vit", "deit", "dinov2"), _CLASSES, "one vision encoder with a classifier"),
}

MODELS = {
    "blip-tiny": ModelInfo("blip", "embedded", "in the package", _ALL, "a small BLIP trained on drawn scenes"),
    "blip-base-random": ModelInfo(
        "blip", "random", "seeded random weights", _ALL, "BLIP-base shapes, for speed and memory work only"
    ),
    "blip": ModelInfo(
        "blip", "original", _PUBLISHED + "model_base.pth", _ALL, "BLIP-base pretrained on 129M pairs, task-agnostic"
    ),
    "blip-14m": ModelInfo(
        "blip", "original", _PUBLISHED + "model_base_14M.pth", _ALL, "BLIP-base pretrained on 14M pairs, task-agnostic"
    ),
    "blip-captioning": ModelInfo(
        "blip", "hub", "Salesforce/blip-image-captioning-base", ("captioning",), "fine-tuned on COCO captions"
    ),
    "blip-itm": ModelInfo(
        "blip", "hub", "Salesforce/blip-itm-base-coco", ("retrieval",), "fine-tuned for retrieval on COCO"
    ),
    "blip-vqa": ModelInfo("blip", "hub", "Salesforce/blip-vqa-base", ("vqa",), "fine-tuned on VQA v2"),
    "blip-nlvr": ModelInfo(
        "blip_nlvr", "original", _PUBLISHED + "model_base_nlvr.pth", ("nlvr",), "fine-tuned on NLVR2"
    ),
    "clip-tiny": ModelInfo("clip", "embedded", "in the package", _DUAL, "a small CLIP trained on drawn scenes"),
    "clip-base-random": ModelInfo(
        "clip", "random", "seeded random weights", _DUAL, "CLIP ViT-B/16 shapes, for speed and memory work only"
    ),
    "clip-large-random": ModelInfo(
        "clip", "random", "seeded random weights", _DUAL, "CLIP ViT-L/14 shapes, for speed and memory work only"
    ),
    "clip": ModelInfo("clip", "hub", "openai/clip-vit-base-patch16", _DUAL, "CLIP ViT-B/16 of OpenAI"),
    "clip-vit-l-14": ModelInfo("clip", "hub", "openai/clip-vit-large-patch14", _DUAL, "CLIP ViT-L/14 of OpenAI"),
    "siglip": ModelInfo("siglip", "hub", "google/siglip-base-patch16-224", _DUAL, "SigLIP base of Google"),
    "vit": ModelInfo("vit", "hub", "google/vit-base-patch16-224", _CLASSES, "ViT-B/16 fine-tuned on ImageNet-1k"),
    "deit": ModelInfo("vit", "hub", "facebook/deit-small-patch16-224", _CLASSES, "DeiT-S/16 trained on ImageNet-1k"),
    "dino": ModelInfo(
        "vit", "hub", "facebook/dinov2-small-imagenet1k-1-layer", _CLASSES, "DINOv2 ViT-S/14, linear ImageNet-1k head"
    ),
}


def names() -> tuple[str, ...]:
    """List the aliases.

    Returns:
        tuple[str, ...]: in the order of `vlprune models`.
    """
    return tuple(MODELS)


def describe() -> list[dict[str, Any]]:
    """Describe the aliases for `vlprune models`.

    Returns:
        list[dict[str, Any]]: one entry per alias: `name` and the fields of `ModelInfo`.
    """
    return [{"name": name, **asdict(info)} for name, info in MODELS.items()]


def families() -> list[dict[str, Any]]:
    """Describe the families for `vlprune models`.

    Returns:
        list[dict[str, Any]]: one entry per family: `name`, the fields of `FamilyInfo`, and the `methods` that prune it.
    """
    found = []
    for name, info in FAMILIES.items():
        # mope finds out what a removal costs in retrieval
        methods = [method for method in METHODS if method != "mope" or "retrieval" in info.tasks]
        found.append({"name": name, **asdict(info), "methods": methods})
    return found


def load(model: str, *, family: str | None = None, image_size: int | None = None, seed: int = 0) -> Model:
    """Load a model.

    Args:
        model: alias, Hugging Face folder, original `.pth` file, or hub id.
        family: needed for what does not tell its family itself (`.pth` files).
        image_size: side of the input image in pixels; position embeddings are interpolated. None = the checkpoint's.
        seed: of random weights.

    Returns:
        Model: on the CPU, float32, eval mode.

    Raises:
        RequestError: the model is unknown or its files are broken.
        MachineError: it must be downloaded and there is no network.
    """
    from vlprune.models import loading

    return loading.load(model, family=family, image_size=image_size, seed=seed)
