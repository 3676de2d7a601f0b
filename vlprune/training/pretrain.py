"""Pretraining of small models from scratch: the losses of the family, one loop.

Made for the embedded model and for benchmarks on small data; nobody should pretrain a full BLIP with it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from vlprune.data.sets import CaptionData, VqaData
from vlprune.models.family import Batch, Encoders


Augment = Callable[[Tensor, torch.Generator], Tensor]  # pixel values [B, 3, height, width] -> the same shape


class Pretrained(Encoders, Protocol):
    """A model that can be pretrained here; for question answering it has `vqa_batch`, too."""

    def pretraining_loss(self, batch: Batch, itm: bool = True) -> dict[str, Tensor]:
        """The pretraining losses by name; "lm" and "itm" only where the family has them."""


M = TypeVar("M", bound=Pretrained)


def cosine(step: int, steps: int, warmup: int) -> float:
    """Learning-rate factor: linear warm-up, then cosine to zero.

    Args:
        step: from 0.
        steps: total.
        warmup: steps of the warm-up.

    Returns:
        float: factor in (0, 1].
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def resized(model: Encoders, images: Sequence[Image.Image], n: int) -> np.ndarray:
    """Resize every image once and keep them in memory.

    Args:
        model: gives the image size.
        images: the images.
        n: how many.

    Returns:
        np.ndarray: uint8 [n, size, size, 3].
    """
    size = model.processor.image_size
    out = np.empty((n, size, size, 3), np.uint8)
    for i in range(n):
        out[i] = model.processor.resize([images[i]])[0]
    return out


def pretrain(
    model: M,
    captions: CaptionData,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    questions: VqaData | None = None,
    augment: Augment | None = None,
    itm_from: float = 0.0,
    lm_weight: float = 1.0,
    weight_decay: float = 0.05,
    hidden_words: float = 0.0,
    average: float = 0.0,
    stop: int | None = None,
    log: Callable[[str], None] = print,
    every: int = 50,
) -> M:
    """Train all parts on captions, and on questions when given, in bfloat16 with float32 weights.

    Args:
        model: fresh; trained in place.
        captions: a batch takes `batch_size` images and one caption of each.
        steps: optimizer steps.
        batch_size: images per step.
        lr: peak learning rate of AdamW, after 5 % warm-up, cosine to zero.
        seed: order, captions, augmentation.
        questions: adds the answer loss; half a batch of questions about the images of their own data.
        augment: changes pixel values.
        itm_from: share of the steps after which the matching loss joins; it triples the cost of the text encoder.
        lm_weight: factor of the caption loss, which is a mean over tokens and the best teacher of details.
        weight_decay: on matrices only.
        hidden_words: share of the words that the text encoder does not see in ITC and ITM, drawn anew in every step.
        average: decay of the exponential moving average of the weights, which is then the result; 0 = none.
        stop: end after so many steps of the schedule, None = at its end.
        log: called with a line every `every` steps.
        every: steps between lines.

    Returns:
        M: the model, in eval mode.
    """
    module: Any = model  # what a Protocol cannot say: it is an nn.Module, with `vqa_batch` where questions are given
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    pixels = resized(model, captions.images, len(captions.captions))
    asked = None if questions is None else resized(model, questions.images, len(questions.images))
    decay = [p for p in model.parameters() if p.ndim >= 2]
    rest = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), foreach=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: cosine(s, steps, max(1, steps // 20)))
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(average)) if average else None
    order = np.empty(0, np.int64)
    sums: dict[str, float] = {}
    start = time.time()
    model.train()
    for step in range(stop or steps):
        if len(order) < batch_size:
            order = rng.permutation(len(pixels))
        rows, order = order[:batch_size], order[batch_size:]
        chosen = [captions.captions[i][rng.integers(len(captions.captions[i]))] for i in rows]
        batch = model.caption_batch(model.processor.normalise(pixels[rows]), chosen, rows.tolist())
        if augment is not None:
            batch["pixel_values"] = augment(batch["pixel_values"], generator)
        if hidden_words:
            hidden = torch.rand(batch["attention_mask"].shape, generator=generator) < hidden_words
            hidden[:, 0] = False  # [CLS]
            batch["encoder_mask"] = batch["attention_mask"].masked_fill(hidden, 0)
        with torch.autocast(model.device.type, torch.bfloat16):
            losses = model.pretraining_loss(batch, itm=step >= itm_from * steps)
            if questions is not None and asked is not None:
                picked = rng.integers(len(questions.questions), size=batch_size // 2)
                some = [questions.questions[i] for i in picked]
                images = np.unique([q.image for q in some])
                where = np.searchsorted(images, [q.image for q in some])
                batch = module.vqa_batch(
                    model.processor.normalise(asked[images]),
                    where.tolist(),
                    [q.question for q in some],
                    [q.answers for q in some],
                )
                losses["vqa"] = model.loss("vqa", batch)
        total = torch.stack([lm_weight * v if k == "lm" else v for k, v in losses.items()]).sum()
        if not torch.isfinite(total):
            raise FloatingPointError(f"the loss is not finite at step {step}")
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if averaged is not None:
            averaged.update_parameters(module)
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
        if (step + 1) % every == 0:
            line = "  ".join(f"{name} {value / every:.3f}" for name, value in sums.items())
            log(f"step {step + 1}/{steps}  {line}  {(time.time() - start) / (step + 1):.3f} s/step")
            sums = {}
    if averaged is not None:
        model.load_state_dict(averaged.module.state_dict())
    return model.eval()
