"""vlprune-edge: runs a bundle of vlprune on ONNX Runtime, without PyTorch.

    import vlprune_edge

    bundle = vlprune_edge.open("captioning.vlp.tar.zst")
    print(bundle.caption("photo.jpg"))

`vlprune_edge.core` holds the files that vlprune itself computes with; the build puts them there.
"""

from importlib.metadata import version

from vlprune_edge.core.bundle.runner import Bundle, Label, Match
from vlprune_edge.core.bundle.runner import open_bundle as open
from vlprune_edge.core.bundle.verify import verify
from vlprune_edge.core.errors import MachineError, RequestError


__version__ = version("vlprune-edge")
__all__ = ["Bundle", "Label", "MachineError", "Match", "RequestError", "__version__", "open", "verify"]
