"""Image captioning: beam search, scored by CIDEr, BLEU and exact match."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vlprune.data.sets import CaptionData
from vlprune.progress import track
from vlprune.runtime import predict
from vlprune.tasks.common import Graphs, Processor, Spec, base_spec, batches
from vlprune.tasks.metrics import Scores, caption_scores


def make_spec(
    processor: Processor,
    past_shapes: Sequence[Sequence[int]],
    prompt: str = "a picture of ",
    beams: int = 3,
    min_length: int = 5,
    max_length: int = 20,
) -> dict[str, Any]:
    """Make the task.json of captioning; the defaults are the authors'.

    Args:
        processor: turns images and texts into model inputs.
        past_shapes: (H, K) of the decoder's self-attention, per layer.
        prompt: what every caption starts with; it is not part of the output.
        beams: beams of the search.
        min_length: least number of tokens, prompt included.
        max_length: greatest number of tokens, prompt included.

    Returns:
        dict[str, Any]: the spec.
    """
    return {
        **base_spec("captioning", processor, max_length),
        "prompt": prompt,
        "prompt_ids": processor.prompt_ids(prompt),
        "beams": beams,
        "min_length": min_length,
        "decoder": "text_decoder",
        "past_shapes": [list(shape) for shape in past_shapes],
    }


def evaluate(
    graphs: Graphs, spec: Spec, processor: Processor, data: CaptionData, batch_size: int = 32, seed: int = 0
) -> Scores:
    """Caption all images and score the captions against all references.

    Args:
        graphs: image_encoder and text_decoder.
        spec: task.json; prompt_ids, beams, lengths, sep_token_id, decoder and past_shapes are used.
        processor: turns images into model inputs and token ids into text.
        data: images with captions.
        batch_size: images per call; the decoder runs `beams` times as many rows.
        seed: of the bootstrap.

    Returns:
        Scores: cider, bleu_1 .. bleu_4 and exact; per image an output with its `caption`.
    """
    captions: list[str] = []
    for batch in track(batches(len(data.captions), batch_size), "captioning"):
        pixels = processor.images([data.images[i] for i in batch])
        captions += predict.captions(graphs, spec, processor, pixels)
    outputs = [{"caption": caption} for caption in captions]
    return replace(caption_scores(captions, data.captions, seed), outputs=outputs)
