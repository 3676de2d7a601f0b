"""A CUDA device that is only pretended, for machines without one: tensors that say "cuda:0" and live on the CPU.

PyTorch's errors about devices are raised again: where tensors of both devices meet, where a tensor "on the GPU" is read
by numpy. Values are real, so that code which depends on them runs as it is. What it does not show: kernels that CUDA
lacks, other rounding, memory.

    with pretended_cuda():
        model.to("cuda")
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
aten: Any = torch.ops.aten
# Operators that PyTorch gives tensors of several devices.
COPIES = {aten.copy_.default, aten._to_copy.default, aten.copy.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._unsafe_index.Tensor}
# Operators beside the pointwise ones that take a number as a tensor on the CPU.
NUMBERS = {"masked_fill", "masked_fill_", "fill_", "where", "_fused_adamw_"}
# Functions by what autocast does to their arguments.
LOWER = {"linear", "matmul", "__matmul__", "__rmatmul__", "mm", "bmm", "addmm", "baddbmm", "conv2d", "einsum",
         "scaled_dot_product_attention"}  # fmt: skip
FULL = {"softmax", "log_softmax", "layer_norm", "cross_entropy", "nll_loss", "mse_loss", "logsumexp", "kl_div",
        "binary_cross_entropy_with_logits", "pow", "__pow__", "exp", "log", "rsqrt", "reciprocal", "sum", "prod",
        "cumsum", "norm", "vector_norm", "normalize", "cosine_similarity", "softplus"}  # fmt: skip

_TO = Tensor.to


def _to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Name the device as C++ wants it that has no driver to ask for the current one."""
    if isinstance(kwargs.get("device"), str | torch.device):
        args, kwargs = (kwargs["device"], *args), {k: v for k, v in kwargs.items() if k != "device"}
    if args and isinstance(args[0], str | torch.device) and torch.device(args[0]).type == "cuda":
        args = (CUDA, *args[1:])
    return _TO(self, *args, **kwargs)


class OnDevice(Tensor):
    """A tensor on the pretended device."""

    value: Tensor  # on the CPU
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, value: Tensor) -> OnDevice:
        with torch._C._DisableTorchDispatch(), torch.inference_mode(False):
            empty = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
            # The keys make kernels' choices those of CUDA. To C++ it is on "meta", which needs no driver.
            made: Any = Tensor._make_subclass(cls, empty, False, device_for_backend_keys=CUDA)
        made.value = value
        return made

    @property
    def device(self) -> torch.device:
        return CUDA

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_meta(self) -> bool:
        return False

    @property
    def is_cpu(self) -> bool:
        return False

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """Give the tensor itself where nothing is to be done, as PyTorch does."""
        given = [*args, *kwargs.values()]
        place = next((x for x in given if isinstance(x, str | torch.device)), CUDA)
        dtype = next((x for x in given if isinstance(x, torch.dtype)), self.dtype)
        for other in (x for x in given if isinstance(x, Tensor)):
            place, dtype = other.device, other.dtype
        there = torch.device(place).type != "cpu"
        if there and dtype == self.dtype and not kwargs.get("copy"):
            return self
        return _TO(self, CUDA if there else CPU, dtype, copy=kwargs.get("copy", False))

    def __getitem__(self, index: Any) -> Any:
        # C++ would make lists and numbers tensors on the device that it takes this one to be on.
        parts = index if isinstance(index, tuple) else (index,)
        return Tensor.__getitem__(self, tuple(torch.tensor(x) if isinstance(x, list) else x for x in parts))

    def __setitem__(self, index: Any, value: Any) -> None:
        Tensor.__setitem__(self, index, value if isinstance(value, Tensor) else torch.tensor(value, dtype=self.dtype))

    def cuda(self, *args: Any, **kwargs: Any) -> Tensor:
        return self

    def numpy(self, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *args: Any) -> Any:
        return self.numpy()

    def tolist(self) -> Any:
        return self.detach().to("cpu").tolist()

    def __repr__(self, **kwargs: Any) -> str:
        return f"OnDevice({self.value!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copy: Any = OnDevice(self.value.clone())
            if isinstance(self, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, self.requires_grad)
            memo[id(self)] = copy.requires_grad_(self.requires_grad)
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Factories(TorchDispatchMode):
    """Makes what is asked for on "cuda" there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Autocast(TorchFunctionMode):
    """What torch.autocast("cuda") does, which asks C++ for the device: casts before functions it knows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if (name in LOWER or name in FULL) and torch.is_autocast_enabled("cuda"):
            lower = torch.get_autocast_dtype("cuda")
            old, new = (torch.float32, lower) if name in LOWER else (lower, torch.float32)
            args, kwargs = mapped(
                lambda x: x.to(new) if isinstance(x, OnDevice) and x.dtype == old else x, (args, kwargs)
            )
        if func is Tensor.backward:  # runs checkpointed layers again, with the casts
            with self:
                _engine_run_backward((args[0],), (torch.ones_like(args[0]),), False, False, (), True, True)
            return None
        return func(*args, **kwargs)


def mapped(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply a function to the tensors in lists, tuples and dicts; PyTorch's own way takes a third of all the time."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, list | tuple):
        return type(tree)([mapped(function, x) for x in tree])
    return {key: mapped(function, x) for key, x in tree.items()} if type(tree) is dict else tree


def value_of(tensor: Tensor) -> Tensor:
    """The tensor behind one of the device."""
    return tensor.value if isinstance(tensor, OnDevice) else tensor


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the values, after a look at the devices."""
    tensors: list[Tensor] = []
    mapped(tensors.append, (args, kwargs))
    wanted = kwargs.get("device")
    asked = wanted is not None and torch.device(wanted).type == "cuda"
    if func is aten.scalar_tensor.default and torch.device(wanted or "cpu").type == "meta":
        asked = True  # C++ made a number a tensor, on the device of another tensor
    ours = [x for x in tensors if isinstance(x, OnDevice)]
    asked |= any(isinstance(x, torch.device) and x.type == "cuda" for x in args)
    if not ours and not asked:
        return func(*args, **kwargs)
    kept_there = wanted is not None and torch.device(wanted).type == "meta" and ours  # what C++ takes "cuda" for
    assert not any(x.is_meta for x in tensors), f"{func}: the pretended device lost a tensor"
    leaves = wanted is not None and torch.device(wanted).type == "cpu"
    if torch.is_inference_mode_enabled() and func._can_decompose():  # else C++ has done so
        with Factories():
            return func.decompose(*args, **kwargs)
    _check(func, args, tensors, ours)
    if asked or kept_there:
        kwargs = {**kwargs, "device": CPU}
    kwargs.pop("pin_memory", None)
    wrappers = {id(x.value): x for x in ours}
    values = mapped(value_of, (args, kwargs))
    with torch.inference_mode(False):  # there, views of parameters could not be wrapped
        found = func(*values[0], **values[1])
    if leaves or func is aten._local_scalar_dense.default:
        return found
    here = {id(x): x for x in tensors}

    def wrapped(tensor: Tensor) -> Tensor:
        if id(tensor) in wrappers:
            return wrappers[id(tensor)]
        return tensor if id(tensor) in here else OnDevice(tensor)

    return mapped(wrapped, found)


def _check(func: Any, args: Any, tensors: list[Tensor], ours: list[OnDevice]) -> None:
    """Refuse what CUDA refuses."""
    name = func.overloadpacket.__name__
    others = [x for x in tensors if not isinstance(x, OnDevice) and x.device.type == "cpu"]
    if not ours or not others or func in COPIES:
        return
    if func in INDEXED:
        if isinstance(args[0], OnDevice):  # indices may be on the CPU; of values only a number
            if len(args) < 3 or isinstance(args[2], OnDevice) or not args[2].ndim:
                return
        elif not any(isinstance(x, OnDevice) for x in args[1]):
            return
    elif torch.Tag.pointwise in func.tags or name in NUMBERS or name.startswith("_foreach"):
        written = args[0] if name.endswith("_") and not name.startswith("_") else ours[0]
        if all(not x.ndim for x in others) and isinstance(written, OnDevice):
            return
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but {func} got "
        + ", ".join(f"{'cuda' if isinstance(x, OnDevice) else 'cpu'} {list(x.shape)}" for x in tensors)
    )


def _on_device(state: Any) -> Any:
    return mapped(OnDevice, state)


def _everywhere(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with Factories(), Autocast():
            return function(*args, **kwargs)

    return call


class _Saved:
    """torch.save and torch.load for tensors of the device."""

    def __init__(self) -> None:
        self._save, self._load = torch.save, torch.load

    def save(self, state: Any, *args: Any, **kwargs: Any) -> None:
        self._save(mapped(lambda x: value_of(x.detach()), state), *args, **kwargs)

    def load(self, file: Any, map_location: Any = None, **kwargs: Any) -> Any:
        state = self._load(file, map_location="cpu", **kwargs)
        return _on_device(state) if torch.device(map_location or "cpu").type == "cuda" else state


@contextmanager
def pretended_cuda() -> Iterator[None]:
    """Let PyTorch have a CUDA device as long as the context lasts."""
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    saved, start = _Saved(), threading.Thread.run
    patches: dict[str, Any] = {
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.set_device": lambda device: None,
        "torch.cuda.device": lambda device: nullcontext(),
        "torch.cuda.synchronize": lambda *device: None,
        "torch.cuda.empty_cache": lambda: None,
        "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
        "torch.cuda.get_rng_state": lambda device=0: torch.zeros(16, dtype=torch.uint8),
        "torch.cuda.set_rng_state": lambda state, device=0: None,
        "torch.cuda.manual_seed_all": lambda seed: None,
        "torch.cuda.reset_peak_memory_stats": lambda *device: None,
        "torch.cuda.max_memory_allocated": lambda *device: 0,
        "torch.cuda.memory_allocated": lambda *device: 0,
        "torch.amp.autocast_mode.torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.Tensor.to": _to,
        "torch.Tensor.cuda": lambda tensor, *place, **options: _to(tensor, CUDA),
        "torch.save": saved.save,
        "torch.load": saved.load,
        "threading.Thread.run": lambda thread: _everywhere(start)(thread),
    }
    with ExitStack() as stack:
        for name, replacement in patches.items():
            stack.enter_context(mock.patch(name, replacement))
        torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay the objects they are
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, swaps)
        stack.enter_context(Factories())
        stack.enter_context(Autocast())
        yield
