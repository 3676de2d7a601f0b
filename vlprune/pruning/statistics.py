"""The norms of a layer's inputs over a calibration set, collected while the model runs.

    a_j = sqrt( sum over valid token rows t, over all uses of the layer, of x_tj^2 )

One float64 vector per layer is all that is kept: no activation outlives the call that made it, and one pass serves
every ratio and every method that needs the norms.
"""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlprune.errors import RequestError
from vlprune.pruning import tensorfile
from vlprune.pruning.exact import pieces


KIND = "vlprune-statistics-1"
Tokens = Literal["vision", "text"]


class InputNorms:
    """Collects input norms by hooks on linear modules.

        norms = InputNorms({"fc1": ([model.fc1], "text")})
        with norms.collect():
            for ids, mask in batches:
                with norms.valid(text=mask):
                    model(ids, mask)
        norms.result()["fc1"]

    Args:
        layers: per layer name its modules (several when a weight is shared; their uses add up) and whose tokens the
            rows of their inputs are: those of the image or those of the text.

    Raises:
        RequestError: a layer has no module, one of unequal width, or unknown tokens.
    """

    def __init__(self, layers: Mapping[str, tuple[Sequence[nn.Linear], Tokens]]) -> None:
        for name, (modules, tokens) in layers.items():
            if not modules or len({module.in_features for module in modules}) != 1:
                raise RequestError(f"layer {name!r} needs one or more linear modules of one input width")
            if tokens not in ("vision", "text"):
                raise RequestError(f"layer {name!r}: tokens must be vision or text, not {tokens!r}")
        self._layers = {name: (list(dict.fromkeys(modules)), tokens) for name, (modules, tokens) in layers.items()}
        self._sums: dict[str, Tensor] = {}  # [in] float64, on the device of the layer
        self._valid: dict[str, Tensor | None] = {}
        self._last: tuple[Any, ...] | None = None  # the input looked at last, its version, its mask, and its sums

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Collect from every forward inside the block, without gradients, in full float32 (no TF32, no autocast).

        The norms of several blocks add up.

        Yields:
            None: nothing.
        """
        with ExitStack() as stack:
            stack.enter_context(_full_precision())
            stack.enter_context(torch.no_grad())
            for name, (modules, tokens) in self._layers.items():
                hook = self._hook(name, tokens)
                for module in modules:
                    stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    @contextmanager
    def valid(self, text: Tensor | None = None, vision: Tensor | None = None) -> Iterator[None]:
        """Say which rows count in the forwards inside the block; outside of any block all do.

        Args:
            text: [B, T] bool or int, non-zero = a token, zero = padding; None = all rows count.
            vision: [B, P] likewise.

        Yields:
            None: nothing.
        """
        before = self._valid
        self._valid = {"text": text, "vision": vision}
        try:
            yield
        finally:
            self._valid = before

    def result(self) -> dict[str, Tensor]:
        """Return the norms collected so far.

        Returns:
            dict[str, Tensor]: per layer [in] float32 on the CPU.

        Raises:
            RequestError: a layer never ran, or its inputs held NaN or infinity.
        """
        norms = {}
        for name in self._layers:
            if name not in self._sums:
                raise RequestError(f"layer {name!r} never ran in the calibration pass: a batch must reach every layer")
            norms[name] = self._sums[name].sqrt().float().cpu()
            if not torch.isfinite(norms[name]).all():
                raise RequestError(f"layer {name!r}: its inputs held NaN or infinity: check the weights and the images")
        return norms

    def _hook(self, name: str, tokens: str):  # type: ignore[no-untyped-def]
        def add(module: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["input"]
            squares = self._squares(x, name, tokens)
            if name in self._sums:  # never in place: layers that read one input share its sums
                squares = self._sums[name] + squares.to(self._sums[name].device)
            self._sums[name] = squares

        return add

    def _squares(self, x: Tensor, name: str, tokens: str) -> Tensor:
        """Sum the squares of an input's columns; once where query, key and value read the same."""
        mask = self._valid.get(tokens)
        if x.is_inference():  # which has no version
            return _column_squares(self._rows(x, name, tokens))
        if self._last is not None:
            last, version, valid, squares = self._last
            if last() is x and version == x._version and valid is mask:
                return squares
        squares = _column_squares(self._rows(x.detach(), name, tokens))
        self._last = weakref.ref(x), x._version, mask, squares
        return squares

    def _rows(self, x: Tensor, name: str, tokens: str) -> Tensor:
        """Flatten to [rows, in] with zeros in the rows that do not count; zeros add nothing, and need no sync."""
        if x.dtype not in (torch.float32, torch.float64):
            raise RequestError(f"layer {name!r} got {x.dtype} inputs: load the model in float32, without autocast")
        valid = self._valid.get(tokens)
        rows = x.flatten(0, -2) if x.dim() > 2 else x.view(-1, x.shape[-1])
        if valid is None:
            return rows
        if x.shape[:-1] != valid.shape and (x.dim() > 2 or len(rows) != valid.numel()):
            raise RequestError(
                f"layer {name!r} got inputs {list(x.shape)}, but the {tokens} mask is {list(valid.shape)}: "
                "the mask must name every row"
            )
        return rows.masked_fill((valid == 0).to(x.device).reshape(-1, 1), 0)


def save_statistics(path: Path | str, norms: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write norms to a safetensors file, atomically.

    Args:
        path: the file.
        norms: per layer [in].
        metadata: what made them; anything JSON can hold.
    """
    tensors = {f"input_norm/{name}": norm.detach().cpu().float() for name, norm in norms.items()}
    widths = {name: norm.numel() for name, norm in norms.items()}
    tensorfile.write(path, KIND, tensors, {"widths": widths, "metadata": dict(metadata)})


def load_statistics(
    path: Path | str, expected: Mapping[str, int] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read norms; nothing in the file is believed before it is checked.

    Args:
        path: the file.
        expected: the layers of the model at hand and their input widths; None accepts any.

    Returns:
        tuple[dict[str, Tensor], dict[str, Any]]: per layer [in] float32 on the CPU, and the metadata.

    Raises:
        RequestError: the file is missing, damaged, contradicts itself, or belongs to another model.
    """
    with tensorfile.opened(path, KIND) as file:
        widths, metadata = file.header.get("widths"), file.header.get("metadata")
        if not isinstance(metadata, dict) or not isinstance(widths, dict):
            raise RequestError(f"{path}: its header lacks widths or metadata: make it again")
        for name in [*(expected or widths), *widths]:
            if expected is not None and (name not in widths or widths[name] != expected.get(name)):
                raise RequestError(
                    f"{path} belongs to another model: layer {name!r:.120} has {widths.get(name, 'no')!s:.60} inputs "
                    f"there, {expected.get(name, 'no')} in the model: collect the statistics again"
                )
            if type(widths[name]) is not int or widths[name] <= 0:
                raise RequestError(f"{path}: layer {name!r:.120} claims the width {widths[name]!r:.60}: make it again")
        norms = {}
        for name, width in widths.items():
            norms[name] = file.read(f"input_norm/{name}", ("F32",), (width,))
            if not (torch.isfinite(norms[name]) & (norms[name] >= 0)).all():
                raise RequestError(f"{path}: the norm of {name!r:.120} is negative, NaN or infinite: make it again")
    return norms, metadata


def _column_squares(rows: Tensor) -> Tensor:
    """Sum x^2 over the rows in float64: [rows, in] -> [in]."""
    sums = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for part in pieces(rows):
        if rows.device.type == "cpu":
            sums += part.double().square_().sum(0)
        else:  # half the memory traffic, which is what a GPU waits for; sqrt and square cost 1e-16
            sums += torch.linalg.vector_norm(part, dim=0, dtype=torch.float64).square_()
    return sums


@contextmanager
def _full_precision() -> Iterator[None]:
    """Switch off TF32, reduced-precision float32 on CPUs, and autocast; restore what was there."""
    full: str | bool
    to: Any = torch.backends
    if hasattr(to.cuda.matmul, "fp32_precision"):  # torch 2.9; it refuses a mix with the older switches
        name, full = "fp32_precision", "ieee"
        switches = [to.cuda.matmul, to.cudnn.conv, to.mkldnn.matmul, to.mkldnn.conv]
    else:
        name, full = "allow_tf32", False
        switches = [to.cuda.matmul, to.cudnn]
    before = [getattr(switch, name) for switch in switches]
    try:
        for switch in switches:
            setattr(switch, name, full)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            setattr(switch, name, value)
