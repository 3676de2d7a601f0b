"""Tokenizers of CLIP's kind: the same as transformers' slow one, repeatable, complete."""

import pytest
from transformers import CLIPTokenizer

from vlprune.models.text_processor import learn_clip_tokenizer, load_clip_tokenizer


TEXTS = ["A dog runs.", "The dog is running on grass", "two Dogs run , a café", "it's the dog's 12 grasses"]
ODD = ["an unknown Word!? 12é 汉's I'LL", "", "   two   spaces\n", "x" * 50, "😀 <|endoftext|> after"]


def test_tokens_are_those_of_transformers_own(tmp_path):
    tokenizer = learn_clip_tokenizer(TEXTS, 560, 32)
    tokenizer.save_pretrained(tmp_path)
    theirs = CLIPTokenizer.from_pretrained(tmp_path)  # pure Python, from vocab.json and merges.txt
    again = load_clip_tokenizer(tmp_path)
    for text in TEXTS + ODD:
        expected = theirs(text)["input_ids"]
        assert tokenizer(text)["input_ids"] == again(text)["input_ids"] == expected
        assert expected[0] == tokenizer.bos_token_id and expected[-1] == tokenizer.eos_token_id
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == len(tokenizer) - 1 == max(tokenizer.get_vocab().values())


def test_frequent_words_become_one_token_and_every_byte_is_known():
    tokenizer = learn_clip_tokenizer(TEXTS, 1000, 32)
    assert [len(tokenizer(word)["input_ids"]) for word in ("dog", "RUNNING", "grass", "café")] == [3] * 4
    assert tokenizer.eos_token_id not in tokenizer(ODD[0])["input_ids"][1:-1]  # which stands for what is unknown
    small = learn_clip_tokenizer(TEXTS, 520, 32)
    assert len(small) == 520 and len(small("running")["input_ids"]) > 3


def test_the_tokenizer_follows_from_the_texts():
    first = learn_clip_tokenizer(TEXTS, 560, 32).backend_tokenizer.to_str()
    assert first == learn_clip_tokenizer(TEXTS, 560, 32).backend_tokenizer.to_str()
    assert first == learn_clip_tokenizer(TEXTS[::-1], 560, 32).backend_tokenizer.to_str()


@pytest.mark.parametrize("size", [514, 530])
def test_the_size_is_kept(size):
    assert len(learn_clip_tokenizer(TEXTS, size, 32)) == size
