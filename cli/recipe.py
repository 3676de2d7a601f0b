"""`vlprune recipe validate`: check a recipe without running it."""

import typer

from vlprune.cli import options as o
from vlprune.cli.show import show
from vlprune.errors import MachineError, ProblemsError, RequestError


app = typer.Typer(
    help="Check recipes.\n\n\b\nExample:\n  vlprune recipe validate recipe.yaml",
    rich_markup_mode=None,
    no_args_is_help=True,
)


@app.command()
def validate(file: o.RecipeFile, json: o.Json = False) -> None:
    """Check the recipe FILE, and print it with all its defaults.

    Nothing of this machine is looked at: no data, no provider, no device. What is wrong is told at once (exit code 2).
    With --json the problems stand in a list on stdout, too.

    \b
    Example:
      vlprune recipe validate recipe.yaml --json
    """
    from vlprune import recipe as recipes

    try:
        chosen = recipes.read(file)
        if "model" not in chosen:
            raise RequestError(f"{file} does not tell the model: add a line as in model: blip-tiny")
        try:
            from vlprune import pipeline
            from vlprune.yamlfile import dump_yaml
        except ModuleNotFoundError as error:
            raise MachineError(
                f"{file}: keys and values are right, but whether they fit together needs {error.name}, which is not "
                "installed: pip install 'vlprune[cpu]' adds what is missing"
            ) from error
        found = {"ratios": list(o.RATIOS)} | recipes.arguments(chosen)
        try:
            resolved = pipeline.compress(output=".", dry_run=True, **found)
        except RequestError as error:
            raise ProblemsError(str(file), getattr(error, "problems", [str(error)])) from error
    except RequestError as error:
        if json:
            show({"recipe": str(file), "valid": False, "problems": getattr(error, "problems", [str(error)])}, True)
        raise
    show(
        {"recipe": str(file), "valid": True, "problems": [], "resolved": resolved},
        json,
        lambda found: print(f"# {file} is a valid recipe; with its defaults:\n{dump_yaml(found['resolved'])}", end=""),
    )
