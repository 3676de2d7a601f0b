"""The `vlprune` command: registers the verbs, and turns every error into one line and an exit code.

Exit codes: 0 done; 1 the gate failed; 2 the request is wrong; 3 the machine cannot do it; 70 a bug in vlprune;
130 interrupted; 141 the reader of stdout has gone; 143 terminated.
"""

import os
import signal
import sys
import traceback
import warnings
from errno import EACCES, EDQUOT, ENAMETOOLONG, ENOSPC, EPERM
from types import FrameType
from typing import Annotated

import typer

from vlprune import __version__
from vlprune.cli import (
    bench,
    bundle,
    compare,
    compress,
    doctor,
    export,
    finetune,
    gate,
    inspect,
    methods,
    models,
    prune,
    recipe,
    report,
    validate,
)
from vlprune.errors import MachineError, ProblemsError, VlpruneError


INTERRUPTED, BUG = 130, 70

app = typer.Typer(
    name="vlprune",
    help="Prune vision-language models once, fine-tune per task, deploy in ONNX Runtime, with proof.",
    epilog="Example: vlprune compress blip-tiny --ratio 0.9 --export onnx --output run",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # rich help and tracebacks cost start-up time
    pretty_exceptions_enable=False,
)
for _verb in (
    compress.compress,
    prune.prune,
    finetune.finetune,
    export.export,
    validate.validate,
    bench.bench,
    report.report,
    gate.gate,
    compare.compare,
    inspect.inspect,
    models.models,
    methods.methods,
    doctor.doctor,
):
    app.command()(_verb)
app.add_typer(recipe.app, name="recipe")
app.add_typer(bundle.app, name="bundle")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vlprune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and warnings; may stand anywhere.")] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows `vlprune`; taken from the process when left out.

    Returns:
        int: the exit code, see the top of this file.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in options
    if debug:  # `main` deals with it, so that it works before and after the verb
        arguments = [argument for argument in options if argument != "--debug"] + arguments[len(options) :]
    else:
        _silence_libraries()
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(arguments, prog_name="vlprune", standalone_mode=False)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        code, message = explain(error)
        print(f"error: {message}", file=sys.stderr)
    if code == INTERRUPTED:
        print("interrupted: finished stages are kept, --resume goes on from there", file=sys.stderr)
    return code if isinstance(code, int) else 0


def explain(error: Exception) -> tuple[int, str]:
    """Find the exit code and the one line for an error, or a summary and a line for each of several problems.

    Args:
        error: what escaped from a verb.

    Returns:
        tuple[int, str]: exit code and message.
    """
    if isinstance(error, ProblemsError) and len(error.problems) > 1:
        numbered = [f"  {number}. {_short(problem)}" for number, problem in enumerate(error.problems, 1)]
        return error.exit_code, "\n".join([_short(error.summary), *numbered])
    if isinstance(error, VlpruneError):
        return error.exit_code, _one_line(error)
    if isinstance(error, typer.TyperException):
        return 2, _usage(error)
    # safetensors reports a full disk as an error of its own, with the system's words
    full = isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT)
    if full or "No space left on device" in str(error):
        return MachineError.exit_code, "no space left on the disk: free some, or choose another --output"
    if isinstance(error, OSError) and error.errno in (EACCES, EPERM, ENAMETOOLONG) and error.filename is not None:
        return 2, f"cannot use {_short(error.filename)} ({error.strerror}): check the path"
    if isinstance(error, ModuleNotFoundError) and (error.name or "vlprune").partition(".")[0] != "vlprune":
        return MachineError.exit_code, f"{error.name} is not installed: pip install 'vlprune[cpu]' adds what is missing"
    # torch reports a full memory as a RuntimeError, with this phrase on CPU and its own class on CUDA
    if (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    ):
        return (
            MachineError.exit_code,
            "not enough memory: use a smaller --batch-size or --image-size, or a larger machine",
        )
    return BUG, f"{type(error).__name__}: {_one_line(error)} (a bug; run again with --debug for the traceback)"


def _one_line(error: Exception) -> str:
    return _short(error) or "no message"


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 500 else f"{text[:500]}..."


def _usage(error: typer.TyperException) -> str:
    """Say in one line what Typer says in four."""
    possible = getattr(error, "possibilities", None)
    message = error.message if possible else error.format_message()
    message = " ".join(message.replace("Value error, ", "").split()).rstrip(".")
    message = message[0].lower() + message[1:].replace(". Did you mean", "; did you mean")
    if possible:
        return f"{message}; did you mean {possible[0]}?"
    if message.endswith("?"):
        return message
    context = getattr(error, "ctx", None)
    return f"{message}; see {context.command_path if context else 'vlprune'} --help"


def _silence_libraries() -> None:
    warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _terminate(number: int, frame: FrameType | None) -> None:
    """Leave through the `finally` blocks, which remove temporary files."""
    raise SystemExit(128 + number)
