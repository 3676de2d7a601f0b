"""A small random CLIP."""

import pytest
import torch
from transformers import CLIPConfig

from vlprune.data.scenes import VOCABULARY
from vlprune.models import clip
from vlprune.models.family import Source
from vlprune.models.pixels import Pixels
from vlprune.models.processor import CLIP_MEAN, CLIP_STD
from vlprune.models.text_processor import EncoderProcessor, learn_clip_tokenizer


@pytest.fixture(scope="session")
def small_clip() -> clip.Clip:
    """Three layers of two heads per tower, every parameter random; not to be changed."""
    tokenizer = learn_clip_tokenizer(VOCABULARY, 1024, 30)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 3}
    end = int(tokenizer.eos_token_id)
    config = CLIPConfig(
        vision_config={**sizes, "patch_size": 16, "image_size": 32},
        text_config={
            **sizes,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 30,
            "eos_token_id": end,
            "bos_token_id": int(tokenizer.bos_token_id),
            "pad_token_id": end,
        },
        projection_dim=16,
    )
    processor = EncoderProcessor(tokenizer, Pixels(32, 32, CLIP_MEAN, CLIP_STD), 30, "clip")
    model = clip.new(config, processor, Source("small", "test"), seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.15)
    return model
