"""Retrieval on graphs whose right answers are known."""

import numpy as np
import pytest

from vlprune.data.sets import CaptionData
from vlprune.tasks.retrieval import evaluate, make_spec


def make_data(images, captions=3):
    """Caption k of image i reads "image<i> w w .. w" with k words more, so that lengths differ."""
    texts = [[" ".join([f"image{i}", *["w"] * k]) for k in range(captions)] for i in range(images)]
    return CaptionData("fake", range(images), texts)


class Model:
    """Similarity and match logit of image i and text j are looked up in tables [N, M]."""

    def __init__(self, processor, data, similarity, logits=None):
        self.texts = [text for texts in data.captions for text in texts]
        self.processor = processor
        self.similarity = np.asarray(similarity, np.float32)
        self.logits = None if logits is None else np.asarray(logits, np.float32)
        self.pairs = []
        self.graphs = {"image_encoder": self.image_encoder, "text_encoder": self.text_encoder, "itm": self.itm}

    def find(self, feeds, first):
        ids, mask = feeds["input_ids"], feeds["attention_mask"]
        assert ids.shape == mask.shape
        assert (ids[:, 0] == first).all()
        assert mask[:, -1].any(), "a column of nothing but padding"
        rows = [row[: valid.sum()] for row, valid in zip(ids, mask, strict=True)]
        return [self.texts.index(" ".join(self.processor.words[i] for i in row[1:-1])) for row in rows]

    def image_encoder(self, feeds):
        images = feeds["pixel_values"][:, 0, 0, 0]
        return {
            "image_embeds": self.similarity[images.astype(int)],  # times a one-hot text = the table's entry
            "image_states": np.tile(images[:, None, None], (1, 2, 1)).astype(np.float32),
        }

    def text_encoder(self, feeds):
        return {"text_embeds": np.eye(len(self.texts), dtype=np.float32)[self.find(feeds, 2)]}

    def itm(self, feeds):
        images, texts = feeds["image_states"][:, 0, 0].astype(int), self.find(feeds, 5)
        self.pairs += list(zip(images.tolist(), texts, strict=True))
        match = self.logits[images, texts]
        return {"itm_logits": np.stack([-match, match], 1)}


def run(processor, data, similarity, logits=None, rerank=0, batch_size=4):
    model = Model(processor, data, similarity, logits)
    spec = make_spec(processor, rerank=rerank)
    return evaluate(model.graphs, spec, processor, data, batch_size=batch_size), model


def owner_table(images, captions=3):
    return np.repeat(np.eye(images), captions, axis=1)


def test_oracle(processor):
    scores, model = run(processor, make_data(12), owner_table(12))
    assert set(scores.values.values()) == {1.0}
    assert scores.n == 12
    assert scores.outputs[3] == {"i2t_rank": 1, "t2i_ranks": [1, 1, 1], "text": "image3", "image": 3}
    assert model.pairs == []  # nothing re-ranked


@pytest.mark.parametrize("rerank", [0, 4, 100])
def test_constant_model(processor, rerank):
    table = np.zeros((12, 36))
    scores, _ = run(processor, make_data(12), table, table, rerank)
    assert scores.values["i2t_r1"] == scores.values["t2i_r1"] == 0.0


def test_reranking_repairs_the_order(processor):
    images = 12
    similarity = 0.5 * owner_table(images) + np.roll(owner_table(images), 3, axis=1)  # the neighbour's texts win
    before, _ = run(processor, make_data(images), similarity)
    assert before.values["i2t_r1"] == before.values["t2i_r1"] == 0.0
    assert (before.outputs[0]["text"], before.outputs[3]["image"]) == ("image1", 2)
    after, _ = run(processor, make_data(images), similarity, 5 * owner_table(images), rerank=4)
    assert (after.outputs[0]["text"], after.outputs[3]["image"]) == ("image0", 3)
    assert after.values["i2t_r1"] == after.values["t2i_r1"] == 1.0


def test_reranking_adds_the_logit_to_the_similarity(processor):
    """Similarity leads by 0.5: a logit lead of 0.4 is too little, one of 0.6 is enough."""
    images = 12
    similarity = 0.5 * owner_table(images) + np.roll(owner_table(images), 3, axis=1)
    for lead, recall in ((0.4, 0.0), (0.6, 1.0)):
        scores, _ = run(processor, make_data(images), similarity, lead * owner_table(images), rerank=6)
        assert scores.values["i2t_r1"] == scores.values["t2i_r1"] == recall


def test_a_match_that_was_no_candidate_stays_below_all_candidates(processor):
    images = 12
    similarity = -owner_table(images)  # the true match comes last
    scores, _ = run(processor, make_data(images), similarity, 100 * owner_table(images) - 100, rerank=5)
    assert all(output["i2t_rank"] > 5 and min(output["t2i_ranks"]) > 5 for output in scores.outputs)


@pytest.mark.parametrize("rerank", [0, 1, 3, 7, 50])
@pytest.mark.parametrize("seed", range(3))
def test_equal_to_a_plain_loop(processor, rerank, seed):
    random = np.random.default_rng(seed)
    images, captions = 9, 2
    texts = images * captions
    similarity = random.integers(-8, 8, (images, texts)) / 16  # ties
    logits = random.integers(-3, 3, (images, texts)) / 2
    scores, _ = run(processor, make_data(images, captions), similarity, logits, rerank)

    def rank(plain, extra, true):
        best = sorted(range(len(plain)), key=lambda c: (-plain[c], c))[:rerank]
        keys = [(1, plain[c] + extra[c]) if c in best else (0, plain[c]) for c in range(len(plain))]
        top = max(keys[c] for c in true)
        return 1 + sum(key >= top for c, key in enumerate(keys) if c not in true)

    for image, output in enumerate(scores.outputs):
        own = range(image * captions, (image + 1) * captions)
        assert output["i2t_rank"] == rank(similarity[image], logits[image], own)
        assert output["t2i_ranks"] == [rank(similarity[:, t], logits[:, t], [image]) for t in own]


def test_each_pair_is_matched_once(processor):
    random = np.random.default_rng(0)
    similarity, logits = random.random((10, 30)), random.random((10, 30))
    _, model = run(processor, make_data(10), similarity, logits, rerank=5)
    wanted = {(i, t) for i in range(10) for t in np.argsort(-similarity[i])[:5].tolist()}
    wanted |= {(i, t) for t in range(30) for i in np.argsort(-similarity[:, t])[:5].tolist()}
    assert sorted(model.pairs) == sorted(wanted)


def test_batch_size_does_not_matter(processor):
    random = np.random.default_rng(0)
    similarity, logits = random.random((10, 30)), random.random((10, 30))
    first, *others = [
        run(processor, make_data(10), similarity, logits, rerank=5, batch_size=size)[0] for size in (1, 3, 64)
    ]
    assert all(other == first for other in others)


def test_a_model_that_gives_no_numbers_recalls_nothing(processor):
    table = np.full((12, 36), np.nan)
    for rerank in (0, 4):
        scores, _ = run(processor, make_data(12), table, table, rerank)
        assert set(scores.values.values()) == {0.0}


def test_spec(processor):
    assert make_spec(processor) == {
        "schema_version": 1, "family": "blip", "task": "retrieval", "image_size": 2, "max_length": 35,
        "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "enc_token_id": 5, "dec_token_id": 4, "rerank": 16,
    }  # fmt: skip
