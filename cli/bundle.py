"""`vlprune bundle`: one file for a machine without PyTorch, and its check."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from vlprune import names
from vlprune.cli import options as o
from vlprune.cli.show import show


class _Group(TyperGroup):
    """`vlprune bundle RUN` makes a bundle; only the word "verify" is a verb of its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = ["make", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    rich_markup_mode=None,
    help="Write one file with all that runs a task, or check one.\n\n"
    "\b\nExample:\n  vlprune bundle run --task vqa --output vqa.vlp.tar.zst",
)


def _parse_task(text: str) -> str:
    return names.check("task", text, names.TASKS)


def _parse_precision(text: str) -> str:
    return names.check("precision", text, names.PRECISIONS)


def _check_file(path: Path | None) -> Path | None:
    return path if path is None else o.check_path(path)


def _parse_embeddings(text: str) -> str:
    return names.check("embeddings", text, ("fp32", "fp16"))


BundleFile = Annotated[
    Path, typer.Argument(callback=o.check_path, metavar="FILE", help="A bundle.", show_default=False)
]
Example = Annotated[
    Path | None,
    typer.Option(
        "--example",
        callback=_check_file,
        metavar="IMAGE",
        help="Image to store as the input that verify runs, for all to see; a drawn scene if left out.",
        show_default=False,
    ),
]


@app.command(epilog="vlprune bundle verify FILE checks one: every hash, every graph, and what it computes here.")
def make(
    run: o.Run,
    task: Annotated[str, typer.Option("--task", parser=_parse_task, metavar="TASK", help="One task of the run.")],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="Bundle to write, NAME.vlp.tar.zst.", show_default=False),
    ],
    variant: Annotated[
        str | None, typer.Option("--variant", metavar="ID", help="Which model; the only pruned one if left out.")
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            "--precision", parser=_parse_precision, metavar="P", help="Of the graphs, as the run exported them."
        ),
    ] = "fp32",
    packed: Annotated[
        bool, typer.Option("--packed/--no-packed", help="Take packed graphs where the run has them.")
    ] = True,
    embeddings: Annotated[
        str,
        typer.Option(
            "--embeddings",
            parser=_parse_embeddings,
            metavar="P",
            help="How tables of embeddings are stored: fp32, fp16 (as graphs packed with fp16 values have them).",
        ),
    ] = "fp32",
    sign: Annotated[
        Path | None,
        typer.Option(
            "--sign",
            callback=_check_file,
            metavar="KEY",
            help="Ed25519 private key (PEM) to sign with.",
            show_default=False,
        ),
    ] = None,
    example: Example = None,
    example_text: Annotated[
        str | None, typer.Option("--example-text", metavar="TEXT", help="Text to store beside it.", show_default=False)
    ] = None,
    json: o.Json = False,
) -> None:
    """Write the graphs of one task of RUN, and all that a machine without PyTorch needs, to one file.

    Every tensor is stored in its smallest exact form, those that graphs share once. The file is verified before it
    appears. The same run and options give the same bytes. vlprune-edge runs it.

    \b
    Example, "make" may be left out:
      vlprune bundle make run --task retrieval --embeddings fp16 --output blip.vlp.tar.zst
    """
    from vlprune.bundle.make import make_bundle

    found = make_bundle(
        run,
        task,
        output,
        variant=variant,
        precision=precision,
        packed=packed,
        embeddings=embeddings,
        sign=sign,
        example=example,
        text=example_text,
    )
    show(found, json)


@app.command()
def verify(
    file: BundleFile,
    public_key: Annotated[
        Path | None,
        typer.Option(
            "--public-key",
            callback=_check_file,
            metavar="KEY",
            help="Ed25519 public key (PEM) that must have signed the bundle.",
            show_default=False,
        ),
    ] = None,
    threads: o.Threads = None,
    json: o.Json = False,
) -> None:
    """Check every hash of the bundle FILE, open its graphs, run the stored input, compare with the stored output.

    \b
    Example:
      vlprune bundle verify blip.vlp.tar.zst --public-key public.pem
    """
    from vlprune.bundle.verify import verify as check

    show(check(file, public_key, threads), json)
