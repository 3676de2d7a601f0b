"""One file that carries a task to a machine without PyTorch, read without trust.

The modules that read (`archive`, `limits`, `manifest`, `protobuf`, `runner`, `signing`, `tensors`, `text`, `unpack`,
`verify`) are shared with the edge runner: they import numpy, Pillow, tokenizers, zstandard, onnxruntime and each other,
relatively, nothing else. `make` and `card` write.
"""
