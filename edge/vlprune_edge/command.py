"""The command `vlprune-edge`. Exit codes: 0 done, 2 the request is wrong, 3 the machine cannot do it, 130 interrupted.

Results go to stdout, one JSON object per image with --json; errors are one line on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from errno import EDQUOT, ENOSPC
from importlib.metadata import version
from pathlib import Path
from typing import Any

from vlprune_edge.core.errors import RequestError, VlpruneError
from vlprune_edge.progress import track


IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")
EPILOG = """examples:
  vlprune-edge caption photo.jpg --bundle captioning.vlp.tar.zst
  vlprune-edge classify photos/ --bundle clip.vlp.tar.zst --classes cat,dog --output found.jsonl
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: what follows its name; taken from the process when left out.

    Returns:
        int: the exit code.
    """
    given = _parser().parse_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        given.call(given)
    except VlpruneError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except MemoryError:
        print("error: not enough memory: use a smaller --batch-size", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, as head does
        _drop_stdout()
        return 141
    except OSError as error:
        with suppress(OSError):
            sys.stdout.flush()  # what a full disk still holds back would fail once more on exit
        _drop_stdout()
        if error.errno in (ENOSPC, EDQUOT):
            print("error: no space left on the disk: free some, or choose another --output", file=sys.stderr)
            return 3
        named = f"cannot use {error.filename}" if error.filename else "cannot read or write"
        print(f"error: {named} ({error.strerror or error}): check the path", file=sys.stderr)
        return 2
    return 0


def _drop_stdout() -> None:
    """Python flushes stdout once more on exit: give it somewhere to go."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vlprune-edge",
        description="Run a bundle of vlprune: captions, answers, matches, embeddings, classes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"vlprune-edge {version('vlprune-edge')}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, what: str, call: Callable[[Any], None]) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=what, description=what)
        added.set_defaults(call=call)
        return added

    def on_images(name: str, what: str, compute: Callable[..., Any], graphs: Sequence[str] | None = None) -> Any:
        added = verb(name, what, lambda given: _each(given, compute, graphs))
        added.add_argument("image", type=Path, nargs="+", help="image files, or a folder of them")
        _add_bundle(added)
        added.add_argument("--output", type=Path, metavar="FILE", help="write JSON lines there instead of to stdout")
        added.add_argument("--json", action="store_true", help="print JSON lines")
        added.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="images at a time [8]")
        added.add_argument("--skip-broken", action="store_true", help="leave broken images out, and tell their names")
        return added

    on_images("caption", "Describe images.", _caption)
    ask = on_images("answer", "Answer a question about images.", _answer)
    ask.add_argument("--question", required=True, metavar="TEXT", help="the question")
    match = on_images("match", "Tell how well a text fits images.", _match)
    match.add_argument("--text", required=True, metavar="TEXT", help="the text")
    classify = on_images("classify", "Tell the likeliest classes of images.", _classify)
    classify.add_argument("--classes", metavar="A,B,...", help="classes to choose from (zero-shot bundles)")
    classify.add_argument("--top", type=_positive, default=5, metavar="N", help="classes per image [5]")
    on_images("embed-image", "Embed images; prints JSON lines.", _embed_image, ["image_encoder"])

    text = verb("embed-text", "Embed texts; prints JSON lines.", _embed_text)
    text.add_argument("text", nargs="+", help="texts")
    _add_bundle(text)
    judge = verb("judge", "Tell whether a sentence is true of two images.", _judge)
    for name in ("left", "right"):
        judge.add_argument(name, type=Path, help="an image file")
    judge.add_argument("--sentence", required=True, metavar="TEXT", help="the sentence")
    judge.add_argument("--json", action="store_true", help="print JSON")
    _add_bundle(judge)
    info = verb("info", "Tell what a bundle is, without opening its graphs.", _info)
    check = verb("verify", "Check a bundle, run its stored input, compare with its stored output.", _verify)
    for added in (info, check):
        added.add_argument("file", type=Path, help="the bundle")
        added.add_argument("--public-key", type=Path, metavar="KEY", help="Ed25519 key (PEM) that must have signed it")
        added.add_argument("--json", action="store_true", help="print JSON")
    check.add_argument("--threads", type=_positive, metavar="N", help="CPU threads [all]")
    return parser


def _add_bundle(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, required=True, metavar="FILE", help="the bundle")
    parser.add_argument("--public-key", type=Path, metavar="KEY", help="Ed25519 key (PEM) that must have signed it")
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads [all]")


def _positive(text: str) -> int:
    with suppress(ValueError):
        if (value := int(text)) > 0:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")


def _open(given: Any, graphs: Sequence[str] | None = None) -> Any:
    from vlprune_edge.core.bundle.runner import open_bundle  # onnxruntime: not needed to show the help

    return open_bundle(given.bundle, public_key=given.public_key, graphs=graphs, threads=given.threads)


def _caption(bundle: Any, images: list[Any], given: Any) -> list[dict[str, Any]]:
    return [{"caption": caption} for caption in bundle.caption(images)]


def _answer(bundle: Any, images: list[Any], given: Any) -> list[dict[str, Any]]:
    return [{"answer": answer} for answer in bundle.answer(images, [given.question] * len(images))]


def _match(bundle: Any, images: list[Any], given: Any) -> list[dict[str, Any]]:
    return [match._asdict() for match in bundle.match(images, [given.text] * len(images))]


def _classify(bundle: Any, images: list[Any], given: Any) -> list[dict[str, Any]]:
    classes = None if given.classes is None else [name.strip() for name in given.classes.split(",")]
    if classes is not None and not all(classes):
        raise RequestError(f"--classes {given.classes!r} has an empty entry: separate names by single commas")
    return [{"classes": [label._asdict() for label in row]} for row in bundle.classify(images, given.top, classes)]


def _embed_image(bundle: Any, images: list[Any], given: Any) -> list[dict[str, Any]]:
    return [{"embedding": row.tolist()} for row in bundle.embed_image(images)]


def _embed_text(given: Any) -> None:
    bundle = _open(given, ["text_encoder"])
    for text, row in zip(given.text, bundle.embed_text(given.text), strict=True):
        print(json.dumps({"text": text, "embedding": row.tolist()}, ensure_ascii=False))


def _judge(given: Any) -> None:
    true = _open(given).judge(given.left, given.right, given.sentence)
    print(json.dumps({"true": true}) if given.json else ("true" if true else "false"))


def _each(given: Any, compute: Callable[..., Any], graphs: Sequence[str] | None) -> None:
    """Compute something for every image, batch by batch."""
    from vlprune_edge.core.bundle.runner import open_picture

    paths = _images(given.image)
    if given.output is not None and not given.output.parent.is_dir():
        raise RequestError(f"{given.output.parent} is no folder: choose another --output")
    if given.output is not None and given.output.is_dir():
        raise RequestError(f"{given.output} is a folder: name a file, as in --output found.jsonl")
    bundle = _open(given, graphs)
    lines = given.json or compute is _embed_image or given.output is not None
    with _Lines(given.output) as out:
        for batch in track(len(paths), given.batch_size):
            there, images = [], []
            for path in (paths[i] for i in batch):
                try:
                    images.append(open_picture(path))
                    there.append(path)
                except RequestError as error:
                    if not given.skip_broken:
                        raise
                    print(f"skipped: {' '.join(str(error).split())}", file=sys.stderr)
            found = compute(bundle, images, given) if images else []
            for path, row in zip(there, found, strict=True):
                if lines:
                    out.write(json.dumps({"image": str(path), **row}, ensure_ascii=False))
                else:
                    out.write(f"{path}: {_plain(row)}" if len(paths) > 1 else _plain(row))


def _images(given: Sequence[Path]) -> list[Path]:
    """Files, and those in folders, sorted by name."""
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGES and file.is_file())
            if not inside:
                raise RequestError(f"{path} holds no image: give a folder of {', '.join(IMAGES[:4])} ... files")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise RequestError(f"there is no file or folder {path}: check the path")
    return found


class _Lines:
    """Lines to stdout, or to a file that appears when all are written."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def __enter__(self) -> _Lines:
        if self.path is not None:
            try:
                handle, name = tempfile.mkstemp(prefix=f".{self.path.name}.", dir=self.path.parent)
            except OSError as error:
                raise RequestError(f"cannot write {self.path} ({error.strerror}): choose another --output") from error
            self.temporary = Path(name)
            os.chmod(name, 0o666 & ~_umask())
            self.file = os.fdopen(handle, "w", encoding="utf-8")
        return self

    def write(self, line: str) -> None:
        print(line, file=None if self.path is None else self.file, flush=self.path is None)

    def __exit__(self, kind: object, *rest: object) -> None:
        if self.path is None:
            return
        try:
            self.file.close()  # writes the rest, for which there may be no space
            if kind is None:
                self.temporary.replace(self.path)
        finally:
            self.temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _plain(row: dict[str, Any]) -> str:
    if "classes" in row:
        return ", ".join(f"{label['name']} {label['score']:.3f}" for label in row["classes"])
    if "similarity" in row:
        likely = "" if row["probability"] is None else f", probability of a match {row['probability']:.3f}"
        return f"similarity {row['similarity']:.3f}{likely}"
    return str(next(iter(row.values())))


def _info(given: Any) -> None:
    from vlprune_edge.core.bundle.unpack import read_manifest

    manifest, identity = read_manifest(given.file, given.public_key)
    left_out = ("files", "weights", "format", "schema_version")
    told: dict[str, Any] = {key: value for key, value in manifest.items() if key not in left_out}
    if not given.json:
        told["metrics"] = [_score(row) for row in manifest["metrics"]]
    _show({"bundle": identity, "bytes": given.file.stat().st_size, **told}, given.json)


def _score(row: dict[str, Any]) -> str:
    where = [str(row.get(key)) for key in ("variant", "runtime", "precision", "dataset")]
    values = ", ".join(f"{name} {value:.4g}" for name, value in row["values"].items())
    return f"{', '.join(where)}, n = {row.get('n')}: {values}"


def _verify(given: Any) -> None:
    from vlprune_edge.core.bundle.verify import verify

    _show(verify(given.file, given.public_key, given.threads), given.json)


def _show(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return
    for key, value in found.items():
        names = isinstance(value, list) and all(isinstance(row, str) and " " not in row for row in value)
        rows = [", ".join(value)] if names else value if isinstance(value, list) else [value]
        for row in rows:
            text = row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)
            print(f"{key}: {''.join(c if c.isprintable() else ' ' for c in text)}")
