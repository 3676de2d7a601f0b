"""From a checkpoint's tensors to a model: what is checked before anything is allocated, for every family."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig

from vlprune.errors import RequestError
from vlprune.models.family import Model
from vlprune.models.pixels import Pixels, read_pixels
from vlprune.structured.surgery import reshape, tell_depth


M = TypeVar("M", bound=Model)

_TOWER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def check_sizes(part: Any, where: str, names: Sequence[str], checkpoint: str) -> None:
    """Refuse sizes that are none.

    Args:
        part: a config.
        where: its name, for messages.
        names: its fields.
        checkpoint: for messages.

    Raises:
        RequestError: one is not a positive integer.
    """
    for name in names:
        value = getattr(part, name, None)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise RequestError(f"{checkpoint}: {where} has {name} = {value!r:.40}, which is no size")


def check_tower(
    part: Any, where: str, names: Sequence[str], state: Mapping[str, Tensor], prefix: str, checkpoint: str
) -> None:
    """Refuse the config of a tower that no model can be made of, or whose depth is not the checkpoint's.

    Args:
        part: config of the tower.
        where: its name, for messages.
        names: sizes the tower has beside those of every transformer.
        state: the checkpoint's tensors.
        prefix: what their names begin with, up to the index of the layer.
        checkpoint: for messages.

    Raises:
        RequestError: a field is unusable.
    """
    check_sizes(part, where, (*_TOWER, *names), checkpoint)
    if part.hidden_size % part.num_attention_heads:
        raise RequestError(
            f"{checkpoint}: {where} has hidden_size {part.hidden_size}, "
            f"not a multiple of its {part.num_attention_heads} heads"
        )
    if not isinstance(part.hidden_act, str):
        raise RequestError(f"{checkpoint}: {where} has hidden_act = {part.hidden_act!r:.40}, which is no name")
    if not isinstance(part.layer_norm_eps, float) or not 0 < part.layer_norm_eps < 1:
        raise RequestError(f"{checkpoint}: {where} has layer_norm_eps = {part.layer_norm_eps!r:.40}, no small number")
    held = len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})
    if held != part.num_hidden_layers:
        raise RequestError(
            f"{checkpoint} holds {held} layers under {prefix[:-1]}, its config says {part.num_hidden_layers}"
        )


def check_vocabulary(tokenizer: Any, size: int, folder: Path) -> None:
    """Refuse a tokenizer that gives ids the model does not know.

    Args:
        tokenizer: has a length.
        size: tokens the model knows.
        folder: for messages.

    Raises:
        RequestError: it does.
    """
    if len(tokenizer) > size:
        raise RequestError(f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {size}")


def read_config(kind: type[PretrainedConfig], raw: Mapping[str, Any], folder: Path) -> Any:
    """Make transformers' configuration of a config.json; its sizes are not checked yet.

    Args:
        kind: transformers' class.
        raw: content of the file; not changed.
        folder: for messages.

    Returns:
        Any: the configuration.

    Raises:
        RequestError: it cannot be used.
    """
    try:
        return kind.from_dict(copy.deepcopy(dict(raw)))
    except Exception as error:  # transformers raises many kinds for a broken config
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(f"{folder}/config.json cannot be used ({why:.200})") from error


def read_square(folder: Path, default: Pixels, image_size: int | None) -> Pixels:
    """Read a folder's preprocessing, which must make images of the size the model sees.

    Args:
        folder: a Hugging Face folder.
        default: see `read_pixels`; of the size the model sees.
        image_size: the size wanted instead, None = the model's.

    Returns:
        Pixels: at the size wanted.

    Raises:
        RequestError: it makes images of another size.
    """
    pixels = read_pixels(folder, default)
    if pixels.image_size != default.image_size:
        raise RequestError(
            f"{folder}: preprocessor_config.json makes images of {pixels.image_size} pixels, "
            f"config.json says the model sees {default.image_size}"
        )
    return pixels.at(image_size or default.image_size)


def on_meta(make: Callable[[], M], smaller: Mapping[str, Sequence[int]], checkpoint: str) -> M:
    """Make a model without allocating anything, in the shapes of a cut one.

    Args:
        make: makes the model its config describes.
        smaller: what was cut, as `vlprune.structured.sizes` lists it and `checked_sizes` let pass.
        checkpoint: for messages.

    Returns:
        M: on the meta device.

    Raises:
        RequestError: the config, or what was cut, is not possible.
    """
    try:
        with torch.device("meta"):
            model = make()
    except Exception as error:  # transformers raises many kinds for a broken config
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise RequestError(f"{checkpoint}: unusable config ({why:.200})") from error
    try:
        reshape(model, smaller)
    except RequestError as error:
        raise RequestError(f"{checkpoint}: {error}") from error
    tell_depth(model)
    return model


def check_state(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], checkpoint: str) -> None:
    """Refuse tensors that are missing, unknown, of the wrong shape, or hold NaN or infinity.

    Args:
        expected: what the model has, may be on the meta device.
        state: the checkpoint's tensors.
        checkpoint: for messages.

    Raises:
        RequestError: one of these.
    """
    missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unknown:
        what, keys = ("lacks", missing) if missing else ("holds unknown", unknown)
        raise RequestError(f"{checkpoint} {what} {keys[0]}" + (f" and {len(keys) - 1} more" if keys[1:] else ""))
    for key, tensor in expected.items():
        if tensor.shape != state[key].shape:
            raise RequestError(
                f"{checkpoint}: {key} has shape {list(state[key].shape)}, its config says {list(tensor.shape)}"
            )
        if not state[key].isfinite().all():
            raise RequestError(f"{checkpoint}: {key} holds NaN or infinity: it is of no use")


def fill(model: nn.Module, state: Mapping[str, Tensor], checkpoint: str) -> None:
    """Give a model on the meta device its weights, as copies in float32 that can be trained.

    Args:
        model: without buffers that no checkpoint holds.
        state: the checkpoint's tensors.
        checkpoint: for messages.

    Raises:
        RequestError: see `check_state`.
    """
    check_state(model.state_dict(), state, checkpoint)
    model.load_state_dict({key: tensor.float().clone() for key, tensor in state.items()}, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def resize_positions(
    state: dict[str, Tensor], key: str, vision: Any, image_size: int, extra: int, checkpoint: str
) -> None:
    """Interpolate position embeddings to another image size (bicubic over the patch grid), in place.

    The config's image size becomes the new one.

    Args:
        state: the checkpoint's tensors; `key` is [extra + patches, D].
        key: name of the position embeddings.
        vision: config of the vision tower.
        image_size: pixels.
        extra: positions before the patches': 1 where there is a [CLS] token.
        checkpoint: for messages.

    Raises:
        RequestError: the image size does not fit the patches, or the table not its config.
    """
    if image_size % vision.patch_size:
        raise RequestError(f"--image-size {image_size} is not a multiple of the patch size {vision.patch_size}")
    grid, side = image_size // vision.patch_size, vision.image_size // vision.patch_size
    if key in state and state[key].ndim == 2 and grid != side:
        table = state[key].float()
        if side * side + extra != len(table):
            raise RequestError(
                f"{checkpoint}: {key} has {len(table)} positions; its config says {side * side + extra}, "
                f"for {vision.image_size} pixels in patches of {vision.patch_size}"
            )
        patches = table[extra:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
        state[key] = torch.cat([table[:extra], patches.permute(0, 2, 3, 1).flatten(0, 2)])
    vision.image_size = image_size
