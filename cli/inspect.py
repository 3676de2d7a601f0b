"""`vlprune inspect`: what is in a file."""

from vlprune.cli import options as o
from vlprune.cli.show import show


def inspect(path: o.AnyPath, json: o.Json = False) -> None:
    """Tell what is in a checkpoint, mask, ONNX file, bundle, or run.

    Shows sparsity per modality and layer, sizes, and operators.

    \b
    Example:
      vlprune inspect run/masks/multiflow-0.9.safetensors
    """
    from vlprune.inspect import inspect as look

    show(look(path), json)
