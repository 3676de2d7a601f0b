"""Fine-tuning of one task with a fixed mask: what pruning removed stays exactly zero at every step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vlprune import names
from vlprune.data.sets import KINDS, CaptionData, Data
from vlprune.errors import MachineError, RequestError
from vlprune.models.family import Model, PrunableLayer
from vlprune.training.distill import Teacher
from vlprune.training.loop import SAVE_SECONDS, Settings, Watcher, accelerator, train
from vlprune.training.pretrain import cosine


Precision = Literal["auto", "bf16", "fp32"]

# MULTIFLOW's configs/blip/*.yaml; 32 is their batch per GPU, on 4 or 8 GPUs. Classification: its DINO on ImageNet.
# Zero-shot: UPop's CLIP, trained for retrieval on COCO (compress_clip.py), as the loss is the same. NLVR: UPop's
# configs/nlvr.yaml, which goes on from weights already fine-tuned on NLVR2.
AUTHORS: dict[str, dict[str, float]] = {
    "retrieval": {"lr": 1e-5, "epochs": 6, "batch_size": 32},
    "captioning": {"lr": 1e-5, "epochs": 5, "batch_size": 32},
    "vqa": {"lr": 2e-5, "epochs": 10, "batch_size": 32},
    "zero-shot": {"lr": 1e-5, "epochs": 6, "batch_size": 32},
    "classification": {"lr": 1e-5, "epochs": 10, "batch_size": 32},
    "nlvr": {"lr": 3e-6, "epochs": 15, "batch_size": 32},
}
WARMUP = 0.05  # share of the steps


@dataclass(frozen=True)
class FinetuneOptions:
    """What a caller may choose; None = what the checkpoint suggests (`Model.options`), else the authors' value.

    Attributes:
        mode: "heads" trains only what stands outside the towers, "full" all weights.
        max_steps: optimizer steps; with `epochs` too, whichever ends first.
        epochs: passes over all captions, questions or classified images.
        lr: peak learning rate: warm-up over 5 % of the steps, then cosine to zero.
        batch_size: images with one caption or class each, or questions.
        weight_decay: of AdamW, on matrices only.
        seed: of order, captions, dropout and drawn negatives.
        precision: "bf16" computes under autocast with float32 weights; "auto" does so where the device is fast at it.
        device: "auto", "cpu" or "cuda".
        gradient_checkpointing: compute the inside of layers again in the backward pass instead of keeping it.
        compile: torch.compile the layers.
    """

    mode: Literal["heads", "full"] = "full"
    max_steps: int | None = None
    epochs: float | None = None
    lr: float | None = None
    batch_size: int | None = None
    weight_decay: float = 0.05
    seed: int = 0
    precision: Precision = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False


def settle(
    options: FinetuneOptions,
    model: Model,
    task: str,
    data: Data,
    authors: Mapping[str, Mapping[str, float]] = AUTHORS,
) -> Settings:
    """Make every choice: the caller's, else the checkpoint's suggestion, else the authors'.

    Args:
        options: the caller's choices; `max_steps` or `epochs` alone replaces the suggested schedule whole.
        model: what is fine-tuned.
        task: one of its tasks.
        data: training data.
        authors: task -> lr, epochs and batch_size where neither the caller nor the checkpoint says.

    Returns:
        Settings: ready to run.

    Raises:
        RequestError: an option is out of range, or the data are of another task.
        MachineError: CUDA is asked for and not there.
    """
    names.check("task", task, model.tasks)
    if not isinstance(data, KINDS[task]):
        raise RequestError(f"{data.name} holds no {KINDS[task].holds}: {task} needs them")
    if options.mode not in ("heads", "full"):
        raise RequestError(f"unknown fine-tuning {options.mode!r}: choose heads or full")
    suggested = dict(model.options.get("finetune", {}))
    unknown = sorted(suggested.keys() - {"max_steps", "epochs", "lr", "batch_size"})
    if unknown:
        raise RequestError(f"{model.source.name} suggests fine-tuning options that do not exist: {', '.join(unknown)}")
    if {"max_steps", "epochs"} & suggested.keys():
        values = {k: v for k, v in authors[task].items() if k != "epochs"} | suggested
    else:
        values = {**authors[task], **suggested}
    if options.max_steps is not None or options.epochs is not None:
        values = {k: v for k, v in values.items() if k not in ("max_steps", "epochs")}
    values |= {k: v for k in ("max_steps", "epochs", "lr", "batch_size") if (v := getattr(options, k)) is not None}
    for name, value in values.items():
        if not (isinstance(value, int | float) and 0 < value < math.inf):
            raise RequestError(f"fine-tuning with {name} = {value!r}: give a positive number")
    if not 0 <= options.weight_decay < math.inf:
        raise RequestError(f"fine-tuning with weight_decay = {options.weight_decay!r}: give 0 or more")
    samples = sum(map(len, data.captions)) if isinstance(data, CaptionData) else data.samples
    if samples == 0:
        raise RequestError(f"{data.name} holds nothing to fine-tune on for {task}")
    batch_size = min(int(values["batch_size"]), data.samples)
    steps = math.inf
    if "epochs" in values:
        steps = max(1, round(values["epochs"] * samples / batch_size))
    steps = int(min(steps, values.get("max_steps", math.inf)))
    device = _device(options.device)
    return Settings(
        options.mode, max(1, steps), max(1, batch_size), float(values["lr"]), options.weight_decay, options.seed,
        _precision(options.precision, device), device, options.gradient_checkpointing, options.compile,
    )  # fmt: skip


def _device(wanted: str) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise MachineError("PyTorch finds no CUDA device: use --device cpu, or install a CUDA build of PyTorch")
    return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"


def _precision(wanted: str, device: str) -> str:
    if wanted not in ("auto", "bf16", "fp32"):
        raise RequestError(f"unknown precision {wanted!r}: choose auto, bf16 or fp32")
    if wanted != "auto":
        return wanted
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # emulated bfloat16 is slower than float32
    return "bf16" if native is not None and native() else "fp32"


class MaskLock(Watcher):
    """Holds pruned weights at zero.

    Args:
        layers: the model's prunable layers; a shared weight is one layer.
        masks: layer name -> bool [out, in], True = kept; layers without a mask are free.

    Raises:
        RequestError: a mask belongs to no layer or has another shape.
    """

    def __init__(self, layers: Sequence[PrunableLayer], masks: Mapping[str, Tensor]) -> None:
        if unknown := sorted(masks.keys() - {layer.name for layer in layers}):
            raise RequestError(f"the masks name a layer the model does not have: {unknown[0]}")
        self.layers = [layer for layer in layers if layer.name in masks]
        self.pruned = []
        for layer in self.layers:
            mask = masks[layer.name]
            if mask.shape != layer.weight.shape:
                raise RequestError(
                    f"the mask of {layer.name} has shape {list(mask.shape)}, its weight {list(layer.weight.shape)}"
                )
            self.pruned.append(~mask.bool().to(layer.weight.device))

    def after_backward(self) -> None:
        """Zero the gradients of pruned weights."""
        self.zero_gradients()

    def after_step(self, step: int) -> None:
        """Zero the pruned weights, and look.

        Args:
            step: not used.
        """
        self.zero_weights()
        self.check()

    @torch.no_grad()
    def zero_gradients(self) -> None:
        """Zero the gradients of pruned weights; before clipping, or they would decide the norm."""
        for layer, pruned in zip(self.layers, self.pruned, strict=True):
            if layer.weight.grad is not None:
                layer.weight.grad.masked_fill_(pruned, 0.0)

    @torch.no_grad()
    def zero_weights(self) -> None:
        """Zero the pruned weights, each shared one once; a fill and no product, which would keep NaN."""
        for layer, pruned in zip(self.layers, self.pruned, strict=True):
            layer.weight.masked_fill_(pruned, 0.0)

    @torch.no_grad()
    def check(self) -> None:
        """Read the weights as the forward pass will, and assert that every pruned one is zero.

        Raises:
            AssertionError: one is not: a bug.
        """
        alive = []
        for layer, pruned in zip(self.layers, self.pruned, strict=True):
            # NaN counts as alive. Sharing may have been broken since: every module is looked at, equal ones once.
            weights = {id(module.weight): module.weight for module in layer.modules}
            alive += [(weight.bool() & pruned).any() for weight in weights.values()]
        if alive and bool(torch.stack(alive).any()):
            raise AssertionError("a pruned weight is not zero")


def finetune(
    model: Model,
    task: str,
    data: Data,
    masks: Mapping[str, Tensor],
    options: FinetuneOptions | None = None,
    *,
    teacher: Teacher | None = None,
    state_dir: Path | str | None = None,
    save_seconds: float = SAVE_SECONDS,
    label: str = "Fine-tuning",
) -> dict[str, Any]:
    """Train a model for one task in place, pruned weights held at exactly zero.

    The loop is `train`'s, with a cosine schedule; gradients are masked and then clipped.

    Args:
        model: made by `Model.for_task`; ends on the device it was trained on, in eval mode.
        task: its task.
        data: training data, of the task's kind (`vlprune.data.KINDS`).
        masks: layer name -> bool [out, in], True = kept; {} for a dense model.
        options: None = all defaults.
        teacher: dense model whose embeddings and states the model is trained to resemble, too; for retrieval only.
        state_dir: folder where the training is saved every minute, and continued from if it was the same training (same
            weights, masks, teacher, data and settings); the caller removes it when the result is safe.
        save_seconds: time between two saves, at least; saves take at most a tenth of the time.
        label: what the progress bar says.

    Returns:
        dict[str, Any]: the `Settings` used; "loss" (mean over the last tenth of the steps), "first_loss" (over the
            first tenth), "seconds", "resumed_from" (a step, 0 = from the start).

    Raises:
        RequestError: wrong options, data that cannot be read, or a loss that is not finite.
        MachineError: no CUDA, no space.
    """
    settings = settle(options or FinetuneOptions(), model, task, data)
    device = accelerator(settings).device
    model.to(device)
    if teacher is not None:
        if settings.compile:
            raise RequestError("distillation reads inside the layers, which --compile hides: leave one of them out")
        teacher.check(model, task)
        teacher.model.to(device).eval()
    lock = MaskLock(model.layers(), masks)
    lock.zero_weights()
    heads = {id(p) for p in model.head_parameters(task)}
    trained = {n: p for n, p in model.named_parameters() if settings.mode == "full" or id(p) in heads}
    warmup = max(1, round(WARMUP * settings.steps))
    return train(
        model, task, data, settings, trained, lambda step: settings.lr * cosine(step, settings.steps, warmup),
        loss=None if teacher is None else partial(teacher.loss, model), watcher=lock,
        depends=[*sorted(masks.items()), *([] if teacher is None else teacher.depends())],
        state_dir=state_dir, save_seconds=save_seconds, label=label,
    )  # fmt: skip
