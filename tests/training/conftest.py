"""Small random dual encoders."""

import pytest
import torch
from transformers import CLIPConfig, SiglipConfig

from vlprune.data.scenes import VOCABULARY
from vlprune.models.clip import Clip
from vlprune.models.dual import DualEncoder, start
from vlprune.models.family import Source
from vlprune.models.pixels import Pixels
from vlprune.models.processor import CLIP_MEAN, CLIP_STD
from vlprune.models.siglip import Siglip
from vlprune.models.text_processor import EncoderProcessor, learn_clip_tokenizer


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
LENGTH = 30


def dual_encoder(family: str) -> DualEncoder:
    """Three layers of two heads per tower, every parameter random."""
    tokenizer = learn_clip_tokenizer(VOCABULARY, 1024, LENGTH)
    end = int(tokenizer.eos_token_id)
    ids = {"eos_token_id": end, "bos_token_id": int(tokenizer.bos_token_id), "pad_token_id": end}
    vision = {**SIZES, "patch_size": 16, "image_size": 32}
    text = {**SIZES, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH}
    pixels = Pixels(32, 32, CLIP_MEAN, CLIP_STD)
    source = Source("small", "test")
    with torch.device("meta"):
        if family == "clip":
            config = CLIPConfig(vision_config=vision, text_config=text, projection_dim=16)
            model: DualEncoder = Clip(config, EncoderProcessor(tokenizer, pixels, LENGTH, "clip"), source)
        else:
            config = SiglipConfig(vision_config=vision, text_config=text)
            model = Siglip(config, EncoderProcessor(tokenizer, pixels, LENGTH, "siglip"), source)
    start(model, 0, biases=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("logit_"):
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15)
    return model.eval()


@pytest.fixture(scope="session")
def small_clip() -> DualEncoder:
    """Not to be changed."""
    return dual_encoder("clip")


@pytest.fixture(scope="session")
def small_siglip() -> DualEncoder:
    """Not to be changed."""
    return dual_encoder("siglip")
