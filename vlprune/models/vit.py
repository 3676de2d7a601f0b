"""Vision transformers that classify images: ViT, DeiT (one or two heads) and DINOv2, on transformers' modules.

Parameter names are Hugging Face's. The attention is our own, since structured pruning changes how many heads there are
and how wide they are.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import DeiTConfig, DeiTModel, Dinov2Config, Dinov2Model, PretrainedConfig, ViTConfig, ViTModel
from transformers.models.vit.modeling_vit import ViTSelfAttention

from vlprune.errors import RequestError
from vlprune.files import read_json, write_json
from vlprune.models import states
from vlprune.models.attention import attend
from vlprune.models.family import Batch, Group, PrunableLayer, Source, Tower, Valid
from vlprune.models.pixels import Pixels, read_pixels
from vlprune.models.states import check_tower, fill, on_meta, resize_positions
from vlprune.structured.surgery import sizes


BACKBONE = ("stage_names", "out_features", "out_indices")  # of configurations: names of layers, for other uses
MAX_LABELS = 1 << 20
LABEL_SMOOTHING = 0.1  # DeiT's (Touvron et al., ICML 2021, table 9)


@dataclass(frozen=True)
class Kind:
    """One of the architectures, which differ in what stands around the same layers.

    Attributes:
        config: transformers' configuration.
        model: transformers' model without a head.
        first: tokens before the patches'.
        ffn: paths, in a layer, of the feed-forward network and of its two Linears.
        heads: the modules of the head -> transformers' class of such a model.
        processor: transformers' image processor of such models.
    """

    config: type[PretrainedConfig]
    model: type[nn.Module]
    first: tuple[str, ...]
    ffn: tuple[str, str, str]
    heads: Mapping[tuple[str, ...], str]
    processor: str


_FFN = ("intermediate", "intermediate.dense", "output.dense")
_TEACHER = ("cls_classifier", "distillation_classifier")
KINDS = {  # by transformers' model type, which is also the first word of the parameters' names
    "vit": Kind(
        ViTConfig,
        ViTModel,
        ("cls_token",),
        _FFN,
        {("classifier",): "ViTForImageClassification"},
        "ViTImageProcessor",
    ),
    "deit": Kind(
        DeiTConfig,
        DeiTModel,
        ("cls_token", "distillation_token"),
        _FFN,
        {("classifier",): "DeiTForImageClassification", _TEACHER: "DeiTForImageClassificationWithTeacher"},
        "DeiTImageProcessor",
    ),
    "dinov2": Kind(
        Dinov2Config,
        Dinov2Model,
        ("cls_token",),
        ("mlp", "mlp.fc1", "mlp.fc2"),
        {("classifier",): "Dinov2ForImageClassification"},
        "BitImageProcessor",
    ),
}
_HALF = (0.5, 0.5, 0.5)
# What transformers' image processors do where a file says nothing.
_PROCESSORS = {
    "ViT": Pixels(224, None, _HALF, _HALF, 2),
    "DeiT": Pixels(224, 256, _HALF, _HALF, 3, square=True),
    "Bit": Pixels(224, 224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), 3),
}


class ImageProcessor:
    """Turns images into model inputs.

    Args:
        pixels: how.
    """

    family = "vit"

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels

    @property
    def image_size(self) -> int:
        """Side of the square input image in pixels."""
        return self.pixels.image_size

    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """See `Pixels.images`.

        Args:
            images: images of any size.

        Returns:
            np.ndarray: float32 [B, 3, image_size, image_size].
        """
        return self.pixels.images(images)

    def resize(self, images: Sequence[Image.Image]) -> np.ndarray:
        """See `Pixels.resize`.

        Args:
            images: images of any size.

        Returns:
            np.ndarray: uint8 [B, image_size, image_size, 3].
        """
        return self.pixels.resize(images)

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """See `Pixels.normalise`.

        Args:
            pixels: uint8 [B, image_size, image_size, 3].

        Returns:
            np.ndarray: float32 [B, 3, image_size, image_size].
        """
        return self.pixels.normalise(pixels)

    def save(self, folder: Path | str) -> None:
        """Write `preprocessor_config.json`, which the image processor of transformers that does the same reads.

        Args:
            folder: an existing folder.
        """
        crops = self.pixels.edge is not None
        name = ("DeiT" if self.pixels.square else "Bit") if crops else "ViT"
        settings = {"image_processor_type": f"{name}ImageProcessor", **self.pixels.settings()}
        write_json(Path(folder) / "preprocessor_config.json", settings)


def read_processor(folder: Path, model_type: str) -> ImageProcessor:
    """Read a folder's `preprocessor_config.json`.

    Args:
        folder: a Hugging Face folder.
        model_type: a name of `KINDS`; tells the image processor where the file does not, as in transformers.

    Returns:
        ImageProcessor: at the size of the file.

    Raises:
        RequestError: the file is missing, or asks for steps this preprocessing does not do.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        raise RequestError(f"{folder} has no preprocessor_config.json: without it nobody knows which pixels it reads")
    config = read_json(path)
    named = config if isinstance(config, dict) else {}
    given = named.get("image_processor_type", named.get("feature_extractor_type", KINDS[model_type].processor))
    name = str(given).removesuffix("Fast").removesuffix("ImageProcessor").removesuffix("FeatureExtractor")
    if name not in _PROCESSORS:
        known = ", ".join(f"{name}ImageProcessor" for name in _PROCESSORS)
        raise RequestError(f"{path} names the image processor {given!r:.80}: supported are {known}")
    return ImageProcessor(read_pixels(folder, _PROCESSORS[name]))


class Attention(ViTSelfAttention):
    """Self-attention whose head count and width are its own attributes; DeiT's and DINOv2's have the same parts."""

    def forward(self, hidden_states: Tensor, head_mask: None = None) -> tuple[Tensor, None]:
        """Attend.

        Args:
            hidden_states: [B, P, D].
            head_mask: not used.

        Returns:
            tuple[Tensor, None]: [B, P, H * K], and None in place of attention maps.
        """
        query, key, value = (
            linear(hidden_states).unflatten(2, (self.num_attention_heads, self.attention_head_size)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        return attend(query, key, value, self.scaling, None), None

    def set_units(self, shape: tuple[int, ...]) -> None:
        """Tell how many heads of what width are left; the scale of the scores stays that of the original width.

        Args:
            shape: (H, K).
        """
        self.num_attention_heads, self.attention_head_size = shape
        self.all_head_size = shape[0] * shape[1]


class Vit(nn.Module):
    """A vision transformer with its classifier.

    Args:
        config: sizes and labels.
        heads: names of the modules of the head, one of those its `Kind` knows.
        processor: image preprocessing.
        source: where the weights come from.

    Attributes:
        labels: names of the classes, in the order of the logits.
        options: see `vlprune.models.family.Model`.
    """

    family = "vit"
    tasks: tuple[str, ...] = ("classification",)

    def __init__(self, config: Any, heads: tuple[str, ...], processor: ImageProcessor, source: Source) -> None:
        super().__init__()
        self.options: dict[str, dict[str, Any]] = {}
        self.config = config
        self.processor = processor
        self.source = source
        self.kind = KINDS[config.model_type]
        self.heads = heads
        self.labels = [str(config.id2label[i]) for i in range(config.num_labels)]
        pooled = {} if self.kind.model is Dinov2Model else {"add_pooling_layer": False}
        setattr(self, config.model_type, self.kind.model(config, **pooled))
        for layer in self.backbone.encoder.layer:
            layer.attention.attention = Attention(config)
        width = config.hidden_size * (2 if self.kind.model is Dinov2Model else 1)
        for head in heads:
            setattr(self, head, nn.Linear(width, config.num_labels))

    @property
    def backbone(self) -> Any:
        """All but the head."""
        return getattr(self, self.config.model_type)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.backbone.layernorm.weight.device

    # --- pruning ---------------------------------------------------------------------------------------------------

    def _each(self) -> list[tuple[str, Any]]:
        """List the layers with their paths."""
        stack = f"{self.config.model_type}.encoder.layer"
        return [(f"{stack}.{i}", layer) for i, layer in enumerate(self.backbone.encoder.layer)]

    def _ffn(self) -> tuple[str, str, str]:
        gated = getattr(self.config, "use_swiglu_ffn", False)
        return ("mlp", "mlp.weights_in", "mlp.weights_out") if gated else self.kind.ffn

    def layers(self) -> list[PrunableLayer]:
        """List the prunable weights: every Linear but the classifier (METHODS: MULTIFLOW, DINO).

        Returns:
            list[PrunableLayer]: in order of execution, all of modality "vision".
        """
        attention = tuple(f"attention.attention.{name}" for name in ("query", "key", "value"))
        found = []
        for prefix, layer in self._each():
            for path in (*attention, "attention.output.dense", *self._ffn()[1:]):
                name = f"{prefix}.{path}"
                found.append(PrunableLayer(name, (name,), "vision", (layer.get_submodule(path),), "vision"))
        return found

    def groups(self) -> list[Group]:
        """List the units that structured pruning may remove: dimensions of heads, hidden neurons.

        Returns:
            list[Group]: in order of execution.
        """
        found = []
        block, first, second = self._ffn()
        for index, (prefix, layer) in enumerate(self._each()):
            attention, output = layer.attention.attention, (layer.attention.output.dense,)
            name = f"{prefix}.attention.attention"
            inner = tuple((linear, 0) for linear in (attention.query, attention.key, attention.value))
            shape: tuple[int, ...] = (attention.num_attention_heads, attention.attention_head_size)
            modules: tuple[nn.Module, ...] = (attention,)
            found.append(Group(name, (name,), "attention", "vision", "vision", index, modules, inner, output, shape))
            name, modules = f"{prefix}.{block}", (layer.get_submodule(block),)
            rows, columns = layer.get_submodule(first), layer.get_submodule(second)
            shape = (columns.in_features,)
            inner = tuple((rows, part) for part in range(rows.out_features // columns.in_features))  # 2 = gated
            found.append(Group(name, (name,), "ffn", "vision", "vision", index, modules, inner, (columns,), shape))
        return found

    def towers(self) -> list[Tower]:
        """List the stacks of layers that structured pruning may shorten.

        Returns:
            list[Tower]: the one there is.
        """
        stack = f"{self.config.model_type}.encoder.layer"
        return [Tower("vision", "vision", (stack,), len(self.backbone.encoder.layer))]

    def calibrate(self, batch: Batch, valid: Valid) -> None:
        """Run one calibration batch; all rows are tokens.

        Args:
            batch: made by `class_batch`; its labels are not looked at.
            valid: `InputNorms.valid`.
        """
        with valid():
            self.states(batch["pixel_values"])

    # --- forward ---------------------------------------------------------------------------------------------------

    def states(self, pixel_values: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixel_values: [B, 3, height, width].

        Returns:
            Tensor: [B, P, D], the [CLS] token first.
        """
        embeddings = self.backbone.embeddings
        patches = embeddings.patch_embeddings.projection(pixel_values).flatten(2).transpose(1, 2)
        first = [getattr(embeddings, name).expand(patches.shape[0], -1, -1) for name in self.kind.first]
        x = embeddings.dropout(torch.cat([*first, patches], dim=1) + embeddings.position_embeddings)
        for layer in self.backbone.encoder.layer:
            x = layer(x)
        return self.backbone.layernorm(x)

    def logits(self, pixel_values: Tensor) -> Tensor:
        """Classify images.

        Args:
            pixel_values: [B, 3, height, width].

        Returns:
            Tensor: [B, classes]; of two heads the mean.
        """
        x = self.states(pixel_values)
        if self.kind.model is Dinov2Model:
            pooled = [torch.cat([x[:, 0], x[:, 1:].mean(dim=1)], dim=1)]
        else:
            pooled = [x[:, place] for place in range(len(self.heads))]
        found = [getattr(self, head)(token) for head, token in zip(self.heads, pooled, strict=True)]
        return found[0] if len(found) == 1 else (found[0] + found[1]) / 2

    def loss(self, task: str, batch: Batch) -> Tensor:
        """The fine-tuning loss: cross entropy with smoothed labels.

        Args:
            task: "classification".
            batch: made by `class_batch`.

        Returns:
            Tensor: a scalar.
        """
        return F.cross_entropy(self.logits(batch["pixel_values"]), batch["labels"], label_smoothing=LABEL_SMOOTHING)

    def class_batch(self, images: Sequence[Image.Image] | np.ndarray, labels: Sequence[int]) -> Batch:
        """Make the batch for calibration and classification.

        Args:
            images: B images, or float32 pixel values [B, 3, height, width].
            labels: their classes, as indices of `labels`.

        Returns:
            Batch: tensors on the model's device.
        """
        array = images if isinstance(images, np.ndarray) else self.processor.images(images)
        batch = {"pixel_values": torch.from_numpy(array), "labels": torch.tensor(list(labels), dtype=torch.int64)}
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    # --- tasks and files -------------------------------------------------------------------------------------------

    def head_parameters(self, task: str) -> list[nn.Parameter]:
        """Parameters that `--finetune heads` trains: the classifier's.

        Args:
            task: "classification".

        Returns:
            list[nn.Parameter]: unique parameters.
        """
        return [parameter for head in self.heads for parameter in getattr(self, head).parameters()]

    def for_task(self, task: str) -> Vit:
        """Copy the model.

        Args:
            task: "classification".

        Returns:
            Vit: an independent model.

        Raises:
            RequestError: another task.
        """
        if task not in self.tasks:
            raise RequestError(f"{self.source.name} cannot do {task}: it offers {', '.join(self.tasks)}")
        return copy.deepcopy(self)

    def save(self, folder: Path | str, dtype: torch.dtype | None = None) -> None:
        """Write config, weights and preprocessing in Hugging Face format; transformers' own class reads it, too.

        Args:
            folder: an existing folder.
            dtype: store weights in this type; None = as they are.
        """
        folder = Path(folder)
        state = {
            name: tensor.detach().to("cpu", dtype or tensor.dtype).clone().contiguous()
            for name, tensor in self.state_dict().items()
        }
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        config = self.config.to_diff_dict()
        for key in BACKBONE:
            config.pop(key, None)
        config["architectures"] = [self.kind.heads[self.heads]]
        config["vlprune"] = {
            "name": self.source.name,
            "random_weights": self.source.random_weights,
            "options": self.options,
        }
        if smaller := sizes(self):
            config["vlprune"]["sizes"] = smaller
        write_json(folder / "config.json", config)
        self.processor.save(folder)


def from_folder(
    folder: Path,
    raw: Mapping[str, Any],
    state: Mapping[str, Tensor],
    source: Source,
    image_size: int | None,
    smaller: Mapping[str, Sequence[int]],
) -> Vit:
    """Make a model of what is in a Hugging Face folder.

    Args:
        folder: for the preprocessing.
        raw: its config.json.
        state: its tensors.
        source: for the report.
        image_size: see `build`.
        smaller: see `build`.

    Returns:
        Vit: the model.

    Raises:
        RequestError: a file is missing or broken.
    """
    return build(
        read_config(raw, folder), state, read_processor(folder, raw["model_type"]), source, image_size, smaller
    )


def read_config(raw: Mapping[str, Any], folder: Path) -> Any:
    """Make the configuration of a `config.json`.

    Args:
        raw: its content; "model_type" is a name of `KINDS`.
        folder: for messages.

    Returns:
        Any: transformers' configuration, its sizes not yet checked.

    Raises:
        RequestError: it cannot be used.
    """
    known = {key: value for key, value in raw.items() if key not in BACKBONE}
    count = known.get("num_labels", 2)
    if "id2label" in known:
        known.pop("num_labels", None)
    elif not isinstance(count, int) or count > MAX_LABELS:  # transformers would make as many names
        raise RequestError(f"{folder}/config.json has num_labels = {count!r:.40}, which is no number")
    config = states.read_config(KINDS[raw["model_type"]].config, known, folder)
    labels = config.id2label
    if not isinstance(labels, dict) or len(labels) < 2 or set(labels) != set(range(len(labels))):
        raise RequestError(f"{folder}/config.json has no id2label that names two classes or more, from 0 on")
    if config.problem_type not in (None, "single_label_classification"):
        raise RequestError(f"{folder} is for {config.problem_type!r:.60}: only images of one class each are supported")
    return config


def build(
    config: Any,
    state: Mapping[str, Tensor],
    processor: ImageProcessor,
    source: Source,
    image_size: int | None = None,
    smaller: Mapping[str, Sequence[int]] | None = None,
) -> Vit:
    """Make a model from a state dict in Hugging Face names.

    Args:
        config: made by `read_config`.
        state: tensors; a pooler's are left out.
        processor: preprocessing.
        source: for the report.
        image_size: pixels; position embeddings are interpolated. None = the config's, for DINOv2 the processor's.
        smaller: what was cut, as `vlprune.structured.surgery.sizes` lists it and `checked_sizes` let pass.

    Returns:
        Vit: in eval mode, float32.

    Raises:
        RequestError: there is no classifier, or tensors are missing, unknown or of the wrong shape.
    """
    name, kind, where = config.model_type, KINDS[config.model_type], source.checkpoint
    held = {key.split(".")[0] for key in state}
    heads = next((heads for heads in kind.heads if held & set(heads)), None)
    if heads is None:
        raise RequestError(
            f"{where} cannot classify: its checkpoint lacks {' or '.join(h for hs in kind.heads for h in hs)}, and "
            f"none is made up; give one that was trained to classify ({next(iter(kind.heads.values()))})"
        )
    wanted = {key: tensor for key, tensor in state.items() if not key.startswith(f"{name}.pooler.")}
    if name == "dinov2":
        _ffn_width(config, where)
    check_tower(config, "config", ("image_size", "patch_size"), wanted, f"{name}.encoder.layer.", where)
    if config.num_channels != 3:
        raise RequestError(f"{where}: config has num_channels = {config.num_channels!r:.40}: only 3 are supported")
    size = image_size or (processor.image_size if name == "dinov2" else config.image_size)
    if size != processor.image_size:
        processor = ImageProcessor(processor.pixels.at(size))
    key = f"{name}.embeddings.position_embeddings"
    if key in wanted and wanted[key].ndim == 3 and len(wanted[key]) == 1:
        wanted[key] = wanted[key][0]
        resize_positions(wanted, key, config, size, len(kind.first), where)
        wanted[key] = wanted[key][None]
    model = on_meta(lambda: Vit(config, heads, processor, source), smaller or {}, where)
    fill(model, wanted, where)
    return model.eval()


def _ffn_width(config: Any, checkpoint: str) -> None:
    """Note the width of DINOv2's feed-forward networks, which its config gives by a ratio."""
    ratio = config.mlp_ratio
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1024:
        raise RequestError(f"{checkpoint}: config has mlp_ratio = {ratio!r:.40}, which is no ratio")
    width = int(config.hidden_size * ratio)
    config.intermediate_size = (int(width * 2 / 3) + 7) // 8 * 8 if config.use_swiglu_ffn else width
