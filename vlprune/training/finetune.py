"""Fine-tuning of one task with a fixed mask: what pruning removed stays exactly zero at every step.

Everything random follows from (seed, step), so a run that is interrupted and resumed ends in the same bits.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from PIL import Image
from torch import Tensor, nn

from vlprune import names
from vlprune.data.sets import CaptionData, VqaData
from vlprune.errors import MachineError, RequestError
from vlprune.files import atomic_path
from vlprune.models.family import Batch, Model, PrunableLayer
from vlprune.progress import task as progress
from vlprune.training.pretrain import cosine


Precision = Literal["auto", "bf16", "fp32"]
_Ordered = list[tuple[int, Future[np.ndarray] | None]]  # images and what reads them, None = in memory already

AUTHORS: dict[str, dict[str, float]] = {  # MULTIFLOW's configs/blip/*.yaml; 32 is their batch per GPU, on 4 or 8 GPUs
    "retrieval": {"lr": 1e-5, "epochs": 6, "batch_size": 32},
    "captioning": {"lr": 1e-5, "epochs": 5, "batch_size": 32},
    "vqa": {"lr": 2e-5, "epochs": 10, "batch_size": 32},
}
WARMUP = 0.05  # share of the steps
CLIP = 1.0  # norm of the gradient of the kept weights; the authors do not clip, but short schedules need larger rates
PER_IMAGE = 4  # questions about one image that stand together in a batch: the image is encoded once for them
CACHE = 2 << 30  # bytes of resized images kept in memory
SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class FinetuneOptions:
    """What a caller may choose; None = what the checkpoint suggests (`Model.options`), else the authors' value.

    Attributes:
        mode: "heads" trains only what stands outside the towers, "full" all weights.
        max_steps: optimizer steps; with `epochs` too, whichever ends first.
        epochs: passes over all captions or questions.
        lr: peak learning rate: warm-up over 5 % of the steps, then cosine to zero.
        batch_size: images with one caption each, or questions.
        weight_decay: of AdamW, on matrices only.
        seed: of order, captions, dropout and drawn negatives.
        precision: "bf16" computes under autocast with float32 weights; "auto" does so where the device is fast at it.
        device: "auto", "cpu" or "cuda".
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


@dataclass(frozen=True)
class Settings:
    """Options with every choice made.

    Attributes:
        mode: "heads" or "full".
        steps: optimizer steps.
        batch_size: images or questions, at most what the data hold.
        lr: peak learning rate.
        weight_decay: of AdamW.
        seed: of everything random.
        precision: "bf16" or "fp32".
        device: "cpu" or "cuda".
    """

    mode: str
    steps: int
    batch_size: int
    lr: float
    weight_decay: float
    seed: int
    precision: str
    device: str


def settle(options: FinetuneOptions, model: Model, task: str, data: CaptionData | VqaData) -> Settings:
    """Make every choice: the caller's, else the checkpoint's suggestion, else the authors'.

    Args:
        options: the caller's choices; `max_steps` or `epochs` alone replaces the suggested schedule whole.
        model: what is fine-tuned.
        task: one of its tasks.
        data: training data.

    Returns:
        Settings: ready to run.

    Raises:
        RequestError: an option is out of range.
        MachineError: CUDA is asked for and not there.
    """
    if options.mode not in ("heads", "full"):
        raise RequestError(f"unknown fine-tuning {options.mode!r}: choose heads or full")
    suggested = dict(model.options.get("finetune", {}))
    unknown = sorted(suggested.keys() - {"max_steps", "epochs", "lr", "batch_size"})
    if unknown:
        raise RequestError(f"{model.source.name} suggests fine-tuning options that do not exist: {', '.join(unknown)}")
    if {"max_steps", "epochs"} & suggested.keys():
        authors = {k: v for k, v in AUTHORS[task].items() if k != "epochs"}
    else:
        authors = AUTHORS[task]
    values: dict[str, float] = {**authors, **suggested}
    if options.max_steps is not None or options.epochs is not None:
        values = {k: v for k, v in values.items() if k not in ("max_steps", "epochs")}
    values |= {k: v for k in ("max_steps", "epochs", "lr", "batch_size") if (v := getattr(options, k)) is not None}
    for name, value in values.items():
        if not (isinstance(value, int | float) and 0 < value < math.inf):
            raise RequestError(f"fine-tuning with {name} = {value!r}: give a positive number")
    if not 0 <= options.weight_decay < math.inf:
        raise RequestError(f"fine-tuning with weight_decay = {options.weight_decay!r}: give 0 or more")
    samples = len(data.questions) if isinstance(data, VqaData) else sum(map(len, data.captions))
    distinct = samples if isinstance(data, VqaData) else len(data.captions)
    if samples == 0:
        raise RequestError(f"{data.name} holds nothing to fine-tune on for {task}")
    batch_size = min(int(values["batch_size"]), distinct)
    steps = math.inf
    if "epochs" in values:
        steps = max(1, round(values["epochs"] * samples / batch_size))
    steps = int(min(steps, values.get("max_steps", math.inf)))
    device = _device(options.device)
    return Settings(
        options.mode, max(1, steps), max(1, batch_size), float(values["lr"]), options.weight_decay, options.seed,
        _precision(options.precision, device), device,
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


class MaskLock:
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
    data: CaptionData | VqaData,
    masks: Mapping[str, Tensor],
    options: FinetuneOptions | None = None,
    *,
    state_dir: Path | str | None = None,
    save_seconds: float = SAVE_SECONDS,
    label: str = "Fine-tuning",
) -> dict[str, Any]:
    """Train a model for one task in place, pruned weights held at exactly zero.

    AdamW, cosine schedule, gradients masked and then clipped to norm 1. A batch for retrieval and captioning has
    distinct images with one caption each; an epoch shows every caption once, in an order drawn anew. Questions about
    one image come together. Images are not augmented.

    Args:
        model: made by `Model.for_task`; ends on the device it was trained on, in eval mode.
        task: its task.
        data: training data, CaptionData, or VqaData for "vqa".
        masks: layer name -> bool [out, in], True = kept; {} for a dense model.
        options: None = all defaults.
        state_dir: folder where the training is saved every minute, and continued from if it was the same training (same
            weights, masks, data and settings); the caller removes it when the result is safe.
        save_seconds: time between two saves, at least; saves take at most a tenth of the time.
        label: what the progress bar says.

    Returns:
        dict[str, Any]: the `Settings` used; "loss" (mean over the last tenth of the steps), "first_loss" (over the
            first tenth), "seconds", "resumed_from" (a step, 0 = from the start).

    Raises:
        RequestError: wrong options, data that cannot be read, or a loss that is not finite.
        MachineError: no CUDA, no space.
    """
    names.check("task", task, model.tasks)
    if isinstance(data, VqaData) != (task == "vqa"):
        raise RequestError(f"{data.name} holds no {'questions' if task == 'vqa' else 'captions'}: {task} needs them")
    settings = settle(options or FinetuneOptions(), model, task, data)
    accelerator = _accelerator(settings)
    model.to(accelerator.device)
    lock = MaskLock(model.layers(), masks)
    lock.zero_weights()

    heads = {id(p) for p in model.head_parameters(task)}
    trained = {n: p for n, p in model.named_parameters() if settings.mode == "full" or id(p) in heads}
    was_trained = {n: p.requires_grad for n, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    optimizer = torch.optim.AdamW(_groups(trained.values(), settings), lr=settings.lr, betas=(0.9, 0.98), fused=True)
    state = None if state_dir is None else _State(Path(state_dir), _key(model, task, data, masks, settings))
    losses: list[float] = []
    seconds = 0.0
    if state is not None and (saved := state.load(accelerator.device)) is not None:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved["parameters"][name])
        optimizer.load_state_dict(saved["optimizer"])
        losses, seconds = saved["losses"], saved["seconds"]
        del saved
    resumed_from = len(losses)

    model.train(settings.mode == "full")  # frozen towers run without dropout
    start = time.monotonic() - seconds
    cuda = [accelerator.device] if accelerator.device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices=cuda),
            progress(label, settings.steps) as advance,
            _Batches(model, data, settings, resumed_from) as batches,
        ):
            advance(resumed_from)
            for step, batch in zip(range(resumed_from, settings.steps), batches, strict=True):
                torch.manual_seed(_seed(settings.seed, step))
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr * cosine(step, settings.steps, max(1, round(WARMUP * settings.steps)))
                with accelerator.autocast():
                    loss = model.loss(task, batch)
                losses.append(float(loss.detach()))
                if not math.isfinite(losses[-1]):
                    raise RequestError(
                        f"the {task} loss became {losses[-1]} at step {step + 1} of {settings.steps}: "
                        f"give a lower --lr than {settings.lr:g}"
                    )
                optimizer.zero_grad(set_to_none=True)
                accelerator.backward(loss)
                lock.zero_gradients()
                accelerator.clip_grad_norm_(list(trained.values()), CLIP)
                optimizer.step()
                lock.zero_weights()
                lock.check()
                advance(1, f"{label}, loss {np.mean(losses[-20:]):.3f}")
                if state is not None and state.due(save_seconds) and step + 1 < settings.steps:
                    state.save(trained, optimizer, losses, time.monotonic() - start)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(was_trained[name])
            parameter.grad = None
        model.eval()
    tenth = max(1, len(losses) // 10)
    return {
        **asdict(settings),
        "loss": float(np.mean(losses[-tenth:])),
        "first_loss": float(np.mean(losses[:tenth])),
        "seconds": time.monotonic() - start,
        "resumed_from": resumed_from,
    }


def _accelerator(settings: Settings) -> Accelerator:
    """Accelerate keeps one state per process and refuses another device or precision until that is cleared."""
    precision = "bf16" if settings.precision == "bf16" else "no"
    held = AcceleratorState._shared_state
    if held and (AcceleratorState().mixed_precision != precision or AcceleratorState().device.type != settings.device):
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=settings.device == "cpu", mixed_precision=precision)


def _groups(parameters: Any, settings: Settings) -> list[dict[str, Any]]:
    """Matrices decay; biases, LayerNorms and the temperature do not."""
    unique = list(parameters)
    decay, rest = [p for p in unique if p.ndim >= 2], [p for p in unique if p.ndim < 2]
    groups = [(decay, settings.weight_decay), (rest, 0.0)]
    return [{"params": params, "weight_decay": rate} for params, rate in groups if params]


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


# --- batches ----------------------------------------------------------------------------------------------------------


class _Batches:
    """The batches of a training from a given step on; the images of the next are read while one is computed."""

    def __init__(self, model: Model, data: CaptionData | VqaData, settings: Settings, start: int) -> None:
        self.model: Any = model  # which batches a family makes depends on its tasks
        self.data = data
        self.size = settings.batch_size
        self.seed = settings.seed
        self.steps = range(start, settings.steps)
        self.images = _Images(model, data.images)
        self.per_pass = len(data.questions if isinstance(data, VqaData) else data.captions) // self.size
        self.pass_number, self.order = -1, np.empty(0, np.int64)
        self.offsets = np.random.default_rng([self.seed, 2**32 - 1]).integers(2**31, size=len(data.images))

    def __enter__(self) -> Iterator[Batch]:
        return self._run()

    def __exit__(self, *error: object) -> None:
        self.images.close()

    def _run(self) -> Iterator[Batch]:
        ahead = self._start(self.steps.start)
        for step in self.steps:
            rows, ordered = ahead
            if step + 1 < self.steps.stop:
                ahead = self._start(step + 1)
            yield self._batch(rows, self.model.processor.normalise(self.images.take(ordered)), step)

    def _start(self, step: int) -> tuple[np.ndarray, _Ordered]:
        rows = self._rows(step)
        return rows, self.images.order(self._shown(rows))

    def _rows(self, step: int) -> np.ndarray:
        """Choose the images or questions of a step; what a pass leaves over (less than a batch) is left out."""
        number, place = divmod(step, self.per_pass)
        if self.pass_number != number:
            self.pass_number, self.order = number, self._order(np.random.default_rng([self.seed, number]))
        return self.order[place * self.size : (place + 1) * self.size]

    def _order(self, generator: np.random.Generator) -> np.ndarray:
        """Shuffle the images, or the questions in groups of a few about the same image."""
        if not isinstance(self.data, VqaData):
            return generator.permutation(len(self.data.captions))
        images = np.array([question.image for question in self.data.questions])
        shuffled = generator.permutation(len(images))
        by_image = shuffled[np.argsort(images[shuffled], kind="stable")]
        starts = np.flatnonzero(np.diff(images[by_image], prepend=-1))  # where an image's questions begin
        place = np.arange(len(images)) - np.repeat(starts, np.diff(starts, append=len(images)))
        group = np.cumsum(place % PER_IMAGE == 0) - 1
        rank = generator.permutation(group[-1] + 1)[group]
        return by_image[np.argsort(rank, kind="stable")]

    def _shown(self, rows: np.ndarray) -> np.ndarray:
        if isinstance(self.data, VqaData):
            return np.unique([self.data.questions[row].image for row in rows])
        return rows

    def _batch(self, rows: np.ndarray, pixels: np.ndarray, step: int) -> Batch:
        if isinstance(self.data, VqaData):
            questions = [self.data.questions[row] for row in rows]
            where = np.searchsorted(self._shown(rows), [question.image for question in questions])
            texts, answers = [q.question for q in questions], [q.answers for q in questions]
            return self.model.vqa_batch(pixels, where.tolist(), texts, answers)
        # Pass by pass an image goes through its captions in a circle, each image from a place of its own.
        number = step // self.per_pass
        captions = [self.data.captions[row] for row in rows]
        turns = (self.offsets[rows] + number).tolist()
        texts = [given[turn % len(given)] for given, turn in zip(captions, turns, strict=True)]
        return self.model.caption_batch(pixels, texts, rows.tolist())


class _Images:
    """Resized images, read by a few threads and kept in memory while all fit."""

    def __init__(self, model: Model, images: Sequence[Image.Image]) -> None:
        size = model.processor.image_size
        self.images = images
        self.resize = model.processor.resize
        fits = len(images) * size * size * 3 <= CACHE
        self.kept = np.empty((len(images), size, size, 3), np.uint8) if fits else None
        self.known = np.zeros(len(images), bool)
        self.pool = ThreadPoolExecutor(4)

    def close(self) -> None:
        """Stop reading."""
        self.pool.shutdown(cancel_futures=True)

    def order(self, rows: np.ndarray) -> _Ordered:
        """Start reading what is not in memory."""
        return [(row, None if self.known[row] else self.pool.submit(self._read, row)) for row in rows.tolist()]

    def take(self, ordered: _Ordered) -> np.ndarray:
        """Give the images that were ordered, uint8 [B, size, size, 3]."""
        taken = []
        for row, future in ordered:
            if future is None:
                assert self.kept is not None
                taken.append(self.kept[row])
                continue
            taken.append(future.result())
            if self.kept is not None:
                self.kept[row], self.known[row] = taken[-1], True
        return np.stack(taken)

    def _read(self, row: int) -> np.ndarray:
        return self.resize([self.images[row]])[0]


# --- saved trainings --------------------------------------------------------------------------------------------------


def _key(model: Model, task: str, data: CaptionData | VqaData, masks: Mapping[str, Tensor], settings: Settings) -> str:
    """Hash everything the result depends on but the pixels."""
    digest = hashlib.sha256(json.dumps([task, asdict(settings), len(data.images)]).encode())
    if isinstance(data, VqaData):
        digest.update(json.dumps([[q.image, q.question, q.answers] for q in data.questions]).encode())
    else:
        digest.update(json.dumps(data.captions).encode())
    for name, tensor in [*model.state_dict().items(), *sorted(masks.items())]:
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


class _State:
    """The saved state of a training: trained weights, optimizer, losses."""

    def __init__(self, folder: Path, key: str) -> None:
        self.path = folder / "state.pt"
        self.key = key
        self.saved = time.monotonic()
        self.took = 0.0

    def load(self, device: torch.device) -> dict[str, Any] | None:
        """Give the saved state of this very training; None when there is none, or only another's."""
        try:
            saved = torch.load(self.path, map_location=device, weights_only=True)
        except Exception:  # whatever a broken file raises: the training starts over
            return None
        return saved if isinstance(saved, dict) and saved.get("key") == self.key else None

    def due(self, every: float) -> bool:
        """Whether to save now."""
        return time.monotonic() - self.saved >= max(every, 9 * self.took)

    def save(self, trained: dict[str, nn.Parameter], optimizer: Any, losses: list[float], seconds: float) -> None:
        """Replace the file by the present state."""
        begin = time.monotonic()
        state = {
            "key": self.key,
            "parameters": {name: parameter.detach() for name, parameter in trained.items()},
            "optimizer": optimizer.state_dict(),
            "losses": losses,
            "seconds": seconds,
        }
        with atomic_path(self.path) as temporary:
            torch.save(state, temporary)
        self.saved = time.monotonic()
        self.took = self.saved - begin
