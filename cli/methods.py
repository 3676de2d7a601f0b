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

    rows = [
        {"name": name, "needs": ", ".join(sorted(method.needs)), "summary": method.summary, "paper": method.paper}
        for name, method in METHODS.items()
    ]
    show(rows, json)
