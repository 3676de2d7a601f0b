"""The loop of every training here: seeded steps of AdamW, saved every minute, continued in the same bits.

Everything random follows from (seed, step), so a run that is interrupted and resumed ends in the same bits.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from vlprune.data.sets import CaptionData, Data, NlvrData, VqaData
from vlprune.errors import RequestError
from vlprune.files import atomic_path
from vlprune.models.family import Batch, Model
from vlprune.progress import task as progress
from vlprune.training.batches import Batches
from vlprune.training.blocks import compiled, recomputed


CLIP = 1.0  # norm of the gradient; the authors do not clip, but short schedules need larger rates
SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Settings:
    """Options of a training with every choice made.

    Attributes:
        mode: "heads" or "full".
        steps: optimizer steps.
        batch_size: images or questions, at most what the data hold.
        lr: peak learning rate.
        weight_decay: of AdamW.
        seed: of everything random.
        precision: "bf16" or "fp32".
        device: "cpu" or "cuda".
        gradient_checkpointing: layers are computed again in the backward pass (`vlprune.training.blocks`).
        compile: layers are compiled.
    """

    mode: str
    steps: int
    batch_size: int
    lr: float
    weight_decay: float
    seed: int
    precision: str
    device: str
    gradient_checkpointing: bool = False
    compile: bool = False


class Watcher:
    """What a training does beside minimising the loss. This one does nothing."""

    def after_backward(self) -> None:
        """Called when the gradients are there, before they are clipped."""

    def after_step(self, step: int) -> None:
        """Called when the parameters have been changed.

        Args:
            step: the step just done, from 0.
        """

    def state(self) -> dict[str, Tensor]:
        """Tell what must be saved to continue."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` told.

        Args:
            state: tensors on the device of the training.
        """


def train(
    model: Model,
    task: str,
    data: Data,
    settings: Settings,
    parameters: Mapping[str, nn.Parameter],
    rate: Callable[[int], float],
    *,
    loss: Callable[[Batch], Tensor] | None = None,
    watcher: Watcher | None = None,
    depends: Iterable[tuple[str, Tensor]] = (),
    state_dir: Path | str | None = None,
    save_seconds: float = SAVE_SECONDS,
    label: str = "Training",
) -> dict[str, Any]:
    """Train in place: AdamW, gradients clipped to norm 1, one batch per step.

    A batch for retrieval and captioning has distinct images with one caption each; an epoch shows every caption once,
    in an order drawn anew. Questions about one image come together. Where classes are told apart by their names, an
    image comes with another text about its class every time. Images are not augmented.

    Args:
        model: on the device of `accelerator(settings)`; ends in eval mode.
        task: its task.
        data: training data.
        settings: steps, batch size, seed, ...
        parameters: what is trained, by name: the model's own, and others that `loss` uses; the model's rest is frozen.
        rate: step -> learning rate.
        loss: batch -> scalar; None = the model's loss of the task.
        watcher: told of every step.
        depends: names and tensors, beside the model's, that the result depends on.
        state_dir: folder where the training is saved every minute, and continued from if it was the same training (same
            weights, data, settings and `depends`); the caller removes it when the result is safe.
        save_seconds: time between two saves, at least; saves take at most a tenth of the time.
        label: what the progress bar says.

    Returns:
        dict[str, Any]: the `Settings` used; "loss" (mean over the last tenth of the steps), "first_loss" (over the
            first tenth), "seconds", "resumed_from" (a step, 0 = from the start).

    Raises:
        RequestError: data that cannot be read, or a loss that is not finite.
        MachineError: no space.
    """
    watcher, loss = watcher or Watcher(), loss or (lambda batch: model.loss(task, batch))
    trained, chosen = dict(parameters), {id(p) for p in parameters.values()}
    was_trained = {n: p.requires_grad for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(_groups(trained.values(), settings), lr=settings.lr, betas=(0.9, 0.98), fused=True)
    acc = accelerator(settings)
    state = None if state_dir is None else _State(Path(state_dir), _key(model, task, data, settings, depends))
    losses: list[float] = []
    seconds = 0.0
    if state is not None and (saved := state.load(acc.device)) is not None:
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved["parameters"][name])
        optimizer.load_state_dict(saved["optimizer"])
        watcher.restore(saved["watcher"])
        losses, seconds = saved["losses"], saved["seconds"]
        del saved
    resumed_from = len(losses)

    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
    model.train(settings.mode == "full")  # frozen towers run without dropout
    start = time.monotonic() - seconds
    steps = range(resumed_from, settings.steps)
    try:
        with (
            compiled(model) if settings.compile else nullcontext(),
            recomputed(model) if settings.gradient_checkpointing else nullcontext(),
            torch.random.fork_rng(devices=[acc.device] if acc.device.type == "cuda" else []),
            progress(label, settings.steps) as advance,
            Batches(model, data, settings.batch_size, settings.seed, steps) as batches,
        ):
            advance(resumed_from)
            for step, batch in zip(steps, batches, strict=True):
                torch.manual_seed(_seed(settings.seed, step))
                for group in optimizer.param_groups:
                    group["lr"] = rate(step)
                with acc.autocast():
                    value = loss(batch)
                losses.append(float(value.detach()))
                if not math.isfinite(losses[-1]):
                    raise RequestError(
                        f"the {task} loss became {losses[-1]} at step {step + 1} of {settings.steps}: "
                        f"give a lower --lr than {settings.lr:g}"
                    )
                optimizer.zero_grad(set_to_none=True)
                acc.backward(value)
                watcher.after_backward()
                acc.clip_grad_norm_(list(trained.values()), CLIP)
                optimizer.step()
                watcher.after_step(step)
                advance(1, f"{label}, loss {np.mean(losses[-20:]):.3f}")
                if state is not None and state.due(save_seconds) and step + 1 < settings.steps:
                    state.save(trained, optimizer, watcher, losses, time.monotonic() - start)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(was_trained[name])
        for parameter in [*model.parameters(), *trained.values()]:
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


def accelerator(settings: Settings) -> Accelerator:
    """Make what places, casts and differentiates.

    Accelerate keeps one state per process and refuses another device or precision until that is cleared.

    Args:
        settings: precision and device.

    Returns:
        Accelerator: for them.
    """
    precision = "bf16" if settings.precision == "bf16" else "no"
    held = AcceleratorState._shared_state
    if held and (AcceleratorState().mixed_precision != precision or AcceleratorState().device.type != settings.device):
        AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=settings.device == "cpu", mixed_precision=precision)


def _groups(parameters: Iterable[nn.Parameter], settings: Settings) -> list[dict[str, Any]]:
    """Matrices decay; biases, LayerNorms and the temperature do not."""
    unique = list(parameters)
    decay, rest = [p for p in unique if p.ndim >= 2], [p for p in unique if p.ndim < 2]
    groups = [(decay, settings.weight_decay), (rest, 0.0)]
    return [{"params": params, "weight_decay": rate} for params, rate in groups if params]


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


# --- saved trainings --------------------------------------------------------------------------------------------------


def _key(model: Model, task: str, data: Data, settings: Settings, depends: Iterable[tuple[str, Tensor]]) -> str:
    """Hash everything the result depends on but the pixels."""
    digest = hashlib.sha256(json.dumps([task, asdict(settings), len(data.images)]).encode())
    if isinstance(data, VqaData):
        digest.update(json.dumps([[q.image, q.question, q.answers] for q in data.questions]).encode())
    elif isinstance(data, NlvrData):
        digest.update(json.dumps([[p.left, p.right, p.sentence, p.label] for p in data.pairs]).encode())
    elif isinstance(data, CaptionData):
        digest.update(json.dumps(data.captions).encode())
    else:
        digest.update(json.dumps([data.labels, data.classes, data.templates]).encode())
    for name, tensor in [*model.state_dict().items(), *depends]:
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


class _State:
    """The saved state of a training: trained weights, optimizer, losses, what the watcher knows."""

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

    def save(
        self, trained: dict[str, nn.Parameter], optimizer: Any, watcher: Watcher, losses: list[float], seconds: float
    ) -> None:
        """Replace the file by the present state."""
        begin = time.monotonic()
        state = {
            "key": self.key,
            "parameters": {name: parameter.detach() for name, parameter in trained.items()},
            "optimizer": optimizer.state_dict(),
            "watcher": watcher.state(),
            "losses": losses,
            "seconds": seconds,
        }
        with atomic_path(self.path) as temporary:
            torch.save(state, temporary)
        self.saved = time.monotonic()
        self.took = self.saved - begin
