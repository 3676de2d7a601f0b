"""One container for what this room keeps on disk: a safetensors file that says what it is, read without trust."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlprune.errors import RequestError
from vlprune.files import atomic_path


@dataclass(frozen=True)
class TensorFile:
    """An open file whose tensors are described before they are read.

    Attributes:
        path: the file, for messages.
        header: its JSON header.
        names: the names of its tensors.
        handle: what safetensors opened.
    """

    path: Path
    header: dict[str, Any]
    names: frozenset[str]
    handle: Any

    def read(self, name: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> Tensor:
        """Read a tensor after its description was compared with what is expected; nothing is allocated before.

        Args:
            name: name of the tensor.
            dtypes: accepted types in safetensors' spelling, such as "F32".
            shape: the only accepted shape.

        Returns:
            Tensor: on the CPU.

        Raises:
            RequestError: it is missing or described differently.
        """
        if name not in self.names:
            raise RequestError(f"{self.path} has no tensor {name!r:.120}: it is not complete, make it again")
        description = self.handle.get_slice(name)
        found = description.get_dtype(), tuple(description.get_shape())
        if found[0] not in dtypes or found[1] != shape:
            raise RequestError(
                f"{self.path}: tensor {name!r:.120} is {found[0]} {list(found[1])}, "
                f"expected {' or '.join(dtypes)} {list(shape)}: the file is damaged or belongs to another model"
            )
        return self.handle.get_tensor(name)


def write(path: Path | str, kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header, atomically.

    Args:
        path: the file.
        kind: what it is, checked on reading.
        tensors: by name.
        header: anything JSON can hold, NaN and infinity excepted.
    """
    text = json.dumps(dict(header), allow_nan=False, ensure_ascii=False)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(contiguous, temporary, {"kind": kind, "header": text})
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Give the same content the same bytes: safetensors writes metadata in the order of a hash map, anew each time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        assert len(text) == length  # both write JSON as short as it can be
        file.seek(8)
        file.write(text)


@contextmanager
def opened(path: Path | str, kind: str) -> Iterator[TensorFile]:
    """Open a file written by `write`.

    Args:
        path: the file.
        kind: what it must be.

    Yields:
        TensorFile: valid inside the block.

    Raises:
        RequestError: missing, unreadable, truncated, of another kind, or its header is no JSON object.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as handle:
            about = handle.metadata() or {}
            if about.get("kind") != kind:
                raise RequestError(f"{path} is no {kind} file (it says {about.get('kind')!r:.60}): give the right file")
            yield TensorFile(path, _header(path, about.get("header", "")), frozenset(handle.keys()), handle)
    except SafetensorError as error:
        raise RequestError(f"{path} is damaged or no safetensors file ({_line(error)}): make it again") from error
    except OSError as error:
        raise RequestError(f"cannot read {path} ({error.strerror or _line(error)})") from error


def _header(path: Path, text: str) -> dict[str, Any]:
    try:
        header = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{path}: its header is not valid JSON ({_line(error)}): make it again") from error
    if not isinstance(header, dict):
        raise RequestError(f"{path}: its header is no JSON object: make it again")
    return header


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
