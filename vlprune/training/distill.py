"""Distillation from the dense model: what a pruned dual encoder is trained with after MoPE (Lin et al., CVPR 2024).

    L = L_task + a L_sim + b L_feat + c L_hid

L_sim is cross-modal: the cross-entropy of the student's similarities under the teacher's, both as softmax over the
batch, from images to texts and back, halved. L_feat and L_hid are uni-modal: half the mean squared difference of
embeddings of unit length, and of the token states behind every layer, summed over layers and towers; padding is not
compared. A layer of a student that lost others stands for the layer it was.

Losses and weights (a, b, c) = (1, 1000, 1) are those of a third-party implementation, which calls them the formal MoPE
loss weights; the paper's own code is not public, so that they are its values is likely, but not confirmed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprune.errors import RequestError
from vlprune.models.family import Batch, Model, Tower
from vlprune.training.mope import similarity_scale


TOWERS = ("image", "text")


@dataclass(frozen=True)
class DistillWeights:
    """Weights of the losses beside the task's.

    Attributes:
        sim: a, of the similarities.
        feat: b, of the embeddings.
        hid: c, of the states behind the layers.
    """

    sim: float = 1.0
    feat: float = 1000.0
    hid: float = 1.0


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """L_sim.

    Args:
        student: similarities over temperature, [image, text].
        teacher: the same.

    Returns:
        Tensor: a scalar; smallest, the entropy of the teacher's, where both are equal.
    """
    rows = F.cross_entropy(student, teacher.softmax(1))
    return (rows + F.cross_entropy(student.T, teacher.T.softmax(1))) / 2


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """L_feat of one tower.

    Args:
        student: unit vectors [B, E].
        teacher: the same.

    Returns:
        Tensor: a scalar.
    """
    return F.mse_loss(student, teacher) / 2


def hidden_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor | None) -> Tensor:
    """L_hid of one tower.

    Args:
        student: per layer states [B, T, D].
        teacher: those of the layers that the student's were, [B, T, D] each.
        mask: [B, T], 0 = padding; None = all count.

    Returns:
        Tensor: a scalar.
    """
    losses = []
    for mine, other in zip(student, teacher, strict=True):
        squares = (mine - other).square().mean(2)
        losses.append(squares.mean() if mask is None else (squares * mask).sum() / mask.sum())
    return torch.stack(losses).sum() / 2


class Teacher:
    """A dense model that students of its family are trained to resemble.

    Args:
        model: the dense model; it is only read, without gradients.
        kept: tower name -> for each of the student's layers the teacher's layer it was; missing towers have all.
        weights: of the losses; None = the defaults.
    """

    def __init__(
        self,
        model: Model,
        kept: Mapping[str, Sequence[int]] | None = None,
        weights: DistillWeights | None = None,
    ) -> None:
        self.model = cast(Any, model)  # which towers it has depends on the family
        self.kept = {name: list(layers) for name, layers in (kept or {}).items()}
        self.weights = weights or DistillWeights()

    def check(self, student: Model, task: str) -> None:
        """Refuse students that cannot be compared with the teacher.

        Args:
            student: what is to be trained.
            task: what for.

        Raises:
            RequestError: a task without embeddings, another family, or layers that do not match.
        """
        if task != "retrieval" or not hasattr(self.model, "text_tower"):
            raise RequestError(f"distillation compares embeddings, which {task} has none of: it is for retrieval only")
        if student.family != self.model.family:
            raise RequestError(
                f"a {self.model.family} model cannot teach a {student.family} model: give one of its family"
            )
        depths = {tower.name: tower.depth for tower in self.model.towers()}
        for tower in student.towers():
            layers = self.layers_of(tower)
            if len(layers) != tower.depth or any(not 0 <= layer < depths.get(tower.name, 0) for layer in layers):
                raise RequestError(
                    f"the {tower.name} tower has {tower.depth} layers, its teacher's {depths.get(tower.name, 0)}: "
                    "tell which of them were kept"
                )

    def layers_of(self, tower: Tower) -> list[int]:
        """Tell which of the teacher's layers a student's were.

        Args:
            tower: the student's.

        Returns:
            list[int]: one index per layer of the student.
        """
        if tower.name in self.kept:
            return self.kept[tower.name]
        return list(range(next((t.depth for t in self.model.towers() if t.name == tower.name), 0)))

    def depends(self) -> list[tuple[str, Tensor]]:
        """Tell what a training with this teacher depends on.

        Returns:
            list[tuple[str, Tensor]]: names and tensors.
        """
        weights = torch.tensor([self.weights.sim, self.weights.feat, self.weights.hid])
        kept = [(f"kept/{name}", torch.tensor(layers)) for name, layers in sorted(self.kept.items())]
        state = [(f"teacher/{name}", tensor) for name, tensor in self.model.state_dict().items()]
        return [("distillation", weights), *kept, *state]

    def loss(self, student: Model, batch: Batch) -> Tensor:
        """The loss of a batch of retrieval.

        Args:
            student: the model in training, on the teacher's device; its loss runs once.
            batch: made by `caption_batch`.

        Returns:
            Tensor: a scalar, L_task + a L_sim + b L_feat + c L_hid.
        """
        with recorded(student) as states:
            task = student.loss("retrieval", batch)
        terms = self.terms(student, batch, states)
        weights = self.weights
        return task + weights.sim * terms["sim"] + weights.feat * terms["feat"] + weights.hid * terms["hid"]

    def terms(self, student: Model, batch: Batch, states: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
        """The losses beside the task's, unweighted.

        Args:
            student: the model in training.
            batch: made by `caption_batch`.
            states: what `recorded` found while the student ran the batch.

        Returns:
            dict[str, Tensor]: scalars "sim", "feat", "hid".
        """
        mine, others, hidden = {}, {}, []
        texts = batch.get("encoder_mask", batch["attention_mask"])  # what the student's loss reads
        batch = batch | {"attention_mask": texts}
        for name, tower in _towers(student).items():
            with torch.no_grad():
                steps = getattr(self.model, f"{name}_tower")()
                state, kept = steps.start(batch), []
                for layer in steps.layers:
                    state = layer(state)
                    kept.append(state["x"])
                others[name] = steps.finish(state).float()
                own = getattr(student, f"{name}_tower")()
                begin = own.start(batch)
            mine[name] = own.finish(begin | {"x": states[name][-1]}).float()
            was = [kept[layer].float() for layer in self.layers_of(tower)]
            hidden.append(hidden_loss([x.float() for x in states[name]], was, texts if name == "text" else None))
        with torch.no_grad():
            target = others["image"] @ others["text"].T * similarity_scale(self.model)
        return {
            "sim": similarity_loss(mine["image"] @ mine["text"].T * similarity_scale(student), target),
            "feat": torch.stack([feature_loss(mine[name], others[name]) for name in TOWERS]).sum(),
            "hid": torch.stack(hidden).sum(),
        }


def _towers(model: Model) -> dict[str, Tower]:
    """The towers whose ends are embeddings."""
    found = {"vision": "image", "text": "text"}
    return {found[tower.name]: tower for tower in model.towers() if tower.name in found}


@contextmanager
def recorded(model: Model) -> Iterator[dict[str, list[Tensor]]]:
    """Record what the layers of both towers put out the first time they run, so that nothing runs twice.

    BLIP's text encoder runs a second time to match images; the first time it makes embeddings.

    Args:
        model: a dual encoder, or BLIP.

    Yields:
        dict[str, list[Tensor]]: "image" and "text" -> states behind each layer [B, T, D], filled as they run.
    """
    states: dict[str, list[Tensor]] = {name: [] for name in TOWERS}
    handles = []
    for name, tower in _towers(model).items():
        stack = cast(nn.ModuleList, model.get_submodule(tower.stacks[0]))
        for index, layer in enumerate(stack):

            def keep(module: nn.Module, inputs: Any, output: Tensor, name: str = name, index: int = index) -> None:
                if len(states[name]) == index:
                    states[name].append(output)

            # BLIP's text layers are run in parts, of which this is the last.
            last = layer.output if hasattr(layer, "feed_forward_chunk") else layer
            handles.append(cast(nn.Module, last).register_forward_hook(keep))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
