"""Train the embedded model blip-tiny on the drawn scenes, and print what it scores on scenes it never saw.

python benchmarks/blip_tiny.py                       # train, then write vlprune/models/weights/blip-tiny
python benchmarks/blip_tiny.py --quick --output DIR  # a few steps: does it run
python benchmarks/blip_tiny.py --evaluate            # score the weights that are there
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import BlipConfig

from vlprune import exporters, load
from vlprune.data import VqaData
from vlprune.data.scenes import SIZE, VOCABULARY, scenes_captions, scenes_vqa
from vlprune.files import atomic_path, write_json
from vlprune.models.blip import Blip, Source, new, start_vision
from vlprune.models.processor import Processor, word_tokenizer
from vlprune.report.environment import environment
from vlprune.tasks import evaluate
from vlprune.training.pretrain import pretrain


WEIGHTS = Path(__file__).parents[1] / "vlprune" / "models" / "weights" / "blip-tiny"
# A caption of three objects has 16 words, the prompt 4 tokens more; eight candidates are enough among 500 scenes.
OPTIONS = {
    "retrieval": {"rerank": 8},
    "captioning": {"max_length": 24},
    "finetune": {"lr": 1e-3, "max_steps": 100, "batch_size": 32},
}
WIDTH, VISION_LAYERS, TEXT_LAYERS, HEAD, PATCH = 192, 4, 3, 32, 16


def fresh(seed: int) -> Blip:
    """Make the untrained model."""
    tokenizer = word_tokenizer(VOCABULARY)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": WIDTH // HEAD}
    ids = tokenizer.convert_tokens_to_ids
    config = BlipConfig(
        vision_config={
            **sizes,
            "num_hidden_layers": VISION_LAYERS,
            "patch_size": PATCH,
            "image_size": SIZE,
            "layer_norm_eps": 1e-6,
            "initializer_range": 0.02,
        },
        text_config={
            **sizes,
            "num_hidden_layers": TEXT_LAYERS,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 40,
            "encoder_hidden_size": WIDTH,
            "bos_token_id": ids("[DEC]"),
            "enc_token_id": ids("[ENC]"),
            "sep_token_id": ids("[SEP]"),
            "eos_token_id": ids("[SEP]"),
            "pad_token_id": ids("[PAD]"),
            "label_smoothing": 0.1,
        },
        image_text_hidden_size=64,
    )
    processor = Processor(tokenizer, SIZE, ids("[DEC]"), ids("[ENC]"))
    model = new(config, processor, Source("blip-tiny", "benchmarks/blip_tiny.py"), seed)
    start_vision(model, seed)
    return model


def scores(folder: Path, scenes: int) -> list[dict[str, Any]]:
    """Score the saved weights on unseen scenes: one row per task and metric."""
    model = load(str(folder))
    rows: list[dict[str, Any]] = []
    for task in model.tasks:
        part = model.for_task(task)
        data = scenes_vqa("test", 3 * scenes) if task == "vqa" else scenes_captions("test", scenes)
        options = dict(part.options.get(task, {}))
        if isinstance(data, VqaData):
            options["answers"] = data.answer_list
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
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder of the weights (default: the package's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.output or (Path(scratch) / "blip-tiny" if args.quick and not args.evaluate else WEIGHTS)
        seconds = None if args.evaluate else train(folder, 20 if args.quick else args.steps, args.quick, args.seed)
        rows = scores(folder, 50 if args.quick else 500)
    for row in rows:
        value, low, high = (100 * x for x in (row["value"], *row["ci95"]))
        print(f"{row['task']:11s} {row['metric']:9s} {value:6.1f} [{low:.1f}, {high:.1f}] n {row['n']}")
    if args.json:
        write_json(args.json, {"seconds": seconds, "environment": environment(), "scores": rows})


def train(folder: Path, steps: int, quick: bool, seed: int) -> float:
    """Train from scratch and save; returns seconds."""
    start = time.time()
    model = fresh(seed)
    scenes = 500 if quick else 30_000
    pretrain(
        model,
        scenes_captions("train", scenes),
        questions=scenes_vqa("train", 2 * scenes),
        steps=steps,
        batch_size=64,
        lr=1e-3,
        seed=seed,
        itm_from=0.65,
        lm_weight=4.0,
        log=lambda line: print(line, flush=True),
        every=50 if steps >= 50 else steps,
    )
    model.options = OPTIONS
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        model.save(temporary, torch.float16)
    return time.time() - start


if __name__ == "__main__":
    main()
