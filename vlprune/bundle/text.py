"""Texts to token ids and back by tokenizer.json alone, as the processors with transformers' tokenizers do it.

See `vlprune.models.processor` (BLIP) and `vlprune.models.text_processor` (CLIP, SigLIP); tests hold both equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ..errors import RequestError


# What transformers puts right in decoded text where a tokenizer asks for it (clean_up_tokenization_spaces).
_CLEAN = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
          (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))  # fmt: skip


class Texts:
    """Tokenises for a task.

    Args:
        tokenizer: tokenizer.json.
        config: tokenizer_config.json.
        spec: task.json; family, max_length and the ids of special tokens are used.

    Raises:
        RequestError: the tokenizer is broken.
    """

    def __init__(self, tokenizer: bytes, config: Mapping[str, Any], spec: Mapping[str, Any]) -> None:
        self._tokenizer = harmless(lambda: Tokenizer.from_buffer(tokenizer), "tokenizer.json cannot be used")
        self._tokenizer.no_padding()
        self._clean = config.get("clean_up_tokenization_spaces") is True
        self._family = spec["family"]
        self._pad = spec["pad_token_id"]
        self._length = spec["max_length"]
        ids = {name: spec.get(f"{name}_token_id") for name in ("cls", "enc", "dec", "sep")}
        self._first = {name: ids[name] for name in ("cls", "enc", "dec")}
        self._special = {*ids.values(), self._pad} - {None}

    def texts(
        self, texts: Sequence[str], first: str = "cls", max_length: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokenise and pad; set the first token where the family marks by it what a text is for.

        Args:
            texts: B texts.
            first: "cls", "enc" or "dec", see `vlprune.models.processor.Processor`; of no effect for other families.
            max_length: longer texts are cut to this many tokens, the end token kept; None = all that the task reads.

        Returns:
            tuple[np.ndarray, np.ndarray]: ids and mask (1 = read), int64 [B, T] each.

        Raises:
            RequestError: the tokenizer fails on these texts.
        """
        self._tokenizer.enable_truncation(max_length or self._length)
        encoded = harmless(lambda: self._tokenizer.encode_batch(list(texts)), "the tokenizer fails on this text")
        given = [encoding.ids for encoding in encoded]
        width = self._length if self._family == "siglip" else max(map(len, given))
        ids = np.full((len(given), width), self._pad, np.int64)
        mask = np.full(ids.shape, int(self._family == "siglip"), np.int64)
        for row, tokens in enumerate(given):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        if self._first[first] is not None:
            ids[:, 0] = self._first[first]
        return ids, mask

    def decode(self, ids: Sequence[int]) -> str:
        """Turn token ids into text, without special tokens.

        Args:
            ids: token ids.

        Returns:
            str: the text.
        """
        kept = [int(i) for i in ids if int(i) not in self._special]
        text = harmless(lambda: self._tokenizer.decode(kept, skip_special_tokens=True), "tokens have no text")
        if self._clean:
            for loose, tight in _CLEAN:
                text = text.replace(loose, tight)
        return text.strip()


def harmless(call: Any, what: str) -> Any:
    """Call into tokenizers, whose errors are bare exceptions, and whose bugs are no exceptions at all.

    Args:
        call: takes nothing.
        what: to say if it fails.

    Returns:
        Any: its result.

    Raises:
        RequestError: it failed.
    """
    try:
        return call()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is a BaseException
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise RequestError(f"{what} ({why}): get the bundle again") from error
