"""Train the embedded model clip-tiny on the drawn scenes, and print what it scores on scenes it never saw.

python benchmarks/clip_tiny.py                       # train, then write vlprune/models/weights/clip-tiny
python benchmarks/clip_tiny.py --quick --output DIR  # a few steps: does it run
python benchmarks/clip_tiny.py --evaluate            # score the weights that are there
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig

from vlprune import exporters, load
from vlprune.data.scenes import SIZE, VOCABULARY, scenes_captions, scenes_classes
from vlprune.files import atomic_path, write_json
from vlprune.models.clip import Clip
from vlprune.models.dual import start, start_vision
from vlprune.models.family import Batch, Source
from vlprune.models.pixels import Pixels
from vlprune.models.processor import CLIP_MEAN, CLIP_STD
from vlprune.models.text_processor import EncoderProcessor, learn_clip_tokenizer
from vlprune.report.environment import environment
from vlprune.tasks import evaluate
from vlprune.training.pretrain import pretrain


WEIGHTS = Path(__file__).parents[1] / "vlprune" / "models" / "weights" / "clip-tiny"
OPTIONS = {"finetune": {"lr": 1e-3, "max_steps": 100, "batch_size": 64}}
JOINT, HEAD, PATCH, LENGTH = 128, 32, 16, 24  # width of the joint space, of a head; pixels; tokens
VISION = {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 192 // HEAD, "num_hidden_layers": 4}
TEXT = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 128 // HEAD, "num_hidden_layers": 3}
WORDS = {word: number for number, word in enumerate(VOCABULARY, start=1)}  # 0 = no word


class Pupil(Clip):
    """CLIP with a reader, for training only, that must tell every word of a scene's caption from either embedding.

    The contrastive loss alone learns little until it tells colours from shapes; the words say which details matter.
    """

    def __init__(self, config: CLIPConfig, processor: EncoderProcessor, source: Source) -> None:
        super().__init__(config, processor, source)
        self.reader = nn.Linear(config.projection_dim, LENGTH * (len(WORDS) + 1))

    def learn(self, captions: list[list[str]]) -> None:
        """Note the words of the first caption of every image."""
        rows = [[WORDS[word] for word in given[0].split()] for given in captions]
        self.words = torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])

    def pretraining_loss(self, batch: Batch, itm: bool = True) -> dict[str, Tensor]:
        """The contrastive loss, and the reading losses of images and texts."""
        image = self.image_embeds(batch["pixel_values"])
        text = self.text_embeds(batch["input_ids"], batch["attention_mask"])
        owner = batch["image_index"]
        losses = {"itc": self.contrastive_loss(image, text, owner[:, None] == owner[None, :])}
        for name, embeds in (("image", image), ("text", text)):
            logits = self.reader(embeds * embeds.shape[1] ** 0.5).unflatten(1, (LENGTH, -1))
            losses[name] = F.cross_entropy(logits.flatten(0, 1), self.words[owner].flatten())
        return losses


def fresh(seed: int) -> Pupil:
    """Make the untrained model."""
    tokenizer = learn_clip_tokenizer(VOCABULARY, 1024, LENGTH)  # every word is one token
    config = CLIPConfig(
        vision_config={**VISION, "patch_size": PATCH, "image_size": SIZE},
        text_config={
            **TEXT,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": LENGTH,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        projection_dim=JOINT,
    )
    processor = EncoderProcessor(tokenizer, Pixels(SIZE, SIZE, CLIP_MEAN, CLIP_STD), LENGTH, "clip")
    with torch.device("meta"):
        model = Pupil(config, processor, Source("clip-tiny", "benchmarks/clip_tiny.py"))
    start(model, seed)
    start_vision(model, seed)
    return model


def scores(folder: Path, scenes: int) -> list[dict[str, Any]]:
    """Score the saved weights on unseen scenes: one row per task and metric."""
    model = load(str(folder))
    rows: list[dict[str, Any]] = []
    for task in model.tasks:
        part = model.for_task(task)
        options: dict[str, Any] = {}
        if task == "zero-shot":
            classes = scenes_classes("test", scenes)
            options = {"classes": classes.classes, "templates": classes.templates}
        data = classes if options else scenes_captions("test", scenes)
        spec = exporters.task_spec(part, task, **options)
        found = evaluate(task, exporters.torch_graphs(part, task), spec, part.processor, data)
        for metric, value in found.values.items():
            rows.append({"task": task, "metric": metric, "n": found.n, "value": value, "ci95": found.ci95[metric]})
    return rows


def main() -> None:
    """Train, save, score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 steps, 50 scenes, nothing written unless --output")
    parser.add_argument("--evaluate", action="store_true", help="score the weights at --output, train nothing")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder of the weights (default: the package's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.output or (Path(scratch) / "clip-tiny" if args.quick and not args.evaluate else WEIGHTS)
        seconds = None if args.evaluate else train(folder, 20 if args.quick else args.steps, args.quick, args.seed)
        rows = scores(folder, 50 if args.quick else 500)
    for row in rows:
        value, low, high = (100 * x for x in (row["value"], *row["ci95"]))
        print(f"{row['task']:11s} {row['metric']:9s} {value:6.1f} [{low:.1f}, {high:.1f}] n {row['n']}")
    if args.json:
        write_json(args.json, {"seconds": seconds, "environment": environment(), "scores": rows})


def train(folder: Path, steps: int, quick: bool, seed: int) -> float:
    """Train from scratch and save; returns seconds."""
    begin = time.time()
    model = fresh(seed)
    scenes = scenes_captions("train", 500 if quick else 30_000)
    model.learn(scenes.captions)
    pretrain(
        model,
        scenes,
        steps=steps,
        batch_size=128,
        lr=1e-3,
        seed=seed,
        log=lambda line: print(line, flush=True),
        every=50 if steps >= 50 else steps,
    )
    del model.reader
    model.options = OPTIONS
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        model.save(temporary, torch.float16)
    return time.time() - begin


if __name__ == "__main__":
    main()
