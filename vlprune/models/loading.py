"""From a name to a loaded model: cache, hub, folders and files. Nothing read from disk is trusted or executed."""

from __future__ import annotations

import os
import pickle
import urllib.error
import urllib.request
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertTokenizerFast, BlipConfig
from transformers.utils import logging as transformers_logging

from vlprune import names
from vlprune.errors import MachineError, RequestError
from vlprune.files import atomic_path, read_json, sha256
from vlprune.models import FAMILIES, MODELS, blip, blip_nlvr
from vlprune.models.blip import Blip
from vlprune.models.family import Model, Source
from vlprune.models.processor import Processor, load_tokenizer, read_preprocessor
from vlprune.models.states import check_vocabulary
from vlprune.progress import task
from vlprune.structured.surgery import checked_sizes


WEIGHTS = Path(__file__).parent / "weights"
HUB_FILES = ["*.json", "*.safetensors", "pytorch_model.bin", "vocab.txt", "merges.txt"]

transformers_logging.set_verbosity_error()


def load(model: str, *, family: str | None, image_size: int | None, seed: int) -> Model:
    """See `vlprune.models.load`; the arguments are the same.

    Args:
        model: alias, folder, file or hub id.
        family: of a file.
        image_size: pixels.
        seed: of random weights.

    Returns:
        Model: the model.

    Raises:
        RequestError: the model is unknown or its files are broken.
    """
    if family is not None:
        names.check("family", family, FAMILIES)
    if family == "blip_nlvr":
        return blip_nlvr.of(load(model, family="blip", image_size=image_size, seed=seed), seed)
    if info := MODELS.get(model):
        if info.kind == "embedded":
            return load_folder(WEIGHTS / model, model, image_size)
        if info.kind == "random":
            if info.family == "blip":
                return _base_random(model, image_size or 224, seed)
            return _family(info.family).base_random(model, WEIGHTS, image_size or 224, seed)
        if info.kind == "original":
            return load_original(_download(info.checkpoint), model, image_size)
        return load_folder(_from_hub(info.checkpoint), model, image_size)
    path = Path(model)
    if path.is_dir():
        return load_folder(path, model, image_size)
    if path.is_file():
        if family is None:
            raise RequestError(f"{model} is a file: say what it holds, as in --family blip")
        if family != "blip":
            raise RequestError(f"{model} is a file: of the family {family} only Hugging Face folders are read")
        return load_original(path, model, image_size)
    if path.suffix in (".pth", ".pt", ".bin", ".safetensors") or model.startswith((".", "/", "~")):
        raise RequestError(f"there is no file or folder {model}: check the path")
    if model.count("/") == 1:
        return load_folder(_from_hub(model), model, image_size)
    names.check("model", model, MODELS)
    raise AssertionError("unreachable: check() raises for unknown names")


def load_folder(folder: Path, name: str, image_size: int | None) -> Model:
    """Load a Hugging Face folder of any family.

    Args:
        folder: config.json, weights, tokenizer files.
        name: for messages and the report.
        image_size: pixels, None = the config's.

    Returns:
        Model: the model.

    Raises:
        RequestError: a file is missing or broken.
    """
    raw = read_json(folder / "config.json")
    types = {kind: family for family, info in FAMILIES.items() for kind in info.model_types}
    kind = raw.get("model_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in types:
        raise RequestError(
            f"{folder}/config.json is of model type {kind!r:.60}: supported are {', '.join(map(repr, types))}"
        )
    extra: dict[str, Any] = raw["vlprune"] if isinstance(raw.get("vlprune"), dict) else {}
    smaller = checked_sizes(extra.get("sizes"), f"{folder}/config.json")
    options = _options(extra.get("options", {}), folder)
    state, weights = _read_weights(folder)
    random = bool(extra.get("random_weights", False))
    source = Source(name, name if folder.parent == WEIGHTS else str(folder), sha256(weights), random)
    from_folder = _blip if types[kind] == "blip" else _family(types[kind]).from_folder
    model: Model = from_folder(folder, raw, state, source, image_size, smaller)
    model.options = options
    return model


def _family(name: str) -> Any:
    """The file of a family; transformers' modules of the others are not imported."""
    return import_module(f"vlprune.models.{name}")


def _blip(
    folder: Path,
    raw: dict[str, Any],
    state: dict[str, Tensor],
    source: Source,
    image_size: int | None,
    smaller: dict[str, list[int]],
) -> Model:
    """Make a BLIP of what is in a folder."""
    try:
        config = BlipConfig.from_dict(raw)
        text, vision = config.text_config, config.vision_config
        sizes = [text.vocab_size, text.bos_token_id, text.hidden_size, text.num_hidden_layers]
        sizes += [vision.image_size, vision.patch_size, vision.hidden_size, vision.num_hidden_layers]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError("sizes and token ids must be positive integers")
    except Exception as error:  # transformers raises many kinds for a broken config
        raise RequestError(f"{folder}/config.json cannot be used ({str(error).splitlines()[0]})") from error
    tokenizer = load_tokenizer(folder)
    check_vocabulary(tokenizer, text.vocab_size, folder)
    # Checkpoints on the hub never name [ENC]; in the original vocabulary it follows [DEC].
    enc = getattr(text, "enc_token_id", None) or text.bos_token_id + 1
    if isinstance(enc, bool) or not isinstance(enc, int) or enc < 0 or text.bos_token_id >= text.vocab_size:
        raise RequestError(f"{folder}/config.json: bos_token_id or enc_token_id is no token of the model")
    text.enc_token_id = enc if enc < text.vocab_size else tokenizer.cls_token_id
    processor = Processor(
        tokenizer,
        image_size or config.vision_config.image_size,
        text.bos_token_id,
        text.enc_token_id,
        **read_preprocessor(folder),
    )
    build = blip_nlvr.build if blip_nlvr.holds(state) else blip.build
    return build(config, state, processor, source, smaller)


def _options(options: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """Check the settings a folder suggests: numbers by name, per task; their meaning is checked where they are used."""
    known = {*names.TASKS, "finetune"}
    if not isinstance(options, dict) or not all(
        task in known and isinstance(entry, dict) and all(isinstance(v, int | float) for v in entry.values())
        for task, entry in options.items()
    ):
        raise RequestError(
            f"{folder}/config.json: vlprune.options must map {', '.join(sorted(known))} to named numbers"
        )
    return options


def load_original(path: Path, name: str, image_size: int | None) -> Model:
    """Load a `.pth` file of the BLIP authors, one for NLVR2 too; its tokenizer is bert-base-uncased.

    Args:
        path: the file; a vocab.txt or tokenizer.json beside it is used in place of the hub's.
        name: for messages and the report.
        image_size: pixels, None = the checkpoint's.

    Returns:
        Model: the model.

    Raises:
        RequestError: the file is no such checkpoint.
    """
    loaded = torch_load(path)
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else loaded
    if not _is_state(state):
        raise RequestError(f"{path} is no original BLIP checkpoint: it must hold tensors under 'model'")
    tensors = blip.from_original(state)
    config = blip.config_of(tensors, str(path))
    text = config.text_config
    size = image_size or config.vision_config.image_size
    tokenizer = _bert_tokenizer(path.parent)
    check_vocabulary(tokenizer, text.vocab_size, path.parent)
    processor = Processor(tokenizer, size, text.bos_token_id, text.enc_token_id)
    text.sep_token_id = text.eos_token_id = processor.sep_id
    text.pad_token_id = processor.pad_id
    build = blip_nlvr.build if blip_nlvr.holds(tensors) else blip.build
    return build(config, tensors, processor, Source(name, str(path), sha256(path)))


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """Read model.safetensors, its shards, or pytorch_model.bin; also tell which file names the checkpoint's hash."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return _safetensors(single), single
    if index.is_file():
        listed = read_json(index)
        files = listed.get("weight_map", {}) if isinstance(listed, dict) else {}
        if not isinstance(files, dict) or not files:
            raise RequestError(f"{index} lists no weights")
        state: dict[str, Tensor] = {}
        for file in sorted({str(f) for f in files.values()}):
            if Path(file).name != file:
                raise RequestError(f"{index} points outside its folder: {file!r}")
            state.update(_safetensors(folder / file))
        return state, index
    if (folder / "pytorch_model.bin").is_file():
        loaded = torch_load(folder / "pytorch_model.bin")
        if not _is_state(loaded):
            raise RequestError(f"{folder}/pytorch_model.bin must hold a dictionary of tensors")
        return loaded, folder / "pytorch_model.bin"
    raise RequestError(f"{folder} has no model.safetensors or pytorch_model.bin: is it a Hugging Face model folder?")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise RequestError(f"{path} is no intact safetensors file ({error}): copy or download it again") from error


def _is_state(loaded: Any) -> bool:
    """Whether a file held named tensors and nothing else."""
    return isinstance(loaded, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in loaded.items())


def torch_load(path: Path) -> Any:
    """Read a PyTorch file without running code from it.

    Args:
        path: the file.

    Returns:
        Any: tensors and plain containers, on the CPU.

    Raises:
        RequestError: it is damaged, or holds anything else.
    """
    damaged = f"{path} is no intact PyTorch file: copy or download it again"
    try:
        with path.open("rb") as file:
            if file.read(2) == b"PK" and not zipfile.is_zipfile(path):  # its end is missing; torch would try pickle
                raise RequestError(damaged)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RequestError(
            f"{path} holds more than tensors and was not loaded: vlprune runs no code from a checkpoint"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise RequestError(damaged) from error


def _base_random(name: str, image_size: int, seed: int) -> Blip:
    """BLIP-base with seeded random weights; its tokenizer is the embedded one, the vocabulary keeps its full size."""
    tokenizer = load_tokenizer(WEIGHTS / "blip-tiny")
    dec, enc = tokenizer.convert_tokens_to_ids(["[DEC]", "[ENC]"])
    config = BlipConfig(
        vision_config={"image_size": image_size, "layer_norm_eps": 1e-6, "initializer_range": 0.02},
        text_config={
            "vocab_size": 30524,
            "num_attention_heads": 12,
            "encoder_hidden_size": 768,
            "bos_token_id": dec,
            "enc_token_id": enc,
            "sep_token_id": tokenizer.sep_token_id,
            "eos_token_id": tokenizer.sep_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "label_smoothing": 0.1,
        },
    )
    processor = Processor(tokenizer, image_size, dec, enc)
    return blip.new(config, processor, Source(name, f"seed {seed}", random_weights=True), seed, biases=True)


# --- downloads --------------------------------------------------------------------------------------------------------


def cache() -> Path:
    """Tell where downloads are kept.

    Returns:
        Path: `VLPRUNE_CACHE`, or `vlprune` in the user's cache folder.
    """
    if configured := os.environ.get("VLPRUNE_CACHE"):
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlprune"


def _download(url: str) -> Path:
    """Fetch a published file into the cache, once."""
    target = cache() / url.rsplit("/", 1)[1]
    if target.is_file():
        return target
    way_out = f"download {url} elsewhere and pass the file with --family blip, or put it at {target}"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise MachineError(f"{target.name} is not in the cache and HF_HUB_OFFLINE is set: {way_out}")
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            total = int(answer.headers.get("Content-Length") or 0) or None
            with atomic_path(target) as temporary, task(f"downloading {target.name}", total) as advance:
                with temporary.open("wb") as file:
                    received = 0
                    while chunk := answer.read(1 << 20):
                        file.write(chunk)
                        received += len(chunk)
                        advance(len(chunk))
                if total is not None and received != total:
                    raise MachineError(f"{target.name} broke off after {received} of {total} bytes: {way_out}")
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", error)
        raise MachineError(f"cannot download {target.name} ({reason}): {way_out}") from error
    return target


def _from_hub(repository: str) -> Path:
    """Fetch the files of a hub model into Hugging Face's cache, or find them there."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        try:  # the cache first: no network is needed for what is there
            return Path(huggingface_hub.snapshot_download(repository, allow_patterns=HUB_FILES, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(huggingface_hub.snapshot_download(repository, allow_patterns=HUB_FILES, etag_timeout=10))
    except HFValidationError as error:
        raise RequestError(f"{repository!r} is no model alias, path or hub id: see vlprune models") from error
    except RepositoryNotFoundError as error:
        raise RequestError(f"the hub has no public model {repository!r}: check the name") from error
    except Exception as error:  # every network failure ends here, whatever client the hub library uses
        raise MachineError(
            f"cannot get {repository} from the hub ({type(error).__name__}) and it is not in the cache: "
            "download the folder on a machine with network and pass its path"
        ) from error


def _bert_tokenizer(folder: Path) -> BertTokenizerFast:
    if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        return load_tokenizer(folder)
    try:
        return load_tokenizer(_from_hub("google-bert/bert-base-uncased"))
    except MachineError as error:
        raise MachineError(
            f"the checkpoint needs the tokenizer of bert-base-uncased, not in the cache: put its vocab.txt in {folder}"
        ) from error
