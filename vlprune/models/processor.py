"""Pixels and tokens: a Hugging Face tokenizer plus the image preprocessing of `preprocessor_config.json`, in numpy.

The image path repeats transformers' `BlipImageProcessor` to the last bit (Pillow bicubic resize, rescale, normalise in
float32) so that evaluation, export checks and runners without PyTorch see the same input.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from vlprune.errors import RequestError
from vlprune.files import read_json, write_json


CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # what BLIP and CLIP checkpoints were trained with
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", "[ENC]")

First = Literal["cls", "enc", "dec"]


class Processor:
    """Turns images and texts into model inputs and token ids back into text.

    BLIP marks what a text is for by its first token: [CLS] for the contrastive text embedding, [ENC] for text read
    together with an image (matching, questions), [DEC] for text to be generated (Li et al., BLIP, 2022, section 3).

    Args:
        tokenizer: a BERT-like fast tokenizer with [CLS], [SEP] and [PAD].
        image_size: side of the square input image in pixels.
        dec_token_id: id of [DEC].
        enc_token_id: id of [ENC].
        mean: per-channel mean of the normalisation, for pixels in [0, 1].
        std: per-channel standard deviation.
    """

    family = "blip"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        image_size: int,
        dec_token_id: int,
        enc_token_id: int,
        mean: Sequence[float] = CLIP_MEAN,
        std: Sequence[float] = CLIP_STD,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.mean = np.asarray(mean, np.float32)
        self.std = np.asarray(std, np.float32)
        self.pad_id: int = tokenizer.pad_token_id
        self.sep_id: int = tokenizer.sep_token_id
        self.first_ids: dict[str, int] = {"cls": tokenizer.cls_token_id, "enc": enc_token_id, "dec": dec_token_id}

    def images(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Resize, rescale and normalise.

        Args:
            images: RGB images of any size.

        Returns:
            np.ndarray: float32 [B, 3, image_size, image_size].
        """
        return self.normalise(self.resize(images))

    def resize(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Resize (bicubic, to a square, as BLIP does).

        Args:
            images: RGB images of any size.

        Returns:
            np.ndarray: uint8 [B, image_size, image_size, 3].
        """
        size = (self.image_size, self.image_size)
        pixels = np.empty((len(images), *size, 3), np.uint8)
        for row, image in zip(pixels, images, strict=True):
            row[:] = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC, reducing_gap=None))
        return pixels

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """Turn resized pixels into model input.

        Args:
            pixels: uint8 [B, image_size, image_size, 3].

        Returns:
            np.ndarray: float32 [B, 3, image_size, image_size].
        """
        # float64 for the rescale, then float32: what transformers does.
        scaled = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
        return np.ascontiguousarray(((scaled - self.mean) / self.std).transpose(0, 3, 1, 2))

    def texts(self, texts: Sequence[str], first: First = "cls", max_length: int = 35) -> tuple[np.ndarray, np.ndarray]:
        """Tokenise, pad to the longest, and set the first token.

        Args:
            texts: B texts.
            first: which token stands first.
            max_length: longer texts are cut to this many tokens, [SEP] kept.

        Returns:
            tuple[np.ndarray, np.ndarray]: ids and mask (1 = token, 0 = padding), int64 [B, T] each.
        """
        encoded = self.tokenizer(list(texts), padding="longest", truncation=True, max_length=max_length)
        ids = np.asarray(encoded["input_ids"], np.int64)
        mask = np.asarray(encoded["attention_mask"], np.int64)
        ids[:, 0] = self.first_ids[first]
        return ids, mask

    def special_ids(self) -> dict[str, int]:
        """Name the special tokens, for task.json.

        Returns:
            dict[str, int]: by name.
        """
        firsts = {f"{name}_token_id": self.first_ids[name] for name in ("cls", "enc", "dec")}
        return {"pad_token_id": self.pad_id, "sep_token_id": self.sep_id, **firsts}

    def prompt_ids(self, prompt: str) -> list[int]:
        """Tokenise a decoder prompt: [DEC] and the prompt's tokens, no [SEP].

        Args:
            prompt: the text every caption starts with, may be empty.

        Returns:
            list[int]: token ids.
        """
        return [self.first_ids["dec"], *self.tokenizer(prompt, add_special_tokens=False)["input_ids"]]

    def decode(self, ids: Sequence[int]) -> str:
        """Turn token ids into text, without special tokens.

        Args:
            ids: token ids.

        Returns:
            str: the text.
        """
        special = set(self.first_ids.values()) | {self.pad_id, self.sep_id}
        return self.tokenizer.decode([int(i) for i in ids if int(i) not in special], skip_special_tokens=True).strip()

    def save(self, folder: Path | str) -> None:
        """Write tokenizer files and `preprocessor_config.json` in Hugging Face format.

        Args:
            folder: an existing folder.
        """
        folder = Path(folder)
        self.tokenizer.save_pretrained(folder)
        side = {"height": self.image_size, "width": self.image_size}
        write_json(
            folder / "preprocessor_config.json",
            {
                "image_processor_type": "BlipImageProcessor",
                "processor_class": "BlipProcessor",
                "do_convert_rgb": True,
                "do_resize": True,
                "size": side,
                "resample": int(Image.Resampling.BICUBIC),
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": [float(str(v)) for v in self.mean],
                "image_std": [float(str(v)) for v in self.std],
            },
        )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the BERT tokenizer of a folder (tokenizer.json or vocab.txt); no code of the folder runs.

    Args:
        folder: a Hugging Face folder.

    Returns:
        PreTrainedTokenizerFast: the tokenizer.

    Raises:
        RequestError: there is none, or it is broken.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise RequestError(f"{folder} has no tokenizer: put tokenizer.json or vocab.txt of the model there")
    try:
        return BertTokenizerFast.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exception
        raise RequestError(f"the tokenizer files in {folder} cannot be read ({str(error).splitlines()[0]})") from error


def word_tokenizer(words: Sequence[str]) -> BertTokenizerFast:
    """Make a BERT tokenizer over whole words, with [DEC] and [ENC] added.

    Args:
        words: the vocabulary, lower case.

    Returns:
        BertTokenizerFast: the tokenizer; ids follow the order given.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    fast = BertTokenizerFast(tokenizer_object=tokenizer, bos_token="[DEC]")
    fast.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    return fast


def wordpiece_tokenizer(texts: Sequence[str], size: int) -> BertTokenizerFast:
    """Learn a WordPiece vocabulary from texts and make a BERT tokenizer of it, with [DEC] and [ENC] added.

    Args:
        texts: the texts to learn from, lower-cased on the way.
        size: at most this many tokens, the special ones included ([MASK] is one more); at least two per
            character are kept.

    Returns:
        BertTokenizerFast: the tokenizer, the same for the same texts.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.BertNormalizer()
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    characters = sorted({c for text in texts for c in learner.normalizer.normalize_str(text) if not c.isspace()})
    # The trainer numbers characters inside words in the order of a hash map, and breaks ties by number: give it ours.
    trainer = trainers.WordPieceTrainer(
        vocab_size=size - len(SPECIAL) - 1,
        show_progress=False,
        initial_alphabet=characters,
        special_tokens=["##" + character for character in characters],
    )
    learner.train_from_iterator(texts, trainer)
    vocabulary = learner.get_vocab()
    return word_tokenizer(sorted(vocabulary, key=vocabulary.__getitem__))


def read_preprocessor(folder: Path) -> dict[str, Any]:
    """Read the normalisation of a folder's `preprocessor_config.json`.

    Args:
        folder: a Hugging Face folder.

    Returns:
        dict[str, Any]: `mean` and `std`, three numbers each.

    Raises:
        RequestError: the file asks for steps this preprocessing does not do.
    """
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return {"mean": CLIP_MEAN, "std": CLIP_STD}
    config = read_json(path)
    if not isinstance(config, dict):
        raise RequestError(f"{path} must hold a JSON object")
    expected = {"do_center_crop": False, "resample": 3, "do_rescale": True, "do_normalize": True, "do_resize": True}
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise RequestError(f"{path}: {key} = {json.dumps(config[key])} is not supported, only {json.dumps(value)}")
    mean, std = config.get("image_mean", CLIP_MEAN), config.get("image_std", CLIP_STD)
    for name, values in (("image_mean", mean), ("image_std", std)):
        if not (
            isinstance(values, list | tuple)
            and len(values) == 3
            and all(isinstance(v, int | float) and abs(v) < 1e30 for v in values)
        ):
            raise RequestError(f"{path}: {name} must be three numbers")
    if min(std) <= 0:
        raise RequestError(f"{path}: image_std must be positive")
    return {"mean": mean, "std": std}
