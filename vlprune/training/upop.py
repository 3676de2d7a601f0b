"""UPop's search (Shi et al., ICML 2023): masks on the units of all towers fade while the weights learn around them.

    plan, info = search(model, task, data, ratio=0.5)     the model is trained in place, and not yet cut
    cut(model, plan)                                      changes no output: what goes is multiplied by 0 already
    finetune(model, task, data, {})                       the paper's retraining

One mask entry ζ per dimension of an attention's heads, multiplied on query, key and value of every head, and one per
hidden neuron, before the activation. AdamW trains the weights at a constant rate; the masks are not trained, their
gradients only add up (explicitly, in float32, whatever the forward pass computes in), and now and then decide which
units fade (`vlprune.structured.upop`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vlprune.data.sets import Data
from vlprune.errors import RequestError
from vlprune.models.family import Group, Model
from vlprune.structured import upop
from vlprune.structured.plan import ROUND_TO, Plan, removed
from vlprune.training.finetune import AUTHORS, FinetuneOptions, settle
from vlprune.training.loop import SAVE_SECONDS, Watcher, accelerator, train


RATE = 0.3  # of the peak rate of fine-tuning, where that is given: what the search is not to exceed all the time
UPDATES = 50  # the authors' schedules update the masks 50 to 200 times: shorter searches update more often than N


@dataclass(frozen=True)
class Published:
    """The authors' search of one task.

    Attributes:
        lr: constant learning rate.
        epochs: ratio p -> passes over the data, at the ratios they tried; interpolated between them.
        interval: N, steps from one update of the masks to the next.
    """

    lr: float
    epochs: dict[float, float]
    interval: int


PUBLISHED = {  # github.com/sdc17/UPop at cfbc4ea: scripts and `compress_*.py`; retrieval is COCO's
    "retrieval": Published(1e-5, {0.5: 6, 0.75: 9}, 200),
    "captioning": Published(1e-5, {0.5: 5, 0.75: 8}, 100),
    "vqa": Published(2e-5, {0.5: 10, 0.75: 15}, 1000),
    "zero-shot": Published(1e-5, {0.5: 6, 0.75: 9}, 200),  # their CLIP, trained for retrieval: the loss is the same
    "nlvr": Published(3e-6, {0.5: 15, 0.667: 20, 0.75: 23, 0.8: 24, 0.9: 27}, 50),
    "classification": Published(1e-4, {0.5: 60}, 800),  # DeiT-S on ImageNet
}


@dataclass(frozen=True)
class SearchOptions:
    """What a caller may choose.

    Attributes:
        training: of the weights, as for the fine-tuning after it; `mode` does not count, all weights are trained. None
            in it = what the checkpoint suggests, else UPop's authors' value.
        lr: constant learning rate; None = `RATE` of the peak rate that `training` or the checkpoint says, else UPop's
            authors' value.
        interval: steps between two updates of the masks; None = the authors', or so many that there are `UPDATES`.
        round_to: final widths are multiples of it; 1 = any width.
        costs: what the ratio counts: "weights", of which the ratio is the fraction removed, or "heads", the paper's (3
            per head of an attention dimension, 1 per neuron), whose fraction of the weights is another.
    """

    training: FinetuneOptions = field(default_factory=FinetuneOptions)
    lr: float | None = None
    interval: int | None = None
    round_to: int = ROUND_TO
    costs: Literal["weights", "heads"] = "weights"


def search(
    model: Model,
    task: str,
    data: Data,
    ratio: float,
    options: SearchOptions | None = None,
    *,
    state_dir: Path | str | None = None,
    save_seconds: float = SAVE_SECONDS,
    label: str = "Searching",
) -> tuple[Plan, dict[str, Any]]:
    """Find which units a task can do without, and train the weights to do without them, in place.

    Args:
        model: made by `Model.for_task`; ends on the device it was trained on, in eval mode, uncut. Its weights fit the
            plan: cut before anything else.
        task: its task.
        data: training data.
        ratio: p, to be removed: of the prunable weights, or of what `options.costs` says.
        options: None = all defaults.
        state_dir: as for `train`.
        save_seconds: as for `train`.
        label: what the progress bar says.

    Returns:
        tuple[Plan, dict[str, Any]]: what to keep, every head of an attention the same dimensions; what `train` tells,
            and "interval", "updates" (how many), "costs", "achieved" and "per_modality" (fractions of the weights
            removed).

    Raises:
        RequestError: wrong options, a ratio that leaves nothing, unreadable data, or a loss that is not finite.
        MachineError: no CUDA, no space.
    """
    options = options or SearchOptions()
    # Not compiled: the masks are multiplied inside the layers.
    training = replace(options.training, mode="full", compile=False)
    settings = settle(training, model, task, data, _authors(ratio))
    if options.lr is not None and not 0 < options.lr < math.inf:
        raise RequestError(f"a search with lr = {options.lr!r}: give a positive number")
    given = options.training.lr is not None or "lr" in model.options.get("finetune", {})
    settings = replace(settings, lr=options.lr or settings.lr * (RATE if given else 1.0))
    groups = model.groups()
    if options.costs not in ("weights", "heads"):
        raise RequestError(f"unknown costs {options.costs!r}: choose weights or heads")
    if options.round_to < 1 or (options.interval is not None and options.interval < 1):
        raise RequestError(f"round_to {options.round_to}, interval {options.interval}: give 1 or more")
    costs = upop.weight_costs(groups) if options.costs == "weights" else upop.head_costs(groups)
    upop.check_ratio(groups, costs, ratio, options.round_to)
    interval = options.interval or min(
        PUBLISHED[task].interval if task in PUBLISHED else settings.steps, max(1, settings.steps // UPDATES)
    )
    model.to(accelerator(settings).device)
    masks = Masks(groups, costs, ratio, settings.steps, interval, options.round_to)
    chosen = torch.tensor([ratio, interval, options.round_to, options.costs == "heads"], dtype=torch.float64)
    with multiplied(groups, masks.alphas):
        info = train(
            model, task, data, settings, dict(model.named_parameters()), lambda _: settings.lr,
            watcher=masks, depends=[("search", chosen)], state_dir=state_dir, save_seconds=save_seconds, label=label,
        )  # fmt: skip
    plan = upop.plan_of(groups, masks.kept)
    summary = removed(plan, groups, model.towers())
    updates = len({*range(0, settings.steps, interval), settings.steps - 1})
    info |= {"interval": interval, "updates": updates, "costs": options.costs}
    return plan, info | {key: summary[key] for key in ("achieved", "per_modality")}


def _authors(ratio: float) -> dict[str, dict[str, float]]:
    """Learning rate and epochs of the search where UPop tells them; batch sizes are those of fine-tuning."""
    authors = {task: dict(values) for task, values in AUTHORS.items()}
    for task in PUBLISHED.keys() & authors.keys():
        told = PUBLISHED[task]
        epochs = float(np.interp(ratio, list(told.epochs), list(told.epochs.values())))
        authors[task] |= {"lr": told.lr, "epochs": epochs}
    return authors


class Masks(Watcher):
    """The masks of a search, one per group.

    Args:
        groups: of the model, on its device.
        costs: of a unit of each group.
        ratio: p, to be removed in the end.
        steps: T.
        interval: N, steps from one update to the next; the last step updates, too.
        round_to: multiple of the final widths.

    Attributes:
        alphas: group name -> ζ, float32 [K] or [N], whose gradients the loss gives.
        gradients: group name -> their sum over all steps so far, float32.
        kept: group name -> bool, what the last update kept.
    """

    def __init__(
        self, groups: Sequence[Group], costs: upop.Costs, ratio: float, steps: int, interval: int, round_to: int
    ) -> None:
        self.kinds: dict[str, str] = {group.name: group.kind for group in groups}
        self.costs, self.ratio, self.steps, self.interval, self.round_to = costs, ratio, steps, interval, round_to
        ones = {g.name: torch.ones(g.shape[-1], device=g.inner[0][0].weight.device) for g in groups}
        self.alphas = {name: one.clone().requires_grad_() for name, one in ones.items()}
        self.gradients = {name: torch.zeros_like(one) for name, one in ones.items()}
        self.kept = {name: one.bool() for name, one in ones.items()}

    def after_backward(self) -> None:
        """Add this step's gradients."""
        for name, alpha in self.alphas.items():
            if alpha.grad is not None:
                self.gradients[name] += alpha.grad
                alpha.grad = None

    def after_step(self, step: int) -> None:
        """Update the masks when it is time.

        Args:
            step: t, from 0.
        """
        last = step == self.steps - 1
        if step % self.interval and not last:
            return
        scores = upop.standardise(self.gradients, self.kinds)
        if last and self.round_to > 1:
            self.kept = upop.keep_multiples(scores, self.costs, self.ratio, self.round_to)
        else:
            self.kept = upop.keep(scores, self.costs, upop.schedule(self.ratio, step, self.steps))
        self._set(upop.alphas(self.kept, upop.schedule(self.ratio, step, self.steps), self.ratio))

    def _set(self, values: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, alpha in self.alphas.items():
                alpha.copy_(values[name])

    def state(self) -> dict[str, Tensor]:
        """Tell masks and gradients."""
        state = {f"alpha/{name}": alpha.detach() for name, alpha in self.alphas.items()}
        return state | {f"gradient/{name}": gradient for name, gradient in self.gradients.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` told.

        Args:
            state: on any device.
        """
        self._set({name: state[f"alpha/{name}"] for name in self.alphas})
        for name, gradient in self.gradients.items():
            gradient.copy_(state[f"gradient/{name}"])


@contextmanager
def multiplied(groups: Sequence[Group], alphas: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply the units of groups by masks, in every module that computes them, as long as the context lasts.

    Args:
        groups: of a model.
        alphas: group name -> float32 [K] or [N]; read anew in every forward pass.

    Yields:
        None: nothing.
    """
    with ExitStack() as stack:
        for group in groups:
            heads = group.shape[0] if group.kind == "attention" else 1
            # How often a Linear's rows hold the units: query, key and value may be one matrix.
            for linear, parts in Counter(linear for linear, _ in set(group.inner)).items():
                hook = linear.register_forward_hook(_hook(alphas, group.name, heads * parts))
                stack.callback(hook.remove)
        yield


def _hook(alphas: Mapping[str, Tensor], name: str, times: int) -> Any:
    def multiply(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        # In float32, so that the gradient sums over the tokens in float32, under autocast, too.
        return (output.float() * alphas[name].repeat(times)).to(output.dtype)

    return multiply
