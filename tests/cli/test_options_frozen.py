"""Every option of every verb, written down: an option that appears, vanishes or is renamed must be changed here too."""

import ast
import re
from pathlib import Path
from typing import Any

import typer

from vlprune.cli.main import app


ROOT = Path(__file__).parents[2]
OF_OTHERS = {  # of pip, nvidia-smi and docker
    "--force-reinstall", "--format", "--gpus", "--id", "--no-cache-dir", "--no-deps", "--query-gpu",
}  # fmt: skip


FROZEN = {
    "compress": {
        "model",
        "--recipe",
        "--output/-o",
        "--ratio",
        "--method",
        "--pattern",
        "--permute",
        "--no-round-widths/--round-widths",
        "--mope-stage",
        "--mope-pairs",
        "--family",
        "--calibration",
        "--calibration-samples",
        "--data",
        "--tasks",
        "--finetune",
        "--max-steps",
        "--epochs",
        "--lr",
        "--batch-size",
        "--gradient-checkpointing",
        "--compile",
        "--distill",
        "--image-size",
        "--export",
        "--precision",
        "--no-fuse/--fuse",
        "--pack",
        "--values",
        "--target",
        "--pack-threshold",
        "--provider",
        "--bench-batch",
        "--samples",
        "--device",
        "--threads",
        "--seed",
        "--skip-broken",
        "--resume",
        "--json",
    },
    "prune": {
        "model",
        "--output/-o",
        "--ratio",
        "--method",
        "--pattern",
        "--permute",
        "--no-round-widths/--round-widths",
        "--mope-pairs",
        "--family",
        "--calibration",
        "--calibration-samples",
        "--batch-size",
        "--image-size",
        "--device",
        "--threads",
        "--seed",
        "--skip-broken",
        "--resume",
        "--json",
    },
    "finetune": {
        "run",
        "--finetune",
        "--data",
        "--tasks",
        "--max-steps",
        "--epochs",
        "--lr",
        "--batch-size",
        "--gradient-checkpointing",
        "--compile",
        "--device",
        "--threads",
        "--seed",
        "--skip-broken",
        "--resume",
        "--json",
    },
    "export": {
        "run",
        "--data",
        "--tasks",
        "--precision",
        "--no-fuse/--fuse",
        "--pack",
        "--values",
        "--target",
        "--pack-threshold",
        "--unpack",
        "--threads",
        "--resume",
        "--json",
    },
    "validate": {
        "run",
        "--data",
        "--tasks",
        "--provider",
        "--bench-batch",
        "--precision",
        "--samples",
        "--batch-size",
        "--threads",
        "--skip-broken",
        "--resume",
        "--json",
    },
    "bench": {
        "run",
        "--tasks",
        "--provider",
        "--bench-batch/--batch",
        "--seconds",
        "--cuda-graph",
        "--threads",
        "--resume",
        "--json",
    },
    "report": {"report", "--output/-o", "--no-samples", "--json"},
    "gate": {
        "report",
        "--limits",
        "--baseline",
        "--variant",
        "--against",
        "--form",
        "--min-sparsity",
        "--max-metric-drop",
        "--max-bytes",
        "--min-throughput-ratio",
        "--max-abs-diff",
        "--required-providers",
        "--junit",
        "--json",
    },
    "compare": {"a", "b", "--markdown", "--json"},
    "recipe": set(),
    "recipe validate": {"file", "--json"},
    "bundle": set(),
    "bundle make": {
        "run",
        "--task",
        "--output/-o",
        "--variant",
        "--precision",
        "--no-packed/--packed",
        "--embeddings",
        "--sign",
        "--example",
        "--example-text",
        "--json",
    },
    "bundle verify": {"file", "--public-key", "--threads", "--json"},
    "inspect": {"path", "--json"},
    "models": {"--json"},
    "methods": {"--json"},
    "doctor": {"--json"},
}


def _options(command: object) -> set[str]:
    names = {
        "/".join(sorted([*parameter.opts, *parameter.secondary_opts], key=len, reverse=True))
        for parameter in command.params
    }
    return names - {"--help/-h"}


def _commands() -> dict[str, Any]:
    """The verbs, and those of groups."""
    verbs = dict(typer.main.get_command(app).commands)
    inner = {f"{name} {verb}": c for name, group in verbs.items() for verb, c in getattr(group, "commands", {}).items()}
    return verbs | inner


def test_verbs_and_their_options_are_the_written_ones() -> None:
    group = typer.main.get_command(app)
    assert {name: _options(command) for name, command in _commands().items()} == FROZEN
    assert _options(group) == {"--version", "--debug", "--install-completion", "--show-completion"}


def test_every_option_is_explained_and_every_verb_has_an_example() -> None:
    for name, command in _commands().items():
        assert f"vlprune {name} " in command.help or f"vlprune {name}\n" in command.help + "\n"
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.opts}"


def test_messages_name_only_options_that_exist() -> None:
    known = {name for options in FROZEN.values() for option in options for name in option.split("/")}
    known |= {"--version", "--debug", "--help"} | OF_OTHERS
    named = {}
    for file in (path for folder in ("vlprune", "cli", "exporters") for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found = re.findall(r"(?<![\w-])--[a-z][a-z-]*", node.value)
                named |= dict.fromkeys(found, f"{file.relative_to(ROOT)}:{node.lineno}")
    assert {"--output", "--pack", "--seconds"} <= named.keys()
    assert {option: place for option, place in named.items() if option not in known} == {}
