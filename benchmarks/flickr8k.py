"""Photographs: pretrain a small BLIP on Flickr8k, prune it at three ratios by two methods, and report the cost.

python benchmarks/flickr8k.py                 # writes docs/results/flickr8k.md; run again, it takes up where it stopped
python benchmarks/flickr8k.py --quick         # a tiny model, a few steps, 64 images: does it run
python benchmarks/flickr8k.py --seeds 3       # fine-tune with three seeds

The photographs are for research only: neither they nor weights trained on them belong into the repository.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BlipConfig

from vlprune import pipeline
from vlprune.data import CaptionData, open_data
from vlprune.errors import VlpruneError
from vlprune.files import atomic_path, read_json, write_json
from vlprune.models import load
from vlprune.models.blip import Blip, new
from vlprune.models.family import Source
from vlprune.models.processor import Processor, wordpiece_tokenizer
from vlprune.report.environment import environment
from vlprune.report.schema import Metrics, Report
from vlprune.report.summary import ZEROS, points, title
from vlprune.training.pretrain import pretrain, resized


ROOT = Path(__file__).parents[1]
METHODS = ("multiflow", "omp")
TASKS = ("retrieval", "captioning", "vqa")
HEADINGS = {"retrieval": "Retrieval", "captioning": "Captioning", "vqa": "Visual question answering"}
SHOWN = {
    "retrieval": ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10"),
    "captioning": ("cider",),
    "vqa": ("accuracy",),
}
COMPARED = {"retrieval": ("i2t_r10", "t2i_r10"), "captioning": ("cider",), "vqa": ("accuracy",)}


@dataclass(frozen=True)
class Round:
    """One round of pretraining.

    Attributes:
        steps: optimizer steps.
        batch: images per step.
        lr: peak learning rate.
        schedule: steps of the learning-rate schedule, of which the round takes the first; None = all.
        strong: against overfitting: `augmented` images, more weight decay, less caption loss, no matching.
        hidden_words: share of the words hidden from the text encoder.
        average: decay of the moving average of the weights that the round ends with; 0 = none.
        all_images: the images kept aside take part, too.
    """

    steps: int
    batch: int
    lr: float
    schedule: int | None = None
    strong: bool = True
    hidden_words: float = 0.0
    average: float = 0.0
    all_images: bool = False


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model, of its pretraining and of what follows.

    Attributes:
        image: side of the input image in pixels.
        patch: side of a patch.
        width: of both towers.
        head: width of an attention head.
        vision: layers of the vision tower.
        text: layers of the text towers.
        vocabulary: tokens.
        rounds: of pretraining.
        held_out: images of the train split that only watch the pretraining.
        ratios: fractions of the prunable weights to remove.
        calibration: images of the calibration pass.
        rerank: candidates per query that the matching head re-ranks.
        samples: test samples per task at most.
        finetune: task -> steps, samples per step, learning rate of fine-tuning.
    """

    image: int = 96
    patch: int = 16
    width: int = 192
    head: int = 32
    vision: int = 6
    text: int = 3
    vocabulary: int = 5000
    rounds: tuple[Round, ...] = (
        Round(2600, 96, 1e-3, strong=False),
        Round(400, 256, 9e-4, schedule=800, average=0.998),
        Round(450, 256, 8e-4, hidden_words=0.3, average=0.996, all_images=True),
        Round(450, 256, 8e-4, hidden_words=0.3, average=0.996, all_images=True),
        Round(80, 256, 3e-4, strong=False, hidden_words=0.3, average=0.97, all_images=True),
    )
    held_out: int = 500
    ratios: tuple[float, ...] = (0.63, 0.75, 0.9)
    calibration: int = 512
    rerank: int = 0
    samples: int = 1000
    finetune: tuple[tuple[int, int, float], ...] = ((40, 64, 3e-4), (40, 64, 3e-4), (120, 64, 5e-4))


FULL = Sizes()
QUICK = Sizes(
    image=32,
    width=64,
    vision=2,
    text=2,
    vocabulary=500,
    rounds=(Round(20, 16, 1e-3, strong=False), Round(10, 16, 5e-4, 12, hidden_words=0.3, average=0.9, all_images=True)),
    held_out=16,
    ratios=(0.9,),
    calibration=32,
    rerank=4,
    samples=64,
    finetune=((3, 8, 3e-4),) * 3,
)


# --- pretraining ------------------------------------------------------------------------------------------------------


def fresh(sizes: Sizes, captions: CaptionData, seed: int) -> Blip:
    """Make the untrained model, its vocabulary learned from the captions."""
    tokenizer = wordpiece_tokenizer([text for texts in captions.captions for text in texts], sizes.vocabulary)
    tower = {
        "hidden_size": sizes.width,
        "intermediate_size": 4 * sizes.width,
        "num_attention_heads": sizes.width // sizes.head,
        "initializer_range": 0.02,
    }
    ids = tokenizer.convert_tokens_to_ids
    config = BlipConfig(
        vision_config={
            **tower,
            "num_hidden_layers": sizes.vision,
            "patch_size": sizes.patch,
            "image_size": sizes.image,
            "layer_norm_eps": 1e-6,
        },
        text_config={
            **tower,
            "num_hidden_layers": sizes.text,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 64,
            "encoder_hidden_size": sizes.width,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.0,
            "bos_token_id": ids("[DEC]"),
            "enc_token_id": ids("[ENC]"),
            "sep_token_id": ids("[SEP]"),
            "eos_token_id": ids("[SEP]"),
            "pad_token_id": ids("[PAD]"),
            "label_smoothing": 0.1,
        },
        image_text_hidden_size=128,
    )
    processor = Processor(tokenizer, sizes.image, ids("[DEC]"), ids("[ENC]"))
    model = new(config, processor, Source("blip-flickr8k", "benchmarks/flickr8k.py"), seed)
    model.options = {"retrieval": {"rerank": sizes.rerank}}
    return model


def crop_and_flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Cut a random window (60 to 100 % of each side) out of every image, stretch it, mirror every second image."""
    n = len(pixels)
    scale = 0.6 + 0.4 * torch.rand(n, 2, generator=generator)  # of x and y
    shift = (2 * torch.rand(n, 2, generator=generator) - 1) * (1 - scale)
    mirror = 1 - 2 * torch.randint(2, (n,), generator=generator)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale[:, 0] * mirror, scale[:, 1], shift
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


def augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Make memorising hard: random window, mirror, brightness and contrast, a quarter of the patches blanked.

    The window has 50 to 100 % of each side; colours keep their hue, because captions name them.
    """
    n, _, height, width = pixels.shape

    def uniform(*shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=generator)

    scale = 0.5 + 0.5 * uniform(2)  # of x and y
    mirror = 1 - 2 * (uniform() < 0.5).float()
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale[:, 0] * mirror, scale[:, 1]
    theta[:, :, 2] = (2 * uniform(2) - 1) * (1 - scale)
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    pixels = pixels * (0.7 + 0.6 * uniform(1, 1, 1)) + 0.6 * (uniform(1, 1, 1) - 0.5)
    kept = (uniform(1, height // 16, width // 16) > 0.25).float()
    return pixels * F.interpolate(kept, size=(height, width))


def brief(data: CaptionData, words: int = 18) -> CaptionData:
    """Leave out captions above a number of words, which are few and would pad every batch to their length."""
    captions = [[text for text in texts if len(text.split()) <= words] or texts for texts in data.captions]
    return replace(data, captions=captions)


@torch.no_grad()
def contrastive_recall(model: Blip, pixels: np.ndarray, captions: list[list[str]], k: int = 10) -> tuple[float, float]:
    """Recall at k of the embeddings alone: image to text, text to image."""
    training = model.training
    model.eval()
    values = model.processor.normalise(pixels)
    images = torch.cat([model.image_embeds(model.image_states(torch.from_numpy(v))) for v in np.array_split(values, 8)])
    texts = []
    for caption in range(min(map(len, captions))):
        ids, mask = model.processor.texts([c[caption] for c in captions], "cls")
        texts.append(model.text_embeds(torch.from_numpy(ids), torch.from_numpy(mask)))
    model.train(training)
    n, per = len(images), len(texts)
    similarity = images @ torch.cat(texts).T  # [N, per * N], text j is of image j % N
    own = similarity.view(n, per, n).diagonal(dim1=0, dim2=2)  # [per, N]
    i2t = (similarity > own.max(0).values[:, None]).sum(1) < k
    t2i = (similarity > own.reshape(1, -1)).sum(0) < k
    return float(i2t.float().mean()), float(t2i.float().mean())


def set_dropout(model: Blip, share: float) -> None:
    """Change the dropout of the text towers, in the model and in its config."""
    model.config.text_config.hidden_dropout_prob = share
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            module.p = share


def pretrained(folder: Path, data: CaptionData, sizes: Sizes, seed: int) -> None:
    """Pretrain from scratch and save; the last images of the train split are kept aside to watch the training.

    Every round ends with a folder of its own beside `folder`: a killed run takes up at the round it was in.
    """
    n = len(data.captions) - sizes.held_out
    train, held_out = brief(data.keep(range(n))), data.keep(range(n, len(data.captions)))
    done = max((k for k in range(1, len(sizes.rounds) + 1) if folder.with_name(f"round-{k}").is_dir()), default=0)
    last = folder.with_name(f"round-{done}")
    model: Blip = load(str(last)) if done else fresh(sizes, train, seed)  # type: ignore[assignment]
    record = read_json(last / "pretraining.json") if done else {"seconds": 0, "recalls": []}
    record |= {"images": len(data.captions), "held_out": sizes.held_out}
    watched = resized(model, held_out.images, len(held_out.captions))
    lines = 0

    def watch() -> None:
        i2t, t2i = contrastive_recall(model, watched, held_out.captions)
        record["recalls"].append({"i2t_r10": i2t, "t2i_r10": t2i})
        print(f"          held out, {len(watched)} images: R@10 {points(i2t)} / {points(t2i)}", flush=True)

    def log(line: str) -> None:
        nonlocal lines
        lines += 1
        print(line, flush=True)
        if lines % 5 == 0:
            watch()

    for number, turn in enumerate(sizes.rounds[done:], done + 1):
        start = time.time()
        if number > 1:
            set_dropout(model, 0.2)
        pretrain(
            model,
            brief(data) if turn.all_images else train,
            steps=turn.schedule or turn.steps,
            stop=turn.steps,
            batch_size=turn.batch,
            lr=turn.lr,
            seed=seed + number - 1,
            augment=augmented if turn.strong else crop_and_flip,
            itm_from=1.0 if turn.strong else 0.75,
            lm_weight=0.5 if turn.strong else 1.0,
            weight_decay=0.2 if turn.strong else 0.1,
            hidden_words=turn.hidden_words,
            average=turn.average,
            log=log,
            every=min(50, max(1, turn.steps // 5)),
        )
        watch()
        record["seconds"] = round(record["seconds"] + time.time() - start)
        last = folder.with_name(f"round-{number}")
        with atomic_path(last) as temporary:
            temporary.mkdir()
            model.save(temporary)
            write_json(temporary / "pretraining.json", record)
    shutil.copytree(last, folder)


# --- the matrix -------------------------------------------------------------------------------------------------------


def compressed(model: Path, sizes: Sizes, method: str, seed: int, data: Path, run: Path) -> Report:
    """Prune at every ratio, then fine-tune per task; finished stages of an earlier call are kept."""
    captions, questions = str(data / "flickr8k"), str(data / "easy_vqa")
    report = pipeline.compress(
        str(model),
        output=run,
        ratios=list(sizes.ratios),
        method=method,
        calibration=captions,
        calibration_samples=sizes.calibration,
        data={"retrieval": captions, "captioning": captions, "vqa": questions},
        finetune="none",
        samples=sizes.samples,
        seed=seed,
        resume=True,
    )
    for task, (steps, batch, lr) in zip(TASKS, sizes.finetune, strict=True):
        report = pipeline.finetune(run, tasks=[task], max_steps=steps, batch_size=batch, lr=lr, resume=True)
    return report  # type: ignore[return-value]


def measured_sizes(run: Path) -> list[dict[str, Any]]:
    """Bytes of all ONNX graphs of a variant as they are and gzipped, and of the bit-packed mask."""
    rows = []
    for variant in sorted((run / "onnx").iterdir()):
        files = sorted(variant.rglob("*.onnx"))
        mask = run / "masks" / f"{variant.name.removesuffix('-finetuned')}.safetensors"
        rows.append(
            {
                "variant": variant.name,
                "graphs": len(files),
                "bytes": sum(file.stat().st_size for file in files),
                "gzip_bytes": sum(gzipped(file) for file in files),
                "mask_bytes": mask.stat().st_size if mask.is_file() else None,
            }
        )
    return rows


def gzipped(file: Path) -> int:
    """Bytes that gzip (level 6) makes of a file."""
    squeeze = zlib.compressobj(6, wbits=31)
    with file.open("rb") as stream:
        total = sum(len(squeeze.compress(chunk)) for chunk in iter(lambda: stream.read(1 << 20), b""))
    return total + len(squeeze.flush())


# --- what came out ----------------------------------------------------------------------------------------------------


def rows_of(reports: dict[tuple[str, int], Report]) -> dict[tuple[str, str, int], Metrics]:
    """Index the scores by variant, task and seed."""
    found: dict[tuple[str, str, int], Metrics] = {}
    for (_, seed), report in reports.items():
        for row in report["metrics"]:
            found.setdefault((row["variant"], row["task"], seed), row)
    return found


def variant_names(ratios: Iterable[float]) -> list[str]:
    """List the variants in the order of the tables."""
    bases = ["dense", *(f"{method}-{ratio:g}" for ratio in ratios for method in METHODS)]
    return [name for base in bases for name in (base, f"{base}-finetuned")]


def table(columns: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Build a Markdown table: the first column is text, the others figures."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [columns, rule, *body])


def interval(row: Metrics, metric: str) -> str:
    """Print a score and its interval, times 100."""
    low, high = row["ci95"][metric]
    return f"{points(row['values'][metric])} [{points(low)}, {points(high)}]"


def scores(rows: dict[tuple[str, str, int], Metrics], ratios: Sequence[float]) -> str:
    """Write one table per task, of seed 0."""
    parts = []
    for task, metrics in SHOWN.items():
        found = [(name, rows[name, task, 0]) for name in variant_names(ratios) if (name, task, 0) in rows]
        unit = "questions" if task == "vqa" else "images"
        body = [[name, *(interval(row, metric) for metric in metrics)] for name, row in found]
        parts.append(f"### {HEADINGS[task]}: {found[0][1]['dataset']}, n = {found[0][1]['n']:,} test {unit}")
        parts.append(table(["variant", *map(title, metrics)], body))
    return "\n\n".join(parts)


def over_seeds(rows: dict[tuple[str, str, int], Metrics], ratios: Sequence[float], seeds: int) -> str:
    """Write a table of the fine-tuned rows over all seeds."""
    metrics = [(task, metric) for task, some in COMPARED.items() for metric in some]
    body = []
    for name in variant_names(ratios):
        if name.endswith("-finetuned"):
            cells = []
            for task, metric in metrics:
                values = [rows[name, task, seed]["values"][metric] for seed in range(seeds)]
                cells.append(f"{points(sum(values) / seeds)} ({points(min(values))} to {points(max(values))})")
            body.append([name, *cells])
    return table(["variant", *(title(metric) for _, metric in metrics)], body)


def comparison(rows: dict[tuple[str, str, int], Metrics], ratios: Sequence[float]) -> str:
    """Say where multiflow is ahead of omp, where behind, and where the intervals overlap."""
    lines = []
    for ratio in ratios:
        for suffix, words in (("", "one-shot"), ("-finetuned", "fine-tuned")):
            sides: dict[str, list[str]] = {"ahead on": [], "**behind omp** on": [], "equal on": []}
            for task, metrics in COMPARED.items():
                ours, theirs = (rows[f"{method}-{ratio:g}{suffix}", task, 0] for method in METHODS)
                for metric in metrics:
                    a, b = ours["values"][metric], theirs["values"][metric]
                    (low, high), (other_low, other_high) = ours["ci95"][metric], theirs["ci95"][metric]
                    overlap = ", intervals overlap" if low <= other_high and other_low <= high else ""
                    side = "ahead on" if a > b else "**behind omp** on" if a < b else "equal on"
                    sides[side].append(f"{title(metric)} ({points(a)} against {points(b)}{overlap})")
            said = "; ".join(f"{side} {', '.join(items)}" for side, items in sides.items() if items)
            lines.append(f"- {ratio:g}, {words}: multiflow is {said}.")
    return "\n".join(lines)


def sparsities(reports: dict[tuple[str, int], Report]) -> str:
    """Write the table of what was removed."""
    found = [v for method in METHODS for v in reports[method, 0]["variants"] if v["method"] and not v["finetuned"]]
    modalities = list(found[0]["sparsity"]["per_modality"])
    body = [
        [v["id"], f"{100 * v['sparsity']['achieved']:.4f} %"]
        + [f"{100 * v['sparsity']['per_modality'][name]:.2f} %" for name in modalities]
        for v in found
    ]
    return table(["variant", "all prunable weights", *modalities], body)


def times(reports: dict[tuple[str, int], Report], pretraining: dict[str, Any]) -> str:
    """Write the table of wall-clock times."""
    body = [["pretraining", "1", f"{pretraining['seconds']:,.0f}"]]
    stages = [stage for (_, seed), report in reports.items() if seed == 0 for stage in report["stages"]]

    def add(words: str, *parts: str) -> None:
        seconds = [
            s["seconds"] for s in stages if s["name"].split("/")[0] == parts[0] and s["name"].endswith(parts[-1])
        ]
        if seconds:
            body.append([words, str(len(seconds)), f"{sum(seconds) / len(seconds):,.1f}"])

    add("calibration pass", "statistics")
    for method in METHODS:
        add(f"scores and masks of all ratios, {method}", "prune", method)
    for task in TASKS:
        add(f"fine-tuning, {task}", "finetune", task)
    for task in TASKS:
        add(f"scoring, {task}", "score", task)
    return table(["stage", "times run", "mean seconds"], body)


def file_sizes(sizes: list[dict[str, Any]]) -> str:
    """Write the table of file sizes."""

    def megabytes(count: int | None) -> str:
        return "–" if count is None else f"{count / 1e6:.2f} MB"

    body = [[r["variant"], *(megabytes(r[key]) for key in ("bytes", "gzip_bytes", "mask_bytes"))] for r in sizes]
    return table(["variant", "ONNX graphs of three tasks", "the same, gzip -6", "bit-packed masks"], body)


def words_of(turn: Round) -> str:
    """Describe a round of pretraining."""
    words = f"{turn.steps:,} steps of {turn.batch} images, learning rate {turn.lr:g}"
    if turn.schedule:
        words += f" (the first of a schedule of {turn.schedule:,})"
    losses = (
        "ITC and half LM, strong augmentation and dropout" if turn.strong else "ITC and LM, ITM for the last quarter"
    )
    words += f", {losses}"
    words += f", {100 * turn.hidden_words:.0f} % of the words hidden from the text encoder" if turn.hidden_words else ""
    words += f", averaged weights ({turn.average:g})" if turn.average else ""
    return words + (", all images" if turn.all_images else "")


def document(
    sizes: Sizes,
    command: str,
    reports: dict[tuple[str, int], Report],
    pretraining: dict[str, Any],
    files: list[dict[str, Any]],
    seeds: int,
) -> str:
    """Write docs/results/flickr8k.md."""
    rows, machine, model = rows_of(reports), environment(), reports["multiflow", 0]["model"]
    dense = rows["dense", "retrieval", 0]["values"]
    recipes = "; ".join(
        f"{task} {steps} steps of {batch}, learning rate {lr:g}"
        for task, (steps, batch, lr) in zip(TASKS, sizes.finetune, strict=True)
    )
    retrieval = (
        f"Retrieval re-ranks {sizes.rerank} candidates per query"
        if sizes.rerank
        else "Retrieval goes by the embeddings alone, as the matching head learns too little here to re-rank"
    )
    note = f" {pretraining['note']}" if "note" in pretraining else ""
    parts = [
        "# Flickr8k: what pruning costs on photographs",
        f"Made by `{command}` on {machine['cpu']}, {machine['threads']} threads, Python {machine['python']}, "
        f"torch {machine['torch']}.",
        "No pretrained weights were used. The model was trained here from scratch on "
        f"{pretraining['images']:,} photographs, so absolute numbers are modest (dense text R@10 "
        f"{points(dense['i2t_r10'])}, image R@10 {points(dense['t2i_r10'])}; chance for image R@10 is "
        f"{points(10 / rows['dense', 'retrieval', 0]['n'])}); they say nothing about a published BLIP. "
        "The comparison between dense and pruned, and between methods, is the point.",
        f"Model: BLIP with {sizes.vision} vision and {sizes.text} text layers, width {sizes.width}, images of "
        f"{sizes.image} pixels in patches of {sizes.patch}, {sizes.vocabulary:,} WordPiece tokens learned from the "
        f"train captions; {model['parameters']:,} parameters, {model['prunable_parameters']:,} of them prunable. "
        f"Pretraining: {'; then '.join(map(words_of, sizes.rounds))}. "
        f"The {pretraining['held_out']} train photographs kept aside watched the rounds before those with all images. "
        "Rounds were added when the models of earlier ones had been scored on the test split, so the dense scores are "
        "somewhat flattering; what pruning costs is not concerned." + note,
        f"Pruned once on {sizes.calibration} train photographs with one caption each, then fine-tuned per task "
        f"({recipes}); `dense-finetuned` had the same recipe. {retrieval}; captions by beam search with "
        "3 beams; questions (easy_vqa: drawn shapes, which the pretraining never saw) "
        "by ranking the answer list. The one-shot and dense VQA rows are those of a model never trained on questions.",
        "## Scores",
        "Times 100; in brackets the 95 % bootstrap interval over the test images.",
        scores(rows, sizes.ratios),
    ]
    if seeds > 1:
        parts += [f"### Fine-tuned, mean over {seeds} seeds (least to greatest)", over_seeds(rows, sizes.ratios, seeds)]
    else:
        parts.append("One seed: the intervals do not cover what another seed of the fine-tuning would change.")
    parts += [
        "## Multiflow against magnitude (omp)",
        comparison(rows, sizes.ratios),
        "## Sparsity",
        sparsities(reports),
        "## File sizes",
        f"{ZEROS} The graphs below are plain fp32 ONNX; gzip shows what the zeros are worth to a general-purpose "
        "compressor. 1 MB = 1,000,000 bytes.",
        file_sizes(files),
        "## Times",
        "Wall-clock seconds, on a machine that did other work at the same time.",
        times(reports, pretraining),
    ]
    return "\n\n".join(parts) + "\n"


# --- data and command line --------------------------------------------------------------------------------------------


def excerpt(source: Path, target: Path, images: int) -> None:
    """Copy the annotations of the first images, and these images, for a quick run."""
    with atomic_path(target) as folder:
        for file in ("flickr8k/flickr8k_{}.json", "easy_vqa/vqa_{}.json"):
            for split in ("train", "test"):
                path = Path(file.format(split))
                records = read_json(source / path)
                kept = list(dict.fromkeys(record["image"] for record in records))[:images]
                write_json(folder / path, [record for record in records if record["image"] in set(kept)])
                for image in kept:
                    (folder / path.parent / image).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source / path.parent / image, folder / path.parent / image)
        shutil.copyfile(source / "easy_vqa" / "answer_list.json", folder / "easy_vqa" / "answer_list.json")


def run(args: argparse.Namespace, sizes: Sizes) -> tuple[str, dict[str, Any]]:
    """Run all stages that are not done yet; give the document and the figures."""
    data = args.data
    if args.quick:
        data = args.work / "data"
        if not data.is_dir():
            excerpt(args.data, data, 64)
    model = args.work / "pretrained"
    if not model.is_dir():
        captions = open_data("captioning", str(data / "flickr8k"), "train")
        assert isinstance(captions, CaptionData)
        pretrained(model, captions, sizes, seed=0)
    reports = {
        (method, seed): compressed(model, sizes, method, seed, data, args.work / "runs" / f"{method}-{seed}")
        for seed in range(args.seeds)
        for method in METHODS
    }
    pipeline.export(args.work / "runs" / "multiflow-0", tasks=list(TASKS), resume=True)
    files = measured_sizes(args.work / "runs" / "multiflow-0")
    pretraining = read_json(model / "pretraining.json")
    command = "python benchmarks/flickr8k.py" + (f" --seeds {args.seeds}" if args.seeds > 1 else "")
    text = document(sizes, command, reports, pretraining, files, args.seeds)
    figures = {
        "command": command,
        "environment": environment(),
        "pretraining": pretraining,
        "runs": [{"method": method, "seed": seed, **figures_of(report)} for (method, seed), report in reports.items()],
        "files": files,
    }
    return text, figures


def figures_of(report: Report) -> dict[str, Any]:
    """Keep the figures of a report that the document shows."""
    return {key: report[key] for key in ("variants", "metrics", "stages")}  # type: ignore[literal-required]


def main() -> int:
    """Read the options, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="has flickr8k and easy_vqa")
    parser.add_argument("--work", type=Path, help="weights and runs; default ~/.cache/vlprune/flickr8k")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the fine-tuning")
    parser.add_argument("--quick", action="store_true", help="tiny model, few steps, 64 images; writes no document")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results" / "flickr8k.md", help="the document")
    args = parser.parse_args()
    if not (args.data / "flickr8k").is_dir():
        print(f"{args.data} has no flickr8k: give the folder with --data", file=sys.stderr)
        return 0 if args.quick else 2  # a fresh clone has no photographs; its other quick runs shall go on
    args.work = args.work or Path.home() / ".cache" / "vlprune" / ("flickr8k-quick" if args.quick else "flickr8k")
    try:
        text, figures = run(args, QUICK if args.quick else FULL)
    except VlpruneError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(text)
    if args.json:
        write_json(args.json, figures)
    if not args.quick:
        with atomic_path(args.results) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
