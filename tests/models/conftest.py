"""Small random checkpoints in exactly the formats of Hugging Face and of the BLIP authors."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    BlipImageProcessor,
)

from vlprune.data.scenes import VOCABULARY
from vlprune.models.blip import Blip, Source, new
from vlprune.models.processor import Processor, word_tokenizer


CLASSES = {
    "retrieval": BlipForImageTextRetrieval,
    "captioning": BlipForConditionalGeneration,
    "vqa": BlipForQuestionAnswering,
}
IMAGE = 32


def small_config(width: int = 32, vision: int = 32) -> BlipConfig:
    """What Hugging Face writes: no [ENC], no [DEC] beyond bos_token_id."""
    tokenizer = word_tokenizer(VOCABULARY)
    ids = tokenizer.convert_tokens_to_ids
    sizes = {"intermediate_size": 2 * width, "num_hidden_layers": 2}
    return BlipConfig(
        vision_config={
            **sizes,
            "hidden_size": vision,
            "num_attention_heads": 4,
            "patch_size": 8,
            "image_size": IMAGE,
            "layer_norm_eps": 1e-5,
        },
        text_config={
            **sizes,
            "hidden_size": width,
            "num_attention_heads": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 40,
            "encoder_hidden_size": vision,
            "bos_token_id": ids("[DEC]"),
            "eos_token_id": ids("[SEP]"),
            "sep_token_id": ids("[SEP]"),
            "pad_token_id": ids("[PAD]"),
        },
        image_text_hidden_size=16,
    )


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter a value that shows in the output, biases and LayerNorms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            parameter.normal_(0.0, 0.3, generator=generator)
            if name.endswith("weight") and parameter.ndim == 1:
                parameter.add_(1.0)


def write_hugging_face(folder: Path, task: str, seed: int = 0, **config: int) -> nn.Module:
    """Save transformers' own model of a task with its tokenizer and image processor."""
    model = CLASSES[task](small_config(**config)).eval()
    randomise(model, seed)
    model.save_pretrained(folder)
    word_tokenizer(VOCABULARY).save_pretrained(folder)
    BlipImageProcessor(size={"height": IMAGE, "width": IMAGE}).save_pretrained(folder)
    return model


@pytest.fixture(scope="session")
def hugging_face(tmp_path_factory):
    """Task -> (folder, transformers' model); made once, not to be changed."""
    made = {}

    def make(task: str) -> tuple[Path, nn.Module]:
        if task not in made:
            folder = tmp_path_factory.mktemp(task)
            made[task] = (folder, write_hugging_face(folder, task))
        return made[task]

    return make


def pretraining_model(width: int = 32, seed: int = 0, heads: int | None = None) -> Blip:
    """A tied model with all parts; its heads are 64 wide where their number is not given."""
    tokenizer = word_tokenizer(VOCABULARY)
    dec, enc = tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"])
    config = small_config(width, width)
    for tower in (config.vision_config, config.text_config):
        tower.num_attention_heads = heads or max(1, width // 64)
    config.vision_config.layer_norm_eps = 1e-6
    config.text_config.enc_token_id = enc
    config.text_config.label_smoothing = 0.1
    model = new(config, Processor(tokenizer, IMAGE, dec, enc), Source("small", "test"), seed)
    randomise(model, seed)
    model.temp.data.fill_(0.1)
    return model


@pytest.fixture
def whole() -> Blip:
    return pretraining_model()


def original_names(model: Blip) -> dict[str, Tensor]:
    """The tensors of a model under the names of the authors' files."""
    renamed = {}
    for key, tensor in model.state_dict().items():
        for new_name, old in (
            ("vision_model.embeddings.class_embedding", "visual_encoder.cls_token"),
            ("vision_model.embeddings.position_embedding", "visual_encoder.pos_embed"),
            ("vision_model.embeddings.patch_embedding", "visual_encoder.patch_embed.proj"),
            ("vision_model.post_layernorm", "visual_encoder.norm"),
            ("vision_model.encoder.layers", "visual_encoder.blocks"),
        ):
            key = key.replace(new_name, old)
        if key.startswith("visual_encoder.blocks"):
            for new_name, old in (("layer_norm", "norm"), ("self_attn", "attn"), ("projection", "proj")):
                key = key.replace(new_name, old)
        renamed[key] = tensor.clone()
    return renamed


def write_original(path: Path, model: Blip, **more: object) -> None:
    """Save a model as the authors do: momentum copies, queues and the epoch beside the weights."""
    state = original_names(model)
    momentum = {
        f"{part}_m.{rest}": torch.randn_like(tensor)
        for part, rest, tensor in ((*key.split(".", 1), t) for key, t in state.items() if "." in key)
        if part in ("visual_encoder", "text_encoder", "vision_proj", "text_proj")
    }
    queues = {"image_queue": torch.randn(16, 64), "text_queue": torch.randn(16, 64), "queue_ptr": torch.zeros(1).long()}
    positions = {
        key.replace("position_embeddings.weight", "position_ids"): torch.arange(40)[None]
        for key in state
        if key.endswith("position_embeddings.weight")
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": {**state, **momentum, **queues, **positions}, "epoch": 19, **more}, path)
    word_tokenizer(VOCABULARY).save_pretrained(path.parent)


@pytest.fixture(scope="session")
def checkpoints() -> SimpleNamespace:
    """The writers above, for tests that change what they write."""
    return SimpleNamespace(
        classes=CLASSES,
        write_hugging_face=write_hugging_face,
        write_original=write_original,
        original_names=original_names,
        pretraining_model=pretraining_model,
    )
