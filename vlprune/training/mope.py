"""Module-wise pruning errors (MoPE-CLIP, Lin et al., CVPR 2024): what a model loses without a head, neurons, a layer.

error(m) = Z[f] - Z[f without m], where Z is the mean recall of a retrieval among N calibration pairs, measured anew for
every attention head, every group of neurons of every feed-forward network, and every layer. Few pairs tell few recalls
apart: how much the contrastive loss grows tells modules of equal error apart.

Removing something in layer l changes nothing before it, nor in the other tower: the embeddings of the other tower are
kept, and so are the states at the input of the layer at hand (of that layer only), from which each evaluation starts.

Neurons are first sorted ("rewired") by a Taylor importance as in DynaBERT, |sum_in(w g) + b g_b| + |sum_out(w g)|,
summed over batches, g being the gradient of the training loss, and then cut into groups of equal size. The paper's code
is not public; rewiring and recalls at 1, 5 and 10 both ways follow third-party implementations.

Z is the mean over all ways in which a model can retrieve. Dual encoders have one, by their embeddings. BLIP has up to
three: its cross-attention and its decoder take no part in embeddings, and would have no error. The other two tell the
true caption of an image from a few similar ones, by the matching head and by the decoder's likelihood of the caption;
their recall is the share of images whose caption comes first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprune.data.sets import CaptionData
from vlprune.errors import RequestError
from vlprune.models.family import Batch, Group, Model, State, Steps, Tower, fingerprint
from vlprune.progress import task as progress
from vlprune.structured.mope import Table


RECALL_AT = (1, 5, 10)


@dataclass(frozen=True)
class MopeOptions:
    """How errors are measured.

    Attributes:
        pairs: calibration pairs, one caption per image, no caption twice; fewer when the data hold fewer.
        groups: neuron groups per feed-forward network.
        neurons: neurons per group, instead of `groups`.
        candidates: captions per image among which BLIP's matching head and decoder find the true one.
        batch_size: images that run together.
        seed: of the choice of pairs.
    """

    pairs: int = 100
    groups: int = 8
    neurons: int | None = None
    candidates: int = 3
    batch_size: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """What an evaluation found.

    Attributes:
        recall: Z, in [0, 1].
        loss: contrastive loss; for BLIP's other ways, cross-entropy of the candidates and of the caption's tokens.
    """

    recall: float
    loss: float


def ways_of(model: Model) -> list[str]:
    """Tell how a model can retrieve.

    Args:
        model: of any family.

    Returns:
        list[str]: "embeddings", "matching", "likelihood" as far as it has them; none for a model MoPE cannot measure.
    """
    if not hasattr(model, "cross_tower"):
        return ["embeddings"] if hasattr(model, "text_tower") else []
    retrieval = ["embeddings", "matching"] if "retrieval" in model.tasks else []
    return [*retrieval, "likelihood"] if "captioning" in model.tasks else retrieval


def choose_pairs(data: CaptionData, count: int, seed: int) -> list[tuple[int, str]]:
    """Draw images with one caption each, no caption twice: of two equal ones neither could be told from the other.

    Args:
        data: images with captions.
        count: pairs at most.
        seed: of the drawing.

    Returns:
        list[tuple[int, str]]: index of the image, caption.
    """
    generator = np.random.default_rng(seed)
    pairs: list[tuple[int, str]] = []
    seen: set[str] = set()
    for image in generator.permutation(len(data.captions)).tolist():
        fresh = [caption for caption in data.captions[image] if caption not in seen]
        if fresh and len(pairs) < count:
            pairs.append((image, fresh[int(generator.integers(len(fresh)))]))
            seen.add(pairs[-1][1])
    return pairs


class Evaluation:
    """Retrieval among calibration pairs, from the states before any layer.

    `enter` a tower, `score` removals in its first layer, `advance` to the next layer, and so on. Between these calls
    weights may be changed only in layers that have not been passed.

    Args:
        model: in eval mode; its weights are read at every call.
        data: calibration images and captions.
        options: pairs, batch size, ...

    Attributes:
        ways: how the model retrieves (`ways_of`).
        full: the score with all modules.

    Raises:
        RequestError: a model that cannot retrieve, or fewer than two pairs.
    """

    def __init__(self, model: Model, data: CaptionData, options: MopeOptions) -> None:
        self.model = cast(Any, model)  # which towers it has depends on the family
        self.ways = ways_of(model)
        if not self.ways:
            raise RequestError(
                f"mope measures retrieval, which {model.source.name} cannot do: it offers {', '.join(model.tasks)}; "
                "choose another method"
            )
        pairs = choose_pairs(data, options.pairs, options.seed)
        if len(pairs) < 2:
            raise RequestError(f"{data.name} has {len(pairs)} different captions for mope: it needs 2 pairs at least")
        self.pairs = len(pairs)
        size = options.batch_size
        self.texts = [caption for _, caption in pairs]
        self.chunks = [range(start, min(start + size, len(pairs))) for start in range(0, len(pairs), size)]
        self.batches: list[Batch] = [
            self.model.caption_batch(
                [data.images[pairs[i][0]] for i in chunk], [pairs[i][1] for i in chunk], [pairs[i][0] for i in chunk]
            )
            for chunk in self.chunks
        ]
        self.steps: dict[str, Steps] = {"image": self.model.image_tower()}
        if "embeddings" in self.ways:
            self.steps["text"] = self.model.text_tower()
        self.cross = {
            way: part for way, part in (("matching", "encoder"), ("likelihood", "decoder")) if way in self.ways
        }
        self.steps |= {way: self.model.cross_tower(part) for way, part in self.cross.items()}
        self.towers, self.stacks = self._places(model.towers())
        self.states: dict[str, list[State]] = {}  # of the passes through the tower at hand, before the layer at hand
        self.last: list[State] = []  # the image tower's, after its last layer, where texts attend to it
        self.outputs: dict[str, Tensor] = {}
        with torch.inference_mode():
            self._run("image", [self.steps["image"].start(batch) for batch in self.batches], 0, keep=True)
            if "text" in self.steps:
                self._run("text", [self.steps["text"].start(batch) for batch in self.batches], 0, keep=True)
            self.candidates = self._choose_candidates(options)
            self.cross_batches = [self._cross_batch(chunk) for chunk in self.chunks] if self.cross else []
            for way in self.cross:
                self._run(way, self._cross_start(way, self.last), 0, keep=True)
            self.full = self._score(self.outputs)

    def _places(self, towers: Sequence[Tower]) -> tuple[dict[str, str], dict[str, str]]:
        """Name the tower that each pass runs through, and the stack of layers in it."""
        prefixes = {"image": "vision", "text": "text_encoder", "matching": "text_encoder", "likelihood": "text_decoder"}
        names, stacks = {}, {}
        for name in self.steps:
            places = [(tower, stack) for tower in towers for stack in tower.stacks]
            places = [(tower, stack) for tower, stack in places if (tower.modality == "vision") == (name == "image")]
            fitting = [(tower, stack) for tower, stack in places if stack.startswith(prefixes[name])]
            tower, stacks[name] = (fitting or places)[0]
            names[name] = tower.name
        return names, stacks

    def passes(self, group: Group) -> set[str]:
        """Tell which passes run through a group.

        Args:
            group: of the tower at hand.

        Returns:
            set[str]: their names.
        """
        through = {pass_ for pass_ in self.states if any(name.startswith(self.stacks[pass_]) for name in group.names)}
        return through - {"text"} if group.cross else through

    def _choose_candidates(self, options: MopeOptions) -> Tensor:
        """Indices [N, k] of texts per image: its own, then the most similar others, or others at random."""
        count = min(options.candidates, self.pairs)
        if "text" in self.steps:
            preference = self.outputs["image"] @ self.outputs["text"].T
        else:
            generator = torch.Generator().manual_seed(options.seed)
            preference = torch.rand(self.pairs, self.pairs, generator=generator)
        return preference.fill_diagonal_(math.inf).argsort(dim=1, descending=True, stable=True)[:, :count].cpu()

    def _cross_batch(self, chunk: range) -> Batch:
        """The texts of all candidates of a chunk's images, and which image each is held against."""
        chosen = self.candidates[chunk.start : chunk.stop]
        no_images = np.empty((0, 3, 1, 1), np.float32)
        batch = self.model.caption_batch(
            no_images, [self.texts[i] for i in chosen.flatten().tolist()], chosen.flatten()
        )
        owner = torch.arange(len(chunk)).repeat_interleave(chosen.shape[1])
        return batch | {"owner": owner.to(self.model.device)}

    def _cross_start(self, way: str, images: Sequence[State]) -> list[State]:
        start = self.steps[way].start
        pairs = zip(self.cross_batches, images, strict=True)
        return [start(batch | {"image_x": image["x"]}) for batch, image in pairs]

    def _run(self, name: str, states: Sequence[State], first: int, keep: bool = False) -> tuple[Tensor, list[State]]:
        """Run a pass from a layer on."""
        steps = self.steps[name]
        outputs, ends = [], []
        for state in states:
            for layer in steps.layers[first:]:
                state = layer(state)
            if name != "image" or "text" in self.steps:  # without texts to compare with, images have no embeddings
                outputs.append(steps.finish(state))
            if name == "image" and self.cross:
                ends.append(state)
        output = torch.cat(outputs) if outputs else torch.empty(0)
        if keep:
            self.outputs[name] = output
            self.last = ends if name == "image" else self.last
        return output, ends

    @torch.inference_mode()
    def enter(self, tower: str) -> None:
        """Stand before the first layer of a tower.

        Args:
            tower: its name.
        """
        self.states = {}
        for name in self.steps:
            if self.towers[name] == tower:
                in_cross = name in self.cross
                start = self.steps[name].start
                self.states[name] = (
                    self._cross_start(name, self.last) if in_cross else [start(batch) for batch in self.batches]
                )

    @torch.inference_mode()
    def advance(self, layer: int) -> None:
        """Run the layer at hand with all its modules and stand before the next.

        Args:
            layer: the layer at hand.
        """
        for name, states in self.states.items():
            for i, state in enumerate(states):
                states[i] = self.steps[name].layers[layer](state)

    @torch.inference_mode()
    def score(self, layer: int, group: Group | None = None) -> Score:
        """Evaluate with the weights as they are now from the layer at hand on.

        Args:
            layer: the layer at hand.
            group: what is changed in it; None leaves the whole layer out.

        Returns:
            Score: recall and loss.
        """
        outputs, ends = dict(self.outputs), self.last
        for name in self.states if group is None else self.passes(group):
            outputs[name], last = self._run(name, self.states[name], layer + (group is None))
            ends = last if name == "image" else ends
        if "image" in self.states:
            for way in self.cross:
                outputs[way], _ = self._run(way, self._cross_start(way, ends), 0)
        return self._score(outputs)

    def _score(self, outputs: Mapping[str, Tensor]) -> Score:
        recalls, losses = [], []
        if "text" in outputs:
            recall, loss = retrieval_score(outputs["image"], outputs["text"], float(similarity_scale(self.model)))
            recalls.append(recall)
            losses.append(loss)
        for way in self.cross:
            scores = outputs[way].double().view(self.candidates.shape)
            recalls.append((scores[:, 1:] < scores[:, :1]).all(1).double().mean())
            of_candidates = F.cross_entropy(scores, torch.zeros_like(scores[:, 0], dtype=torch.long))
            losses.append(of_candidates if way == "matching" else -scores[:, 0].mean())
        score = Score(float(torch.stack(recalls).mean()), float(torch.stack(losses).mean()))
        if not math.isfinite(score.loss):
            raise RequestError(
                f"the retrieval loss of {self.model.source.name} is {score.loss}: its weights are broken"
            )
        return score


def similarity_scale(model: Any) -> Tensor:
    """What a family multiplies similarities by in its contrastive loss.

    Args:
        model: BLIP has one over it (`temp`), the others its logarithm (`logit_scale`).

    Returns:
        Tensor: a positive scalar.
    """
    return 1 / model.temp if hasattr(model, "temp") else model.logit_scale.exp()


def retrieval_score(images: Tensor, texts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Score retrieval among pairs; ties count against the model.

    Args:
        images: unit vectors [N, E].
        texts: unit vectors [N, E]; row i belongs to image i.
        scale: of the similarities in the contrastive loss.

    Returns:
        tuple[Tensor, Tensor]: mean of recall at 1, 5 and 10 both ways; contrastive loss. Scalars, float64.
    """
    similarity = images.double() @ texts.double().T
    own = similarity.diagonal()
    ranks = torch.cat([(similarity >= own[:, None]).sum(1), (similarity >= own).sum(0)])  # 1 = first
    recall = torch.stack([(ranks <= k).double().mean() for k in RECALL_AT]).mean()
    target = torch.arange(len(own), device=own.device)
    logits = similarity * scale
    return recall, (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


# --- modules ----------------------------------------------------------------------------------------------------------


@contextmanager
def without(group: Group, units: Tensor) -> Iterator[None]:
    """Take units out of a model while the block runs: what they put out reaches nothing. Restored to the bit.

    Args:
        group: a feed-forward network, or an attention.
        units: indices of neurons, or of heads.

    Yields:
        None: nothing.
    """
    if group.kind == "attention":
        units = (units[:, None] * group.shape[1] + torch.arange(group.shape[1])).flatten()
    weights = list({id(linear.weight): linear.weight for linear in group.outer}.values())
    units = units.to(weights[0].device)
    with torch.no_grad():
        saved = [weight[:, units].clone() for weight in weights]
        for weight in weights:
            weight[:, units] = 0.0
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, columns in zip(weights, saved, strict=True):
                weight[:, units] = columns


def neuron_importance(model: Model, batches: Sequence[Batch], seed: int = 0) -> dict[str, Tensor]:
    """Taylor importance of the neurons of every feed-forward network (DynaBERT, as METHODS gives it for MoPE).

    Args:
        model: in eval mode; its loss is that of the tasks it can be trained for with captions.
        batches: made by `caption_batch`.
        seed: of the negatives that losses draw.

    Returns:
        dict[str, Tensor]: group name -> [N], float64, on the CPU.
    """
    ends = {group.name: (group.inner[0][0], group.outer[0]) for group in model.groups() if group.kind == "ffn"}
    tasks = [task for task in model.tasks if task in ("retrieval", "captioning")] or ["retrieval"]
    used = [p for pair in ends.values() for linear in pair for p in (linear.weight, linear.bias) if p is not None]
    wanted = {id(parameter): parameter for parameter in used}
    was = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    cuda = [model.device] if model.device.type == "cuda" else []
    total = {name: torch.zeros(first.out_features, dtype=torch.float64) for name, (first, _) in ends.items()}
    try:
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in wanted)
        with torch.enable_grad(), torch.random.fork_rng(devices=cuda):
            for number, batch in enumerate(batches):
                torch.manual_seed(seed + number)
                loss = torch.stack([model.loss(task, batch) for task in tasks]).sum()
                found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
                products = {
                    key: (parameter.detach() * gradient).double().cpu()
                    for (key, parameter), gradient in zip(wanted.items(), found, strict=True)
                    if gradient is not None
                }
                for name, (first, last) in ends.items():
                    if id(first.weight) not in products:
                        continue  # the loss takes another way
                    rows = products[id(first.weight)].sum(1)
                    if first.bias is not None:
                        rows += products[id(first.bias)]
                    total[name] += rows.abs() + products[id(last.weight)].sum(0).abs()
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(was[id(parameter)])
    return total


def neuron_groups(importance: Tensor, options: MopeOptions) -> list[Tensor]:
    """Sort neurons by importance and cut them into groups, of multiples of 8 neurons where the width is one.

    Args:
        importance: [N].
        options: `groups` or `neurons`.

    Returns:
        list[Tensor]: indices, most important first.
    """
    block = 8 if len(importance) % 8 == 0 else 1
    blocks = len(importance) // block
    if options.neurons is not None:
        count = math.ceil(blocks / max(1, options.neurons // block))
    else:
        count = min(options.groups, blocks)
    edges = [round(i * blocks / count) * block for i in range(count + 1)]
    order = importance.argsort(descending=True, stable=True)
    return [order[start:stop] for start, stop in zip(edges, edges[1:], strict=False)]


def measure(
    model: Model,
    data: CaptionData,
    options: MopeOptions | None = None,
    *,
    stage: Literal["pretraining", "task"] = "pretraining",
    label: str = "Measuring modules",
) -> Table:
    """Measure the error of every head, neuron group and layer.

    Args:
        model: any that can retrieve (`ways_of`); its weights are changed while this runs, and restored to the bit.
        data: calibration images and captions.
        options: None = all defaults.
        stage: what the table shall say: "pretraining" (the model as it is given) or "task" (fine-tuned before).
        label: what the progress bar says.

    Returns:
        Table: errors, with the fingerprint of the model.

    Raises:
        RequestError: wrong options, too few captions, or a model that cannot retrieve.
    """
    options = options or MopeOptions()
    for name in ("pairs", "groups", "neurons", "candidates", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < (2 if name in ("pairs", "candidates") else 1):
            raise RequestError(f"mope with {name} = {value}: give a larger number")
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        evaluation = Evaluation(model, data, options)
        importance = neuron_importance(model, evaluation.batches, options.seed)
        members = {name: neuron_groups(scores, options) for name, scores in importance.items()}
        units, layers = _errors(model, evaluation, members, label)
    finally:
        for module in training:
            module.training = True
    metadata = {
        "model": fingerprint(model.layers()),
        "dataset": data.name,
        "stage": stage,
        "ways": evaluation.ways,
        **asdict(options),
        "pairs": evaluation.pairs,
        "recall": evaluation.full.recall,
        "loss": evaluation.full.loss,
    }
    return Table(units, members, layers, metadata)


def _errors(
    model: Model, evaluation: Evaluation, members: Mapping[str, list[Tensor]], label: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    groups, towers = model.groups(), model.towers()
    units: dict[str, list[list[float]]] = {group.name: [] for group in groups}
    layers: dict[str, list[list[float]]] = {tower.name: [] for tower in towers}
    full = evaluation.full
    parts = {group.name: members.get(group.name) or _heads(group) for group in groups}
    # The bar counts layers run, so that the rest of the time it tells is right: later removals cost less.
    work = sum(tower.depth - layer for tower in towers for layer in range(tower.depth))
    work += sum(len(parts[g.name]) * (t.depth - g.layer) for g in groups for t in towers if t.name == g.tower)

    def error(score: Score) -> list[float]:
        return [full.recall - score.recall, score.loss - full.loss]

    with progress(label, work) as advance:
        for tower in towers:
            evaluation.enter(tower.name)
            for layer in range(tower.depth):
                ahead = tower.depth - layer
                text = f"{label}, {tower.name} layer {layer + 1} of {tower.depth}"
                for group in groups:
                    if (group.tower, group.layer) != (tower.name, layer):
                        continue
                    for part in parts[group.name]:
                        with without(group, part):
                            units[group.name].append(error(evaluation.score(layer, group)))
                        advance(ahead, text)
                layers[tower.name].append(error(evaluation.score(layer)))
                advance(ahead, text)
                evaluation.advance(layer)
    return (
        {name: torch.tensor(errors, dtype=torch.float64) for name, errors in units.items()},
        {name: torch.tensor(errors, dtype=torch.float64) for name, errors in layers.items()},
    )


def _heads(group: Group) -> list[Tensor]:
    return list(torch.arange(group.shape[0]).split(1))
