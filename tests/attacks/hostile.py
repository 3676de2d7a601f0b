"""Bundles taken apart, changed, and put together again: hashes and sizes right, unless they are what is wrong."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import zstandard

from vlprune.bundle import archive


class Parts:
    """The members of a bundle, to be changed; `manifest` is an object, not text."""

    def __init__(self, path: Path) -> None:
        data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(path.read_bytes())).read()
        self.members: dict[str, bytes] = {}
        at = 0
        while any(data[at : at + 512]):
            name = data[at : at + 100].split(b"\0")[0].decode()
            size = int(data[at + 124 : at + 135], 8)
            self.members[name] = data[at + 512 : at + 512 + size]
            at += 512 + -(-size // 512) * 512
        self.manifest: dict[str, Any] = json.loads(self.members.pop("manifest.json"))

    def set(self, name: str, content: bytes | str | Any) -> Parts:
        """Replace a member, or add one, and tell the manifest."""
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content)).encode()
        self.members[name] = content
        self.manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        return self

    def drop(self, name: str) -> Parts:
        """Remove a member, and tell the manifest."""
        self.members.pop(name, None)
        self.manifest["files"].pop(name, None)
        return self

    def change(self, **keys: Any) -> Parts:
        """Set keys of the manifest."""
        self.manifest |= keys
        return self

    def spec(self, **keys: Any) -> Parts:
        """Set keys of task.json."""
        return self.set("task.json", json.loads(self.members["task.json"]) | keys)

    def text(self) -> bytes:
        """The manifest as it is written."""
        return (json.dumps(self.manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()

    def ordered(self) -> list[tuple[str, bytes]]:
        """Members in the order of a bundle, the manifest left out."""
        return sorted(self.members.items(), key=lambda pair: (pair[0].startswith("weights/"), pair[0]))

    def write(self, path: Path, text: bytes | None = None) -> Path:
        """Put the bundle together; `text` = another manifest."""
        members = [("manifest.json", self.text() if text is None else text), *self.ordered()]
        archive.write(path, members)
        return path

    def tar(self) -> bytearray:
        """The archive before compression, with its manifest."""
        return bytearray(tar([("manifest.json", self.text()), *self.ordered()]))


def tar(members: list[tuple[str, bytes]]) -> bytes:
    """An archive that is not compressed."""
    data = b"".join(archive.header(name, len(c)) + c + b"\0" * (-len(c) % 512) for name, c in members)
    return data + b"\0" * 1024


def compressed(data: bytes, **options: Any) -> bytes:
    """What zstd makes of some bytes."""
    return zstandard.ZstdCompressor(level=3, write_checksum=True, **options).compress(bytes(data))
