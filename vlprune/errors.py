"""The errors vlprune raises on purpose: one line that says what, where, and the way out.

The command line prints the message and exits with `exit_code`; anything else that escapes is a bug.
"""


class VlpruneError(Exception):
    """Base of all errors meant for the user."""

    exit_code = 2


class GateError(VlpruneError):
    """A limit of the gate is broken."""

    exit_code = 1


class RequestError(VlpruneError):
    """The request is wrong: a bad option, a bad file."""

    exit_code = 2


class MachineError(VlpruneError):
    """The machine cannot do it: a provider is missing, no CUDA, no space, no network."""

    exit_code = 3
