"""`vlprune doctor`: what this machine can run, and what to do about the rest."""

from typing import Any

import typer

from vlprune.cli import options as o
from vlprune.cli.show import show
from vlprune.errors import MachineError


def doctor(json: o.Json = False) -> None:
    """Find out what this machine can run, what it cannot, and the remedy.

    Looks at packages, drivers, libraries, ONNX Runtime's providers (by running a small graph on each), the operators of
    packed graphs, disk, memory, and the hub; changes nothing. Exit code 0 when all that is installed works, 3 when
    there is a fault; warnings (no access to the hub, say) do not count.

    \b
    Example:
      vlprune doctor --json
    """
    from vlprune.doctor import examine, report

    found = report(examine())
    show(found, json, _print)
    if not found["works"]:
        raise typer.Exit(MachineError.exit_code)


def _print(found: Any) -> None:
    from vlprune.report.terminal import console, table

    screen = console()
    screen.print(table("", [{key: row[key] for key in ("name", "status", "what")} for row in found["findings"]]))
    for row in found["findings"]:
        if row["remedy"]:
            screen.print(f"{row['name']}: {row['remedy']}", markup=False, soft_wrap=True)
    faults = sum(row["status"] == "fault" for row in found["findings"])
    screen.print("All that is installed works." if not faults else f"{faults} {'fault' if faults == 1 else 'faults'}.")
