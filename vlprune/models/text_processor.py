"""What turns images and texts into the inputs of the models with two encoders, CLIP and SigLIP."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from transformers import CLIPTokenizerFast, PreTrainedTokenizerFast

from vlprune.errors import RequestError
from vlprune.files import write_json
from vlprune.models.pixels import Pixels


Family = Literal["clip", "siglip"]

_CLASSES = {"clip": ("CLIPImageProcessor", "CLIPProcessor"), "siglip": ("SiglipImageProcessor", "SiglipProcessor")}
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"  # what CLIP's tokenizer never merges across
_WORD_END = "</w>"  # marks the last byte of a word


class EncoderProcessor:
    """Images to pixel values; texts to ids and mask, either padded to the longest or always to full length.

    SigLIP was trained on texts padded to full length, and reads the padding: the mask has no zeros then.

    Args:
        tokenizer: fast, with an end and a padding token.
        pixels: preprocessing of images.
        length: tokens of the longest text the model reads.
        family: "clip" pads to the longest, "siglip" to `length`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, pixels: Pixels, length: int, family: Family) -> None:
        self.tokenizer = tokenizer
        self.pixels = pixels
        self.length = length
        self.family = family

    @property
    def image_size(self) -> int:
        """Side of the square input image in pixels."""
        return self.pixels.image_size

    @property
    def pad_id(self) -> int:
        """Id of the padding token."""
        return int(self.tokenizer.pad_token_id)

    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """See `Pixels.images`.

        Args:
            images: images of any size.

        Returns:
            np.ndarray: float32 [B, 3, image_size, image_size].
        """
        return self.pixels.images(images)

    def resize(self, images: Sequence[Image.Image]) -> np.ndarray:
        """See `Pixels.resize`.

        Args:
            images: images of any size.

        Returns:
            np.ndarray: uint8 [B, image_size, image_size, 3].
        """
        return self.pixels.resize(images)

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """See `Pixels.normalise`.

        Args:
            pixels: uint8 [B, image_size, image_size, 3].

        Returns:
            np.ndarray: float32 [B, 3, image_size, image_size].
        """
        return self.pixels.normalise(pixels)

    def texts(
        self, texts: Sequence[str], first: str = "cls", max_length: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Tokenise and pad.

        Args:
            texts: B texts.
            first: of no effect: texts are read in one way only.
            max_length: longer texts are cut to this many tokens, the end token kept; None = all the model reads.

        Returns:
            tuple[np.ndarray, np.ndarray]: ids and mask (1 = read, 0 = padding that is not), int64 [B, T] each.
        """
        longest = min(max_length or self.length, self.length)
        given = self.tokenizer(list(texts), truncation=True, max_length=longest)["input_ids"]
        width = self.length if self.family == "siglip" else max(map(len, given))
        ids = np.full((len(given), width), self.pad_id, np.int64)
        mask = np.full(ids.shape, int(self.family == "siglip"), np.int64)
        for row, tokens in enumerate(given):
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask

    def special_ids(self) -> dict[str, int]:
        """Name the special tokens, for task.json.

        Returns:
            dict[str, int]: by name.
        """
        ids = {"pad_token_id": self.pad_id, "eos_token_id": int(self.tokenizer.eos_token_id)}
        start = self.tokenizer.bos_token_id
        return ids if start is None else {**ids, "bos_token_id": int(start)}

    def save(self, folder: Path | str) -> None:
        """Write tokenizer files and `preprocessor_config.json` in Hugging Face format.

        Args:
            folder: an existing folder.
        """
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder)
        images, both = _CLASSES[self.family]
        settings = {"image_processor_type": images, "processor_class": both, **self.pixels.settings()}
        write_json(folder / "preprocessor_config.json", settings)


def load_clip_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load CLIP's tokenizer of a folder (tokenizer.json, or vocab.json and merges.txt); no code of the folder runs.

    Args:
        folder: a Hugging Face folder.

    Returns:
        PreTrainedTokenizerFast: the tokenizer.

    Raises:
        RequestError: there is none, or it is broken.
    """
    there = [name for name in ("tokenizer.json", "vocab.json", "merges.txt") if (folder / name).is_file()]
    if "tokenizer.json" not in there and len(there) < 2:
        raise RequestError(f"{folder} has no tokenizer: put tokenizer.json, or vocab.json and merges.txt, there")
    return _load(CLIPTokenizerFast, folder)


def load_siglip_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load SigLIP's tokenizer of a folder (tokenizer.json); no code of the folder runs.

    Args:
        folder: a Hugging Face folder.

    Returns:
        PreTrainedTokenizerFast: the tokenizer.

    Raises:
        RequestError: there is none, or it is broken.
    """
    if not (folder / "tokenizer.json").is_file():
        held = " (its spiece.model alone is not read)" if (folder / "spiece.model").is_file() else ""
        raise RequestError(f"{folder} has no tokenizer.json{held}: take it from the model's page on the hub")
    return _load(PreTrainedTokenizerFast, folder)


def _load(kind: Any, folder: Path) -> PreTrainedTokenizerFast:
    try:
        tokenizer = kind.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exception
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(f"the tokenizer files in {folder} cannot be read ({why})") from error
    for name in ("pad_token", "eos_token"):
        if getattr(tokenizer, f"{name}_id") is None:
            raise RequestError(f"the tokenizer in {folder} has no {name}: name it in special_tokens_map.json")
    return tokenizer


def learn_clip_tokenizer(texts: Sequence[str], size: int, length: int) -> CLIPTokenizerFast:
    """Learn a tokenizer of CLIP's kind from texts: byte pairs within words, lower case, start and end tokens.

    Args:
        texts: the texts to learn from.
        size: at most this many tokens, and at least the 512 of single bytes, inside and at the end of words, and two
            more.
        length: tokens of the longest text.

    Returns:
        CLIPTokenizerFast: the tokenizer, the same for the same texts; it pads with the end token.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    start, end = "<|startoftext|>", "<|endoftext|>"
    normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(character + _WORD_END for character in alphabet)]
    words = Counter(word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    merges = _merges(words, size - len(tokens) - 2)
    tokens += [*dict.fromkeys(left + right for left, right in merges), start, end]
    ids = {token: index for index, token in enumerate(tokens)}
    model = models.BPE(
        ids, merges, unk_token=end, continuing_subword_prefix="", end_of_word_suffix=_WORD_END, fuse_unk=False
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, splitter, decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(
        sep=(end, ids[end]), cls=(start, ids[start]), add_prefix_space=False, trim_offsets=False
    )
    return CLIPTokenizerFast(tokenizer_object=tokenizer, model_max_length=length)


def _merges(words: Mapping[str, int], most: int) -> list[tuple[str, str]]:
    """Learn byte pair merges (Sennrich et al., ACL 2016), ties by the alphabet; a pass merges the likeliest pair."""
    pieces = {word: [*word[:-1], word[-1] + _WORD_END] for word in words}
    merges: list[tuple[str, str]] = []
    while len(merges) < most:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for parts in pieces.values():
            index = 0
            while index < len(parts) - 1:
                if (parts[index], parts[index + 1]) == best:
                    parts[index : index + 2] = ["".join(best)]
                index += 1
    return merges
