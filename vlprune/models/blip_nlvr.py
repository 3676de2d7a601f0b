"""BLIP for NLVR2 (Li et al., ICML 2022, appendix A): is a sentence true of two images?

One vision encoder reads both images. Each layer of the text encoder has two cross-attentions, one per image, whose
outputs are averaged in the lower half of the layers and joined by a Linear in the upper half (`merge_layer`); two
Linears read the first token. Parameter names are those of the authors' file but for the vision encoder, whose are
Hugging Face's; transformers has no class for it.

From a pretraining checkpoint (`of`) both cross-attentions start as copies of its one, the merging Linears as the
average (the authors draw them at random), and the classification head is drawn: such a model must be fine-tuned.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BlipConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from vlprune.data.nlvr import MAX_LENGTH
from vlprune.errors import RequestError
from vlprune.files import write_json
from vlprune.models.attention import mask_bias
from vlprune.models.blip import Blip, TextAttention, VisionAttention, check_config, resize_positions
from vlprune.models.family import Batch, Group, Model, PrunableLayer, Source, Tower, Valid
from vlprune.models.processor import Processor
from vlprune.models.states import fill, on_meta
from vlprune.structured.surgery import sizes


_MERGE = "text_encoder.encoder.layer.{}.crossattention.output.merge_layer.weight"
_PARTS = ("vision_model", "text_encoder", "cls_head")
_CROSS = ("self0", "self1")
_OUT = ("output.dense0", "output.dense1")


class PairOutput(nn.Module):
    """Joins what was read from two images.

    Args:
        config: of the text encoder.
        merge: by a Linear; else by the average.
    """

    def __init__(self, config: Any, merge: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.dense0 = nn.Linear(width, width)
        self.dense1 = nn.Linear(width, width)
        if merge:
            self.merge_layer = nn.Linear(2 * width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, contexts: Sequence[Tensor], residual: Tensor) -> Tensor:
        """Join.

        Args:
            contexts: of the first and the second image, [B, T, H * K] each.
            residual: [B, T, D].

        Returns:
            Tensor: [B, T, D].
        """
        first, second = self.dense0(contexts[0]), self.dense1(contexts[1])
        if hasattr(self, "merge_layer"):
            joined = self.merge_layer(torch.cat([first, second], dim=-1))
        else:
            joined = (first + second) / 2
        return self.LayerNorm(self.dropout(joined) + residual)


class PairAttention(nn.Module):
    """Cross-attention to two images.

    Args:
        config: of the text encoder.
        merge: see `PairOutput`.
    """

    def __init__(self, config: Any, merge: bool) -> None:
        super().__init__()
        self.self0 = TextAttention(config, is_cross_attention=True)
        self.self1 = TextAttention(config, is_cross_attention=True)
        self.output = PairOutput(config, merge)

    def forward(self, x: Tensor, states: Sequence[Tensor]) -> Tensor:
        """Attend.

        Args:
            x: [B, T, D].
            states: of the first and the second image, [B, P, D] each.

        Returns:
            Tensor: [B, T, D].
        """
        attentions = (self.self0, self.self1)
        contexts = [own(x, *own.keys_values(image), None) for own, image in zip(attentions, states, strict=True)]
        return self.output(contexts, x)


class BlipNlvr(nn.Module):
    """BLIP that judges sentences about two images.

    Args:
        config: sizes of both towers.
        merges: per layer of the text encoder, whether a Linear joins the two images.
        processor: tokenizer and image preprocessing.
        source: where the weights come from.

    Attributes:
        options: see `vlprune.models.family.Model`.
    """

    family = "blip_nlvr"
    tasks: tuple[str, ...] = ("nlvr",)

    def __init__(self, config: BlipConfig, merges: Sequence[bool], processor: Processor, source: Source) -> None:
        super().__init__()
        self.options: dict[str, dict[str, Any]] = {}
        vision, text = config.vision_config, config.text_config
        self.config = config
        self.processor = processor
        self.source = source
        self.vision_model = BlipVisionModel(vision)
        for layer in self.vision_model.encoder.layers:
            layer.self_attn = VisionAttention(vision)
        self.text_encoder = BlipTextModel(text, add_pooling_layer=False)
        for layer, merge in zip(self.text_encoder.encoder.layer, merges, strict=True):
            layer.attention.self = TextAttention(text, is_cross_attention=False)
            layer.crossattention = PairAttention(text, merge)
        self.cls_head = nn.Sequential(
            nn.Linear(text.hidden_size, text.hidden_size), nn.ReLU(), nn.Linear(text.hidden_size, 2)
        )

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.vision_model.post_layernorm.weight.device

    @property
    def max_length(self) -> int:
        """Tokens that sentences are cut to."""
        return min(MAX_LENGTH, self.config.text_config.max_position_embeddings)

    # --- pruning ---------------------------------------------------------------------------------------------------

    def layers(self) -> list[PrunableLayer]:
        """List the prunable weights: every Linear of the towers.

        Returns:
            list[PrunableLayer]: vision first, then text, in order of execution.
        """
        found = []

        def add(prefix: str, layer: nn.Module, path: str, modality: Any, tokens: Any) -> None:
            name, linear = f"{prefix}.{path}", layer.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            found.append(PrunableLayer(name, (name,), modality, (linear,), tokens))

        layer: Any
        for i, layer in enumerate(self.vision_model.encoder.layers):
            for path in ("self_attn.qkv", "self_attn.projection", "mlp.fc1", "mlp.fc2"):
                add(f"vision_model.encoder.layers.{i}", layer, path, "vision", "vision")
        for i, layer in enumerate(self.text_encoder.encoder.layer):
            prefix = f"text_encoder.encoder.layer.{i}"
            for path in ("self.query", "self.key", "self.value", "output.dense"):
                add(prefix, layer, f"attention.{path}", "text", "text")
            for cross in _CROSS:
                add(prefix, layer, f"crossattention.{cross}.query", "text", "text")
                add(prefix, layer, f"crossattention.{cross}.key", "text", "vision")
                add(prefix, layer, f"crossattention.{cross}.value", "text", "vision")
            merges = hasattr(layer.crossattention.output, "merge_layer")
            for path in (*_OUT, "output.merge_layer")[: 2 + merges]:
                add(prefix, layer, f"crossattention.{path}", "text", "text")
            for path in ("intermediate.dense", "output.dense"):
                add(prefix, layer, path, "text", "text")
        return found

    def groups(self) -> list[Group]:
        """List the units that structured pruning may remove; the Linears that merge two images are of the full width.

        Returns:
            list[Group]: vision first, then text, in order of execution; the two cross-attentions of a layer are two.
        """
        found = []

        def add(name: str, kind: Any, tower: Any, index: int, inner: Any, outer: nn.Linear) -> None:
            module: Any = self.get_submodule(name)
            cross = ".crossattention." in name
            shape: tuple[int, ...] = (outer.in_features,)
            if isinstance(module, VisionAttention):
                shape = (module.num_heads, module.head_dim)
            elif isinstance(module, TextAttention):
                shape = (module.num_attention_heads, module.attention_head_size)
            found.append(Group(name, (name,), kind, tower, tower, index, (module,), inner, (outer,), shape, cross))

        layer: Any
        for i, layer in enumerate(self.vision_model.encoder.layers):
            path, qkv = f"vision_model.encoder.layers.{i}", layer.self_attn.qkv
            inner = tuple((qkv, part) for part in range(3))
            add(f"{path}.self_attn", "attention", "vision", i, inner, layer.self_attn.projection)
            add(f"{path}.mlp", "ffn", "vision", i, ((layer.mlp.fc1, 0),), layer.mlp.fc2)
        for i, layer in enumerate(self.text_encoder.encoder.layer):
            path = f"text_encoder.encoder.layer.{i}"
            for block, dense in (("attention.self", "attention.output.dense"), *self._crosses()):
                own = layer.get_submodule(block)
                inner = tuple((linear, 0) for linear in (own.query, own.key, own.value))
                add(f"{path}.{block}", "attention", "text", i, inner, layer.get_submodule(dense))
            add(f"{path}.intermediate", "ffn", "text", i, ((layer.intermediate.dense, 0),), layer.output.dense)
        return found

    def _crosses(self) -> list[tuple[str, str]]:
        """Paths of the cross-attentions in a layer, and of what follows each."""
        pairs = zip(_CROSS, _OUT, strict=True)
        return [(f"crossattention.{attention}", f"crossattention.{output}") for attention, output in pairs]

    def towers(self) -> list[Tower]:
        """List the stacks of layers that structured pruning may shorten.

        Returns:
            list[Tower]: "vision" and "text".
        """
        return [
            Tower("vision", "vision", ("vision_model.encoder.layers",), len(self.vision_model.encoder.layers)),
            Tower("text", "text", ("text_encoder.encoder.layer",), len(self.text_encoder.encoder.layer)),
        ]

    def calibrate(self, batch: Batch, valid: Valid) -> None:
        """Run one calibration batch.

        Args:
            batch: made by `caption_batch` or `nlvr_batch`.
            valid: `InputNorms.valid`; tells which rows are padding.
        """
        with valid(text=batch["attention_mask"]):
            self._batch_logits(batch)

    # --- forward ---------------------------------------------------------------------------------------------------

    def image_states(self, pixel_values: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixel_values: [B, 3, height, width].

        Returns:
            Tensor: [B, P, D], the [CLS] token first.
        """
        x = self.vision_model.embeddings(pixel_values)
        for layer in self.vision_model.encoder.layers:
            x = layer(x, None)
        return self.vision_model.post_layernorm(x)

    def logits(self, input_ids: Tensor, attention_mask: Tensor, states: Sequence[Tensor]) -> Tensor:
        """Judge sentences that begin with [ENC].

        Args:
            input_ids: [B, T].
            attention_mask: [B, T].
            states: of the first and the second images, [B, P, D] each.

        Returns:
            Tensor: [B, 2], column 1 = true.
        """
        x = self.text_encoder.embeddings(input_ids=input_ids)
        bias = mask_bias(attention_mask[:, None, None, :], x.dtype)
        for layer in self.text_encoder.encoder.layer:
            own = layer.attention.self
            x = layer.attention.output(own(x, *own.keys_values(x), bias), x)
            x = layer.crossattention(x, states)
            x = layer.feed_forward_chunk(x)
        return self.cls_head(x[:, 0])

    def _batch_logits(self, batch: Batch) -> Tensor:
        states = self.image_states(batch["pixel_values"])
        pairs = batch["pairs"]
        return self.logits(batch["input_ids"], batch["attention_mask"], (states[pairs[:, 0]], states[pairs[:, 1]]))

    def loss(self, task: str, batch: Batch) -> Tensor:
        """The fine-tuning loss: cross entropy.

        Args:
            task: "nlvr".
            batch: made by `nlvr_batch`.

        Returns:
            Tensor: a scalar.
        """
        return F.cross_entropy(self._batch_logits(batch), batch["labels"])

    # --- batches ---------------------------------------------------------------------------------------------------

    def nlvr_batch(
        self,
        images: Sequence[Image.Image] | np.ndarray,
        pairs: Sequence[Sequence[int]] | np.ndarray,
        sentences: Sequence[str],
        labels: Sequence[bool],
        max_length: int | None = None,
    ) -> Batch:
        """Make the batch for training.

        Args:
            images: the images asked about, each once, or float32 pixel values [N, 3, height, width].
            pairs: rows of `images` for each sentence, [B, 2].
            sentences: B texts.
            labels: whether they are true.
            max_length: tokens, None = `max_length` of the model.

        Returns:
            Batch: tensors on the model's device.
        """
        ids, mask = self.processor.texts(sentences, "enc", max_length or self.max_length)
        arrays = {
            "input_ids": ids,
            "attention_mask": mask,
            "pairs": np.asarray(pairs, np.int64),
            "labels": np.asarray(labels, np.int64),
            "pixel_values": images if isinstance(images, np.ndarray) else self.processor.images(images),
        }
        return {name: torch.from_numpy(array).to(self.device) for name, array in arrays.items()}

    def caption_batch(
        self,
        images: Sequence[Image.Image] | np.ndarray,
        captions: Sequence[str],
        image_index: Sequence[int],
        max_length: int | None = None,
    ) -> Batch:
        """Make the batch for calibration: every image with its caption, and with the next one as the other image.

        Args:
            images: one per caption.
            captions: B texts.
            image_index: not used.
            max_length: tokens, None = `max_length` of the model.

        Returns:
            Batch: tensors on the model's device.
        """
        rows = np.arange(len(captions))
        pairs = np.stack([rows, np.roll(rows, -1)], axis=1)
        return self.nlvr_batch(images, pairs, captions, [True] * len(captions), max_length)

    # --- tasks and files -------------------------------------------------------------------------------------------

    def head_parameters(self, task: str) -> list[nn.Parameter]:
        """Parameters that `--finetune heads` trains: the classification head's.

        Args:
            task: "nlvr".

        Returns:
            list[nn.Parameter]: unique parameters.
        """
        return list(self.cls_head.parameters())

    def for_task(self, task: str) -> BlipNlvr:
        """Copy the model.

        Args:
            task: "nlvr".

        Returns:
            BlipNlvr: an independent model.

        Raises:
            RequestError: another task.
        """
        if task not in self.tasks:
            raise RequestError(f"{self.source.name} cannot do {task}: it offers {', '.join(self.tasks)}")
        return copy.deepcopy(self)

    def save(self, folder: Path | str, dtype: torch.dtype | None = None) -> None:
        """Write config, weights, tokenizer and preprocessing in the manner of Hugging Face.

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
        config["architectures"] = ["BlipNlvr"]
        config["vlprune"] = {
            "name": self.source.name,
            "random_weights": self.source.random_weights,
            "options": self.options,
        }
        if smaller := sizes(self):
            config["vlprune"]["sizes"] = smaller
        write_json(folder / "config.json", config)
        self.processor.save(folder)


def holds(state: Mapping[str, Tensor]) -> bool:
    """Tell whether a BLIP checkpoint is one for NLVR2.

    Args:
        state: its tensors.

    Returns:
        bool: True when it has this model's head.
    """
    return any(key.startswith("cls_head.") for key in state)


def build(
    config: BlipConfig,
    state: Mapping[str, Tensor],
    processor: Processor,
    source: Source,
    smaller: Mapping[str, Sequence[int]] | None = None,
) -> BlipNlvr:
    """Make a model from a state dict, the vision encoder's tensors under Hugging Face names.

    Args:
        config: sizes.
        state: tensors; those of other parts are left out.
        processor: tokenizer and preprocessing; its image size decides, position embeddings are interpolated to it.
        source: for the report.
        smaller: what was cut, as `vlprune.structured.sizes` lists it and `checked_sizes` let pass.

    Returns:
        BlipNlvr: in eval mode, float32.

    Raises:
        RequestError: tensors are missing, unknown or of the wrong shape.
    """
    where, smaller = source.checkpoint, smaller or {}
    wanted = {key: tensor.float() for key, tensor in state.items() if key.split(".")[0] in _PARTS}
    wanted = {key: tensor for key, tensor in wanted.items() if not key.endswith(".position_ids")}
    check_config(config, wanted, where, smaller)
    resize_positions(wanted, config, processor.image_size, where)
    depth = config.text_config.num_hidden_layers
    merges = [_MERGE.format(i) in wanted for i in range(depth)]
    model = on_meta(lambda: BlipNlvr(config, merges, processor, source), smaller, where)
    fill(model, wanted, where)
    return _finish(model)


def of(model: Model, seed: int) -> BlipNlvr:
    """Make a model for NLVR2 of a pretrained BLIP, to be fine-tuned, or pass on one that already is.

    Args:
        model: a BLIP with a text encoder; not changed.
        seed: of the classification head.

    Returns:
        BlipNlvr: on the CPU, in eval mode.

    Raises:
        RequestError: the model has no text encoder.
    """
    if isinstance(model, BlipNlvr):
        return model
    if not isinstance(model, Blip) or "text_encoder" not in model.parts:
        raise RequestError(
            f"{model.source.name} cannot be made a model for nlvr: that takes a BLIP checkpoint with a text encoder"
        )
    config = copy.deepcopy(model.config)
    depth = len(model.text_encoder.encoder.layer)
    merges = [i >= depth // 2 for i in range(depth)]  # of the authors' 12 layers the last 6
    drawn = f"{model.source.checkpoint}, with a classification head drawn at random (seed {seed})"
    made = BlipNlvr(config, merges, model.processor, replace(model.source, checkpoint=drawn))
    state = model.state_dict()
    wanted: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in made.state_dict().items():
        if key in state:
            wanted[key] = state[key]
        elif key.startswith("cls_head."):
            wanted[key] = torch.zeros_like(tensor)
            if tensor.ndim == 2:
                wanted[key].normal_(0.0, 0.02, generator=generator)
        elif key.endswith("merge_layer.weight"):
            wanted[key] = torch.eye(len(tensor)).repeat(1, 2) / 2
        elif key.endswith("merge_layer.bias"):
            wanted[key] = torch.zeros_like(tensor)
        else:
            wanted[key] = state[re.sub(r"\b(self|dense)[01]\b", r"\1", key)]
    made.load_state_dict({key: tensor.clone() for key, tensor in wanted.items()}, assign=True)
    made.options = {"finetune": model.options["finetune"]} if "finetune" in model.options else {}
    return _finish(made)


def _finish(model: BlipNlvr) -> BlipNlvr:
    """Fill the buffer that no checkpoint holds, end in eval mode."""
    embeddings = model.text_encoder.embeddings
    positions = torch.arange(embeddings.position_embeddings.num_embeddings)
    embeddings.register_buffer("position_ids", positions.expand(1, -1), persistent=False)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()
