"""`vlprune methods`: the pruning methods."""

from vlprune.cli import options as o
from vlprune.cli.show import show


def methods(json: o.Json = False) -> None:
    """List the pruning methods, their needs, and their papers.

    \b
    Example:
      vlprune methods
    """
    from vlprune.pruning import METHODS
    from vlprune.structured import STRUCTURED

    rows = [
        {"name": name, "removes": removes, "needs": needs, "summary": method.summary, "paper": method.paper}
        for removes, methods in (("weights", METHODS), ("units", STRUCTURED))
        for name, method in methods.items()
        for needs in (", ".join(sorted(method.needs)),)
    ]
    show(rows, json)
