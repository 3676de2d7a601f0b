"""Prints what a verb returns: JSON for machines, a table for people."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def show(value: Any, as_json: bool, render: Callable[[Any], None] | None = None) -> None:
    """Print a result on stdout.

    Args:
        value: what the library returned; anything JSON can hold.
        as_json: print JSON instead of text.
        render: prints `value` for people; the plain listing of `show_fields` when left out.

    Raises:
        SystemExit: 141, silently, when the reader of stdout has gone (as `head` does).
    """
    try:
        if as_json:
            print(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False))
        else:
            (render or show_fields)(value)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes stdout once more on exit; give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


def show_fields(value: Any) -> None:
    """Print nested dictionaries as `key: value` lines and lists of rows as tables.

    Args:
        value: a dictionary, or a list of dictionaries with the same keys.
    """
    from vlprune.report.terminal import console, table, written

    screen = console()
    if isinstance(value, list):
        screen.print(table("", value))
        return
    for key, item in value.items():
        if isinstance(item, list) and item and isinstance(item[0], dict):
            screen.print(table(key, item))
        elif isinstance(item, dict) and item:
            screen.print(table(key, [{"name": name, "value": entry} for name, entry in item.items()]))
        else:
            screen.print(f"{key}: {written(item)}", markup=False, highlight=False)
