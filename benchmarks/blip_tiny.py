"""Train the embedded model blip-tiny on the drawn scenes, and print what it scores on scenes it never saw.

python benchmarks/blip_tiny.py                       # train, then write vlprune/models/weights/blip-tiny
python benchmarks/blip_tiny.py --quick --output DIR  # a few steps: does it run
python benchmarks/blip_tiny.py --evaluate            # score the weights that are there
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from transformers import BlipConfig

from vlprune.data.scenes import SIZE, VOCABULARY, scenes_captions, scenes_vqa
from vlprune.files import atomic_path
from vlprune.models.blip import Blip, Source, new, start_vision
from vlprune.models.processor import Processor, word_tokenizer
from vlprune.training.pretrain import pretrain


WEIGHTS = Path(__file__).parents[1] / "vlprune" / "models" / "weights" / "blip-tiny"
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


def main() -> None:
    """Train, save, score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 steps")
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    steps = 20 if args.quick else args.steps
    start = time.time()
    model = fresh(args.seed)
    scenes = 500 if args.quick else 30_000
    pretrain(
        model,
        scenes_captions("train", scenes),
        questions=scenes_vqa("train", 2 * scenes),
        steps=steps,
        batch_size=64,
        lr=1e-3,
        seed=args.seed,
        itm_from=0.65,
        lm_weight=4.0,
        log=lambda line: print(line, flush=True),
    )
    with atomic_path(args.output) as folder:
        folder.mkdir()
        model.save(folder, torch.float16)
    print(f"trained {steps} steps in {time.time() - start:.0f} s, written to {args.output}")


if __name__ == "__main__":
    main()
