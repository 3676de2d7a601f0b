"""The errors vlprune raises on purpose: one line that says what, where, and the way out.

The command line prints the message and exits with `exit_code`; anything else that escapes is a bug.
"""

from collections.abc import Sequence


class VlpruneError(Exception):
    """Base of all errors meant for the user."""

    exit_code = 2


class GateError(VlpruneError):
    """A limit of the gate is broken."""

    exit_code = 1


class RequestError(VlpruneError):
    """The request is wrong: a bad option, a bad file."""

    exit_code = 2


class ProblemsError(RequestError):
    """Several things are wrong with one request; the command line prints a summary, and then a line for each.

    Args:
        where: what is wrong, as in "recipe.yaml".
        problems: what is wrong with it.

    Attributes:
        summary: one line.
        problems: what is wrong, in lines of their own; the first hundred.
    """

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.summary = f"{where} has {len(problems)} problems"
        self.problems = list(problems[:100])
        if len(problems) > 100:
            self.problems.append(f"and {len(problems) - 100} more")
        super().__init__(f"{where}: {'; '.join(self.problems)}")


class Problems:
    """Lets checks go on after one that fails, so that all that is wrong is told at once.

    Each check runs in a `with` block of its own; `settle` ends them.

    Args:
        where: what is checked, for the summary.
    """

    def __init__(self, where: str = "the request") -> None:
        self.where = where
        self.found: list[RequestError] = []

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, RequestError):
            return False
        self.found.append(error)
        return True

    def settle(self) -> None:
        """Raise what was found.

        Raises:
            RequestError: the one problem there is.
            ProblemsError: all of them.
        """
        lines = [line for error in self.found for line in getattr(error, "problems", [str(error)])]
        if len(lines) > 1:
            raise ProblemsError(self.where, lines)
        if self.found:
            raise self.found[0]


class MachineError(VlpruneError):
    """The machine cannot do it: a provider is missing, no CUDA, no space, no network."""

    exit_code = 3
