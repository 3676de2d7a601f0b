"""Every option of every verb, written down: an option that appears, vanishes or is renamed must be changed here too."""

import typer

from vlprune.cli.main import app


FROZEN = {
    "compress": {
        "model",
        "--output/-o",
        "--ratio",
        "--method",
        "--pattern",
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
        "--image-size",
        "--export",
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
        "--bench-batch",
        "--seconds",
        "--threads",
        "--resume",
        "--json",
    },
    "inspect": {"path", "--json"},
    "models": {"--json"},
    "methods": {"--json"},
}


def _options(command: object) -> set[str]:
    names = {"/".join(sorted(parameter.opts, key=len, reverse=True)) for parameter in command.params}
    return names - {"--help/-h"}


def test_verbs_and_their_options_are_the_written_ones() -> None:
    group = typer.main.get_command(app)
    assert {name: _options(command) for name, command in group.commands.items()} == FROZEN
    assert _options(group) == {"--version", "--debug", "--install-completion", "--show-completion"}


def test_every_option_is_explained_and_every_verb_has_an_example() -> None:
    for name, command in typer.main.get_command(app).commands.items():
        assert f"vlprune {name} " in command.help or f"vlprune {name}\n" in command.help + "\n"
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.opts}"
