"""A processor over a few whole words, and images that are numbers."""

import numpy as np
import pytest


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", "[ENC]"]


class FakeProcessor:
    """Image i becomes pixels of value i; words get ids in the order in which they first appear."""

    family = "blip"
    image_size = 2
    pad_id, sep_id = 0, 3
    first_ids = {"cls": 2, "dec": 4, "enc": 5}  # noqa: RUF012

    def __init__(self):
        self.words = list(WORDS)

    def ids(self, text):
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return [self.words.index(word) for word in text.split()]

    def images(self, images):
        return np.tile(np.array(images, np.float32)[:, None, None, None], (1, 3, 2, 2))

    def texts(self, texts, first="cls", max_length=35):
        rows = [[self.first_ids[first], *self.ids(text)[: max_length - 2], 3] for text in texts]
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        mask = np.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
            mask[index, : len(row)] = 1
        return ids, mask

    def special_ids(self):
        firsts = {f"{name}_token_id": number for name, number in self.first_ids.items()}
        return {"pad_token_id": self.pad_id, "sep_token_id": self.sep_id, **firsts}

    def prompt_ids(self, prompt):
        return [4, *self.ids(prompt)]

    def decode(self, ids):
        return " ".join(self.words[i] for i in ids if i >= len(WORDS))


@pytest.fixture
def processor():
    return FakeProcessor()
