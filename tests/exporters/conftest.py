"""A BLIP small enough to be exported many times, pruned, with weights large enough that a mistake shows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BlipConfig

from vlprune import exporters
from vlprune.data.sets import CaptionData, Question, VqaData
from vlprune.models.blip import Blip, new
from vlprune.models.family import Source, apply_masks
from vlprune.models.processor import Processor, word_tokenizer
from vlprune.runtime.session import load_graphs


TEXT = "a picture of the red green blue small large circle square left right above below what is color yes no"
WORDS = TEXT.split()
WIDTH, SIZE, PATCH = 32, 48, 16
TASKS = ("retrieval", "captioning", "vqa")
SPARSITY = 0.6


def make_model(seed: int = 0) -> Blip:
    tokenizer = word_tokenizer(WORDS)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = tokenizer.convert_tokens_to_ids
    config = BlipConfig(
        vision_config={**sizes, "patch_size": PATCH, "image_size": SIZE, "layer_norm_eps": 1e-6},
        text_config={
            **sizes,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 40,
            "encoder_hidden_size": WIDTH,
            "bos_token_id": ids("[DEC]"),
            "enc_token_id": ids("[ENC]"),
            "sep_token_id": ids("[SEP]"),
            "eos_token_id": ids("[SEP]"),
            "pad_token_id": ids("[PAD]"),
        },
        image_text_hidden_size=24,
    )
    processor = Processor(tokenizer, SIZE, ids("[DEC]"), ids("[ENC]"))
    model = new(config, processor, Source("small", "made here", random_weights=True), seed, biases=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "temp":
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15)
    return model


def make_masks(model: Blip, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer.name: torch.rand(layer.weight.shape, generator=generator) >= SPARSITY for layer in model.layers()}


def make_data(task: str):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(7)]
    texts = [" ".join(rng.choice(WORDS, length)) for length in (2, 9, 1, 5, 5, 14, 3)]
    if task == "vqa":
        questions = [Question(i, text, ["yes"]) for i, text in enumerate(texts)]
        return VqaData("drawn", images, questions, ["yes", "no", "the red circle"])
    return CaptionData("drawn", images, [[text] for text in texts])


def make_spec(model: Blip, task: str) -> dict:
    return exporters.task_spec(model, task, **({"answers": ["yes", "no"]} if task == "vqa" else {}))


def export(model: Blip, task: str, folder, **options):
    """Export and load: rows, ONNX graphs, PyTorch graphs, spec, folder."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = make_spec(model, task)
    rows = exporters.export(model, task, spec, folder, make_data(task), threads=1, **options)
    graphs = load_graphs(folder, threads=1)
    reference = exporters.torch_graphs(model, task)
    return SimpleNamespace(rows=rows, onnx=graphs, torch=reference, spec=spec, folder=folder)


def random_feeds(graph, batch: int, length: int, past: int = 0, states: int = 6, seed: int = 0) -> dict:
    """Inputs of any graph (a `vlprune.exporters.graphs.Graph`): ids with padding on the right, masks to match."""
    rng = np.random.default_rng(seed)
    sizes = {"batch": batch, "length": length, "past": past, "past + length": past + length, "states": states}
    feeds = {}
    for name, axes in graph.inputs.items():
        shape = [sizes.get(size, size) for size in axes]
        if name == "input_ids":
            feeds[name] = rng.integers(0, len(WORDS), shape)
        elif name.endswith("mask"):
            valid = rng.integers(1, shape[1] + 1, batch)  # at least one token of every row
            valid[0] = shape[1]
            feeds[name] = (np.arange(shape[1]) < valid[:, None]).astype(np.int64)
        else:
            feeds[name] = rng.normal(size=shape).astype(np.float32)
    return feeds


@pytest.fixture(scope="session")
def small():
    """The model, its masks, and for each task what `export` gives."""
    model = make_model()
    masks = make_masks(model)
    apply_masks(model.layers(), masks, {})
    return SimpleNamespace(model=model, masks=masks)


@pytest.fixture(scope="session")
def exported(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    return {task: export(small.model, task, folder / task, variant="random-0.6") for task in TASKS}
