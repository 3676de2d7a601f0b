"""Throw changed bundles and mask files at their readers; tell crashes, hangs and memory.

    python tests/attacks/fuzz.py --inputs 100000 BUNDLE [--seed 0]

BUNDLE is any good bundle; it is taken apart, and its parts are changed: bits and bytes, lengths, JSON values. A reader
may accept what it is given, or refuse it with one of vlprune's errors. Anything else is a crash. Every reader is given
its share of the inputs. ONNX Runtime itself is not fuzzed: what `check_graph` accepts is not opened.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile import Parts, compressed, tar

from vlprune.bundle.archive import opened
from vlprune.bundle.manifest import parse, parse_json
from vlprune.bundle.protobuf import check_graph
from vlprune.bundle.runner import DEFAULT
from vlprune.bundle.spec import check_spec
from vlprune.bundle.tensors import CODINGS, DTYPES, decode, stored_values
from vlprune.bundle.text import Texts
from vlprune.bundle.unpack import read_manifest, unpack
from vlprune.bundle.verify import read_example
from vlprune.errors import VlpruneError
from vlprune.models.pixels import read_pixels


HANG = 10  # seconds of the processor: others may use the machine, too
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**32 - 1, 2**63, 2**64, -(2**63), 2**200, 10**400, 0.5, -0.0, 1e308, 1e-320,
    "", "a", "../evil", "/etc/passwd", "\0", "\u202e", "a" * 5000, [], {}, [[]], [0], {"a": 0},
    "float32", "NaN", "0" * 64,
]  # fmt: skip


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Change a few bytes: flip, set, cut, repeat, insert, or take the length of something to an extreme."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not made:
            break
        at = rng.randrange(len(made))
        way = rng.randrange(7)
        if way == 0:
            made[at] ^= 1 << rng.randrange(8)
        elif way == 1:
            made[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif way == 2:
            del made[at : at + rng.choice((1, 4, 100, len(made)))]
        elif way == 3:
            made[at:at] = made[at : at + rng.choice((1, 8, 512))]
        elif way == 4:
            made[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
        elif way == 5:
            made[at : at + 4] = rng.choice((b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f", b"9999"))
        else:
            other = rng.randrange(len(made))
            made[at : at + 16] = made[other : other + 16]
    return bytes(made)


def change_json(value: Any, rng: random.Random) -> Any:
    """Change a few values, keys or lengths somewhere in a JSON value."""
    made = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        place, key = None, None
        found = made
        while isinstance(found, dict | list) and found and rng.random() < 0.85:
            place = found
            key = rng.choice(list(found)) if isinstance(found, dict) else rng.randrange(len(found))
            found = found[key]
        if place is None:
            continue
        way = rng.randrange(4)
        if way == 0 or not isinstance(found, int):
            place[key] = copy.deepcopy(rng.choice(ODD))  # later changes may be inside it
        elif way == 1:
            place[key] = found + rng.choice((-1, 1, 64, -64, 2**20))
        elif way == 2:
            place[key] = -found
        elif isinstance(place, dict):
            del place[key]
        else:
            place *= 2
    return made


class Readers:
    """The readers, each with what it takes."""

    def __init__(self, bundle: Path, folder: Path, rng: random.Random) -> None:
        self.rng, self.folder = rng, folder
        self.file = folder / "fuzzed"
        self.data, self.parts = bundle.read_bytes(), Parts(bundle)
        self.plain = bytes(self.parts.tar())
        self.manifest, _ = read_manifest(bundle)
        self.tensors = {(t["offset"], t["bytes"]): t["dtype"] for t in self.manifest["weights"]["tensors"]}
        self.graphs = [data for name, data in self.parts.members.items() if name.startswith("graphs/")]
        self.spec = json.loads(self.parts.members["task.json"])
        self.masks = _masks(folder)
        self.readers: list[tuple[int, Callable[[], Any]]] = [
            (10, self.archive), (10, self.tar), (5, self.members), (20, self.manifest_values), (10, self.manifest_text),
            (15, self.graph), (10, self.tensor), (5, self.task), (5, self.tokenizer), (5, self.preprocessor),
            (5, self.example), (10, self.mask_bytes), (5, self.mask_header),
        ]  # fmt: skip

    def unpack(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            unpack(self.file, Path(folder))

    def archive(self) -> None:
        self.file.write_bytes(change_bytes(self.data, self.rng))
        self.unpack()

    def tar(self) -> None:
        self.file.write_bytes(compressed(change_bytes(self.plain, self.rng)))
        self.unpack()

    def members(self) -> None:
        """Members that the manifest tells of rightly, and that are no longer sound."""
        parts = copy.copy(self.parts)
        parts.members, parts.manifest = dict(self.parts.members), copy.deepcopy(self.parts.manifest)
        name = self.rng.choice(list(parts.members))
        parts.set(name, change_bytes(parts.members[name], self.rng))
        self.file.write_bytes(compressed(tar([("manifest.json", parts.text()), *parts.ordered()])))
        self.unpack()

    def manifest_values(self) -> None:
        text = json.dumps(change_json(self.parts.manifest, self.rng)).encode()
        parse(text, len(self.data))

    def manifest_text(self) -> None:
        self.file.write_bytes(
            compressed(tar([("manifest.json", change_bytes(self.parts.text(), self.rng)), *self.parts.ordered()]))
        )
        with opened(self.file):
            read_manifest(self.file)

    def graph(self) -> None:
        check_graph(change_bytes(self.rng.choice(self.graphs), self.rng), "a graph", self.tensors)

    def tensor(self) -> None:
        entry: Any = dict(self.rng.choice(self.manifest["weights"]["tensors"]))
        data = change_bytes(self.parts.members[f"weights/{entry['sha256']}"], self.rng)
        entry["masked"] = self.rng.random() < 0.5
        if self.rng.random() < 0.3:
            entry["dtype"] = entry["stored"] = self.rng.choice(DTYPES)
            entry["coding"] = self.rng.choice(CODINGS)
            entry["bytes"] = self.rng.randrange(1, 4096) * 8
        if entry["dtype"] in ("uint8", "int8") and entry["coding"] == "planes":
            entry["coding"] = "delta"
        if entry["dtype"] not in ("uint8", "int8") and entry["coding"] == "delta":
            entry["coding"] = "planes"
        if stored_values(entry, len(data)) is None:
            return
        self.file.write_bytes(data)
        with self.file.open("rb") as file:
            try:
                found = sum(piece.nbytes for piece in decode(entry, file, len(data)))
            except ValueError:
                return
        assert found == entry["bytes"]

    def task(self) -> None:
        check_spec(parse_json(json.dumps(change_json(self.spec, self.rng)).encode(), "task.json"), self.manifest)

    def tokenizer(self) -> None:
        text = self.parts.members["tokenizer.json"]
        if self.rng.random() < 0.5:
            text = json.dumps(change_json(json.loads(text), self.rng)).encode()
        else:
            text = change_bytes(text, self.rng)
        texts = Texts(text, {}, self.spec)
        texts.decode(texts.texts(["a red circle is 3.5 left's"])[0][0].tolist())

    def preprocessor(self) -> None:
        given = json.loads(self.parts.members["preprocessor_config.json"])
        folder = self.folder / "preprocessor"
        folder.mkdir(exist_ok=True)
        (folder / "preprocessor_config.json").write_text(json.dumps(change_json(given, self.rng)))
        read_pixels(folder, DEFAULT)

    def example(self) -> None:
        folder = self.folder / "with-example"
        (folder / "example").mkdir(parents=True, exist_ok=True)
        for name in ("example/image.png", "example/expected.json", "example/text.txt"):
            data = self.parts.members[name]
            (folder / name).write_bytes(change_bytes(data, self.rng) if self.rng.random() < 0.5 else data)
        read_example(folder)

    def mask_bytes(self) -> None:
        self.file.write_bytes(change_bytes(self.masks, self.rng))
        _load_masks(self.file)

    def mask_header(self) -> None:
        """The header is JSON again, and the lengths around it are right."""
        length = int.from_bytes(self.masks[:8], "little")
        header = json.loads(self.masks[8 : 8 + length])
        if self.rng.random() < 0.5:
            inner = change_json(json.loads(header["__metadata__"]["header"]), self.rng)
            header["__metadata__"]["header"] = json.dumps(inner)
        else:
            header = change_json(header, self.rng)
        text = json.dumps(header).encode()
        self.file.write_bytes(len(text).to_bytes(8, "little") + text + self.masks[8 + length :])
        _load_masks(self.file)


def _masks(folder: Path) -> bytes:
    import torch

    from vlprune.pruning.layers import Pruned
    from vlprune.pruning.masks import save_masks

    metadata = {"method": "omp", "ratio": 0.5, "pattern": "unstructured", "seed": 0, "model": "m"}
    masks = {f"layer.{i}": torch.rand(12, 10 + i) > 0.5 for i in range(5)}
    save_masks(folder / "masks", Pruned(masks, {"layer.1": torch.rand(12, 11)}), metadata)
    return (folder / "masks").read_bytes()


def _load_masks(path: Path) -> None:
    from vlprune.pruning.masks import load_masks

    load_masks(path)


class _HangError(Exception):
    pass


def fuzz(bundle: Path, inputs: int, seed: int = 0, show: bool = False) -> dict[str, Any]:
    """Run the inputs.

    Args:
        bundle: a good one.
        inputs: how many.
        seed: of the changes.
        show: write to stderr how far one is.

    Returns:
        dict[str, Any]: `inputs` and `accepted` per reader, `crashes` (reader, number of the input, error), `slowest`
            seconds, `memory_bytes` above what the process took after reading the good bundle once.
    """

    def hang(number: int, frame: Any) -> None:
        raise _HangError

    signal.signal(signal.SIGPROF, hang)
    counts, accepted, crashes, slowest = Counter[str](), Counter[str](), [], 0.0
    with tempfile.TemporaryDirectory() as name:
        rng = random.Random(seed)
        readers = Readers(bundle, Path(name), rng)
        readers.file.write_bytes(readers.data)
        readers.unpack()
        shares = [reader for share, reader in readers.readers for _ in range(share)]
        baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(inputs):
            rng.seed(f"{seed} {number}")  # so that one input can be repeated alone
            reader = rng.choice(shares)
            counts[reader.__name__] += 1
            start = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, HANG)
            try:
                reader()
                accepted[reader.__name__] += 1
            except VlpruneError as error:
                if "\n" in str(error):
                    crashes.append((reader.__name__, number, "more than one line"))
            except Exception as error:
                crashes.append((reader.__name__, number, f"{type(error).__name__}: {error}"[:200]))
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            slowest = max(slowest, time.process_time() - start)
            if show and number % 1000 == 999:
                print(f"\r{number + 1}/{inputs}, {len(crashes)} crashes", end="", file=sys.stderr, flush=True)
        left = sorted(os.listdir(name))
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - baseline) * 1024
    return {
        "inputs": dict(counts),
        "accepted": dict(accepted),
        "crashes": crashes,
        "slowest": slowest,
        "memory_bytes": memory,
        "left": left,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found = fuzz(given.bundle, given.inputs, given.seed, show=True)
    print(json.dumps(found, indent=1))
    sys.exit(bool(found["crashes"]) or found["memory_bytes"] > 200 * 2**20)
