"""Beam search and answer ranking against transformers' generate and against exhaustive search."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from vlprune.runtime.generate import beam_search, rank_answers


EOS = 1


class ToyDecoder:
    """A causal decoder in numpy whose logits depend on every valid token before, and on the valid cross states.

    Two layers of different shapes, so that nothing can rely on one global (H, K).
    """

    past_shapes = ((2, 3), (1, 4))

    def __init__(self, seed: int, vocabulary: int = 7, scale: float = 2.0) -> None:
        random = np.random.default_rng(seed)
        self.embedding = random.normal(size=(vocabulary, 6)) * scale
        self.out = [random.normal(size=(h * k, vocabulary)) * scale for h, k in self.past_shapes]
        self.project = [random.normal(size=(6, h * k)) for h, k in self.past_shapes]
        self.bias = np.zeros(vocabulary)
        self.calls: list[int] = []

    def cross(self, batch: int, tokens: int, seed: int = 0) -> dict[str, np.ndarray]:
        random = np.random.default_rng(seed)
        return {
            f"cross_{kind}.{layer}": random.normal(size=(batch, h, tokens, k)).astype(np.float32)
            for layer, (h, k) in enumerate(self.past_shapes)
            for kind in ("key", "value")
        }

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        ids, mask, cross_mask = feeds["input_ids"], feeds["attention_mask"], feeds["cross_mask"]
        assert ids.dtype == mask.dtype == cross_mask.dtype == np.int64
        batch, length = ids.shape
        self.calls.append(batch)
        outputs, logits = {}, self.bias
        for layer, (h, k) in enumerate(self.past_shapes):
            past = feeds[f"past_key.{layer}"].shape[2]
            assert mask.shape == (batch, past + length)
            place = np.cos(np.arange(past, past + length))[:, None]
            new = np.tanh(self.embedding[ids] @ self.project[layer] + place).reshape(batch, length, h, k)
            new = new.transpose(0, 2, 1, 3).astype(np.float32)
            for kind in ("key", "value"):
                array = np.concatenate([feeds[f"past_{kind}.{layer}"], new], axis=2)
                outputs[f"present_{kind}.{layer}"] = array
            weight = mask[:, None, :, None] * np.arange(1, past + length + 1)[:, None]
            keys = outputs[f"present_key.{layer}"] * weight
            read = np.cumsum(keys, axis=2)[:, :, past:]  # causal
            cross = feeds[f"cross_key.{layer}"] * feeds[f"cross_value.{layer}"] * cross_mask[:, None, :, None]
            state = np.sin(read + 3 * cross.sum(2, keepdims=True)).transpose(0, 2, 1, 3).reshape(batch, length, -1)
            logits = logits + state @ self.out[layer]
        return {"logits": logits.astype(np.float32), **outputs}

    def log_prob(self, row: int, cross: dict, cross_mask: np.ndarray, tokens: list[int], prompt: int) -> float:
        """Sum of the log-probabilities of the tokens after the prompt, without cache or batch."""
        feeds = {name: array[row : row + 1] for name, array in cross.items()}
        for layer, (h, k) in enumerate(self.past_shapes):
            feeds |= {f"past_{kind}.{layer}": np.zeros((1, h, 0, k), np.float32) for kind in ("key", "value")}
        ids = np.array([tokens], np.int64)
        feeds |= {"input_ids": ids, "attention_mask": np.ones_like(ids), "cross_mask": cross_mask[row : row + 1]}
        logits = self(feeds)["logits"][0].astype(np.float64)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return sum(log_probs[i - 1, tokens[i]] for i in range(prompt, len(tokens)))


def ones(batch: int, tokens: int) -> np.ndarray:
    return np.ones((batch, tokens), np.int64)


@pytest.fixture(scope="module")
def blip():
    """A small random BLIP whose captions vary with the image, as graphs."""
    torch = pytest.importorskip("torch")
    from transformers import BlipConfig, BlipForConditionalGeneration

    vocabulary = 40
    text = {
        "vocab_size": vocabulary, "hidden_size": 32, "encoder_hidden_size": 24, "intermediate_size": 48,
        "projection_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32,
        "bos_token_id": 30, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
        "patch_size": 8, "initializer_range": 0.5,
    }  # fmt: skip
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" not in name and "layer_norm" not in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
        model.text_decoder.cls.predictions.bias[3] += 4.0  # sentences end before the last step, at various lengths
    return model


def blip_graphs(model):
    import torch
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    decoder = model.text_decoder
    layers = decoder.bert.encoder.layer

    @torch.no_grad()
    def image_encoder(pixels):
        states = model.vision_model(pixel_values=pixels).last_hidden_state
        feeds = {}
        for index, layer in enumerate(layers):
            attention = layer.crossattention.self
            for kind, linear in (("key", attention.key), ("value", attention.value)):
                split = linear(states).view(len(states), -1, 4, 8).transpose(1, 2)
                feeds[f"cross_{kind}.{index}"] = split.numpy()
        return feeds

    @torch.no_grad()
    def text_decoder(feeds):
        tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}

        def cache(prefix):
            return DynamicCache.from_legacy_cache(
                tuple((tensors[f"{prefix}_key.{i}"], tensors[f"{prefix}_value.{i}"]) for i in range(len(layers)))
            )

        past = EncoderDecoderCache(cache("past"), cache("cross"))
        past.is_updated = dict.fromkeys(range(len(layers)), True)
        shape_only = torch.zeros(len(tensors["input_ids"]), tensors["cross_mask"].shape[1], 24)
        output = decoder(
            tensors["input_ids"],
            attention_mask=tensors["attention_mask"],
            encoder_hidden_states=shape_only,
            past_key_values=past,
            use_cache=True,
        )
        result = {"logits": output.logits.numpy()}
        for index, layer in enumerate(output.past_key_values.self_attention_cache.layers):
            result |= {f"present_key.{index}": layer.keys.numpy(), f"present_value.{index}": layer.values.numpy()}
        return result

    return image_encoder, text_decoder


@pytest.mark.parametrize("beams", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 5, 192])
@pytest.mark.parametrize("lengths", [(0, 12), (5, 20), (9, 9)])
def test_same_tokens_as_transformers(blip, beams, batch, lengths):
    import torch

    prompt = [30, 7, 8]
    pixels = 3 * torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch + beams))
    expected = blip.generate(
        pixels,
        input_ids=torch.tensor([[*prompt, 3]]).repeat(batch, 1),
        num_beams=beams,
        do_sample=False,
        min_length=lengths[0],
        max_length=lengths[1],
    ).tolist()

    image_encoder, text_decoder = blip_graphs(blip)
    cross = image_encoder(pixels)
    found = beam_search(
        text_decoder,
        cross,
        ones(batch, cross["cross_key.0"].shape[2]),
        prompt,
        [(4, 8), (4, 8)],
        eos_token_id=3,
        beams=beams,
        min_length=lengths[0],
        max_length=lengths[1],
    )
    assert found == [row[: row.index(3, 3) + 1] if 3 in row[3:] else row for row in expected]  # without padding
    if batch == 192 and lengths[0] < lengths[1]:  # captions vary, and so do their lengths
        assert len({tuple(row) for row in found}) > 20
        assert len({len(row) for row in found}) > 5


@pytest.mark.parametrize("seed", range(6))
def test_many_beams_find_the_best_of_all_sequences(seed):
    """With more beams than prefixes the search is exhaustive; the best sequence is known by enumeration."""
    decoder, prompt, max_length = ToyDecoder(seed, vocabulary=101), [2, 4], 4
    decoder.bias[5:] = -1000.0  # five words in use
    cross, cross_mask = decoder.cross(2, 3, seed), ones(2, 3)
    found = beam_search(
        decoder, cross, cross_mask, prompt, decoder.past_shapes, eos_token_id=EOS, beams=50, max_length=max_length
    )
    words = [word for word in range(5) if word != EOS]
    sequences = [[*prompt, EOS]] + [[*prompt, *tail] for tail in itertools.product(words, range(5))]
    for row in range(2):
        scores = [
            decoder.log_prob(row, cross, cross_mask, tokens, len(prompt)) / (len(tokens) - len(prompt))
            for tokens in sequences
        ]
        assert found[row] == sequences[int(np.argmax(scores))]


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_rows_do_not_influence_each_other(beams):
    decoder = ToyDecoder(3, vocabulary=12)
    cross, cross_mask = decoder.cross(6, 4), ones(6, 4)
    cross_mask[1, 2:] = cross_mask[4, 1:] = 0
    options = {"eos_token_id": EOS, "beams": beams, "max_length": 15}
    together = beam_search(decoder, cross, cross_mask, [2], decoder.past_shapes, **options)
    for row in range(6):
        alone = {name: array[row : row + 1] for name, array in cross.items()}
        assert beam_search(decoder, alone, cross_mask[row : row + 1], [2], decoder.past_shapes, **options) == [
            together[row]
        ]
    assert len({len(sequence) for sequence in together}) > 1


def test_masked_cross_states_do_not_matter():
    decoder = ToyDecoder(3, vocabulary=12)
    cross, cross_mask = decoder.cross(4, 5), ones(4, 5)
    cross_mask[:, 3:] = 0
    cut = {name: array[:, :, :3] for name, array in cross.items()}
    options = {"eos_token_id": EOS, "beams": 2, "max_length": 9}
    assert beam_search(decoder, cross, cross_mask, [2], decoder.past_shapes, **options) == beam_search(
        decoder, cut, ones(4, 3), [2], decoder.past_shapes, **options
    )


def test_ended_rows_leave_the_batch_and_the_search_stops():
    decoder = ToyDecoder(3, vocabulary=12)
    cross = decoder.cross(6, 4)
    found = beam_search(decoder, cross, ones(6, 4), [2], decoder.past_shapes, eos_token_id=EOS, beams=1, max_length=40)
    lengths = sorted(map(len, found))
    assert decoder.calls == [sum(length > step for length in lengths) for step in range(1, lengths[-1])]
    assert len(set(lengths)) > 1
    assert decoder.calls[-1] < 6


def test_length_limits():
    decoder = ToyDecoder(5, vocabulary=12)
    cross = decoder.cross(8, 2)
    for minimum in (0, 4, 8):
        found = beam_search(
            decoder, cross, ones(8, 2), [2], decoder.past_shapes, eos_token_id=EOS, min_length=minimum, max_length=8
        )
        for sequence in found:
            assert sequence[0] == 2
            assert minimum < len(sequence) <= 8 or len(sequence) == 8  # min_length tokens before the end token
            assert EOS not in sequence[:-1]
            assert sequence[-1] == EOS or len(sequence) == 8


def test_logits_that_are_no_numbers_do_not_hang():
    decoder = ToyDecoder(0)
    decoder.out[0][:] = np.nan
    found = beam_search(
        decoder, decoder.cross(2, 2), ones(2, 2), [2], decoder.past_shapes, eos_token_id=EOS, beams=3, max_length=6
    )
    assert len(found) == 2


def test_beam_search_refuses_what_it_cannot_do():
    decoder = ToyDecoder(0)
    arguments = (decoder, decoder.cross(1, 2), ones(1, 2))
    with pytest.raises(ValueError, match="prompt of 3 tokens"):
        beam_search(*arguments, [2, 3, 4], decoder.past_shapes, eos_token_id=EOS, max_length=3)
    with pytest.raises(ValueError, match="prompt of 0 tokens"):
        beam_search(*arguments, [], decoder.past_shapes, eos_token_id=EOS)
    with pytest.raises(ValueError, match="vocabulary of at least 8"):
        beam_search(*arguments, [2], decoder.past_shapes, eos_token_id=EOS, beams=4)


# First tokens shared by several answers, one answer that begins another, one empty answer, various lengths.
ANSWERS = [[2, 3, EOS], [2, 3, 4, EOS], [2, 3, 4, 5, 6, EOS], [2, 4, EOS], [2, 4, 4, EOS], [2, 6, 0, EOS], [2, EOS]]


@pytest.mark.parametrize("rows", [1, 3, 256])
@pytest.mark.parametrize("seed", range(3))
def test_ranking_all_answers_equals_scoring_each_alone(rows, seed):
    decoder = ToyDecoder(seed)
    cross, cross_mask = decoder.cross(4, 3, seed), ones(4, 3)
    cross_mask[2, 1:] = 0
    scores = rank_answers(decoder, cross, cross_mask, ANSWERS, decoder.past_shapes, k=100, rows=rows)
    expected = [[decoder.log_prob(row, cross, cross_mask, answer, 1) for answer in ANSWERS] for row in range(4)]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert len(set(scores.argmax(1))) > 1 or seed, "the same answer everywhere shows little"


@pytest.mark.parametrize("k", [1, 2, 4])
def test_first_token_picks_the_candidates(k):
    decoder = ToyDecoder(7)
    cross, cross_mask = decoder.cross(5, 3), ones(5, 3)
    everything = rank_answers(decoder, cross, cross_mask, ANSWERS, decoder.past_shapes, k=len(ANSWERS))
    some = rank_answers(decoder, cross, cross_mask, ANSWERS, decoder.past_shapes, k=k)
    for row in range(5):
        first = [decoder.log_prob(row, cross, cross_mask, answer[:2], 1) for answer in ANSWERS]
        best = sorted(range(len(ANSWERS)), key=lambda index: (-first[index], index))[:k]
        assert np.flatnonzero(np.isfinite(some[row])).tolist() == sorted(best)
        np.testing.assert_allclose(some[row, best], everything[row, best], atol=1e-5)


def test_rows_bounds_the_calls():
    decoder = ToyDecoder(7)
    rank_answers(decoder, decoder.cross(5, 3), ones(5, 3), ANSWERS, decoder.past_shapes, rows=4)
    assert decoder.calls[0] == 5  # one prefill for all questions
    assert max(decoder.calls[1:]) <= 4


@pytest.mark.parametrize(("answers", "k"), [([], 1), ([[2]], 1), ([[2, EOS], [3, EOS]], 1), ([[2, EOS]], 0)])
def test_ranking_refuses_malformed_answers(answers, k):
    decoder = ToyDecoder(7)
    with pytest.raises(ValueError, match="ranking needs"):
        rank_answers(decoder, decoder.cross(1, 3), ones(1, 3), answers, decoder.past_shapes, k=k)


def test_ranking_on_blip_equals_its_own_loss(blip):
    """BLIP's decoder run plainly on each answer: no cache, no batch."""
    import torch

    image_encoder, text_decoder = blip_graphs(blip)
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    cross = image_encoder(pixels)
    answers = [[30, 5, 3], [30, 5, 6, 3], [30, 9, 8, 7, 3]]
    scores = rank_answers(text_decoder, cross, ones(3, cross["cross_key.0"].shape[2]), answers, [(4, 8), (4, 8)])
    with torch.no_grad():
        states = blip.vision_model(pixels).last_hidden_state
        for row, column in itertools.product(range(3), range(3)):
            ids = torch.tensor([answers[column]])
            log_probs = blip.text_decoder(ids, encoder_hidden_states=states[row : row + 1]).logits[0].log_softmax(-1)
            expected = log_probs[:-1].gather(1, ids[0, 1:, None]).sum().item()
            assert scores[row, column] == pytest.approx(expected, abs=1e-4)


def test_generation_needs_numpy_only():
    code = (
        "import sys, vlprune.runtime.generate; "
        "print([m for m in ('torch', 'transformers', 'onnxruntime', 'optimum') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
