"""`vlprune models`: what MODEL may be."""

from vlprune.cli import options as o
from vlprune.cli.show import show


def models(json: o.Json = False) -> None:
    """List the families of models, what prunes them, and the models known by name, with their tasks.

    \b
    Example:
      vlprune models --json
    """
    from vlprune.models import describe, families

    show({"families": families(), "models": describe()}, json)
