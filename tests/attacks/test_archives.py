"""Archives that are no bundles: other members than the manifest tells, other headers, other compression."""

import io
import random
import shutil
import struct
import tarfile

import pytest
import zstandard
from hostile import compressed, tar

from vlprune.bundle.archive import header
from vlprune.bundle.unpack import unpack
from vlprune.bundle.verify import verify


def info(name, kind=tarfile.REGTYPE, size=0, link="", **more):
    made = tarfile.TarInfo(name)
    made.type, made.size, made.linkname, made.mode = kind, size, link, 0o644
    for key, value in more.items():
        setattr(made, key, value)
    return made


MEMBERS = {
    "a link": info("task.json", tarfile.SYMTYPE, link="/etc/passwd"),
    "a link ": info("task.json", tarfile.LNKTYPE, link="manifest.json"),
    "a device": info("task.json", tarfile.CHRTYPE),
    "a device ": info("task.json", tarfile.BLKTYPE),
    "a pipe": info("task.json", tarfile.FIFOTYPE),
    "a folder": info("graphs/", tarfile.DIRTYPE),
    "'../evil' stands where": info("../evil"),
    "'/etc/evil' stands where": info("/etc/evil"),
    "'graphs/../../evil' stands where": info("graphs/../../evil"),
    "'TASK.JSON' stands where": info("TASK.JSON"),
    "'libevil.so' stands where": info("libevil.so"),
    "the header of 'README.md' is not what": info("README.md", uid=1000),
    "the header of 'README.md' is not what ": info("README.md", mtime=1),
    "the header of 'README.md' is not what  ": info("README.md", size=7),
    "an extended header": info("x" * 200),
    "an extended header ": info("README.md", pax_headers={"path": "../evil"}),
}


@pytest.mark.parametrize("message", MEMBERS)
def test_members_that_are_no_plain_files(parts, refused, world, message):
    """Each stands first after the manifest, where README.md should be."""
    made = MEMBERS[message]
    kind = tarfile.PAX_FORMAT if made.pax_headers else tarfile.GNU_FORMAT
    bytes_of = made.tobuf(kind)
    whole = tar([("manifest.json", parts.text())])[:-1024] + bytes_of + b"\0" * 4096
    (world / "a.zst").write_bytes(compressed(whole))
    assert message.strip() in refused(lambda: verify(world / "a.zst"))


@pytest.mark.parametrize(
    "name",
    [
        "../evil", "/etc/evil", "graphs/../../evil.onnx", "graphs/a.so", "graphs/libvlprune_ops.so", "model.py",
        "a.pkl", "TASK.JSON", "readme.md", "graphs/Image_encoder.onnx", "graphs/", "graphs/a/b.onnx", "weights/short",
        "", ".", "graphs/a.onnx\0.so", "graphs/\u0430.onnx", "task.json/", "con.onnx", "model.safetensors",
        "task.json ", "C:evil", "weights/" + "A" * 64, "stored", "graphs/weights.bin",
    ],
)  # fmt: skip
def test_names_that_no_bundle_has(parts, refused, world, name):
    """The manifest names them, so that only the list of names refuses them."""
    parts.manifest["files"][name] = {"bytes": 0, "sha256": "0" * 64}
    parts.write(world / "a.zst")
    assert "which no bundle has" in refused(lambda: verify(world / "a.zst"))


def test_a_member_twice(parts, refused, world):
    ordered = [("manifest.json", parts.text()), *parts.ordered()]
    (world / "a.zst").write_bytes(compressed(tar([*ordered[:2], *ordered[1:]])))
    assert "'README.md' stands where" in refused(lambda: verify(world / "a.zst"))
    (world / "a.zst").write_bytes(compressed(tar([*ordered, ordered[-1]])))
    assert "stands where it should end" in refused(lambda: verify(world / "a.zst"))


def test_members_in_another_order_or_missing(parts, refused, world):
    ordered = [("manifest.json", parts.text()), *parts.ordered()]
    for members in (ordered[1:], [ordered[0], *reversed(ordered[1:])], ordered[:-1], ordered[:1], []):
        (world / "a.zst").write_bytes(compressed(tar(members)))
        refused(lambda: verify(world / "a.zst"))


def test_data_between_members(parts, refused, world):
    data = parts.tar()
    data[512 + len(parts.text())] = 1  # in the padding behind the manifest
    (world / "a.zst").write_bytes(compressed(data))
    assert "data between its members" in refused(lambda: verify(world / "a.zst"))


def zeros(size):
    """A zstd frame of zeros, a block of 128 KiB in every four bytes."""
    head = struct.pack("<I", zstandard.MAGIC_NUMBER) + bytes([0, 0x58])  # a window of 2 MiB
    blocks = size >> 17
    block = struct.pack("<I", (1 << 1) | (1 << 17 << 3))[:3] + b"\0"
    last = struct.pack("<I", 1 | (1 << 1) | (1 << 17 << 3))[:3] + b"\0"
    return head + block * (blocks - 1) + last


def test_the_bomb_is_one():
    assert len(zeros(1 << 30)) < 40_000
    assert zstandard.ZstdDecompressor().decompressobj().decompress(zeros(1 << 20)) == bytes(1 << 20)


def test_bombs(parts, refused, world):
    path = world / "a.zst"
    path.write_bytes(zeros(1 << 40 >> 4))  # 64 GiB of zeros
    assert "there is no header" in refused(lambda: verify(path))

    def bomb(head):
        stream = zstandard.ZstdCompressor(level=1).compressobj()
        data = stream.compress(head) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        path.write_bytes(data + zeros(1 << 36)[6:])

    bomb(header("manifest.json", 8 * 2**30 - 1))
    assert "claims 8,589,934,591 bytes" in refused(lambda: verify(path))
    # members that the manifest tells of, and that are all zeros
    sha = "0" * 64
    for files, message in (
        ({"README.md": 2**20 + 1}, "more than 1,048,576"),
        ({"graphs/a.onnx": 2**30}, "more than 8,388,608"),
        ({f"weights/{sha}": 8 * 2**30}, "its members claim"),
        ({f"weights/{sha}": 100 * 2**30}, "more than 8,589,934,592"),
    ):
        good = dict(parts.manifest["files"])
        parts.manifest["files"] |= {name: {"bytes": size, "sha256": sha} for name, size in files.items()}
        bomb(tar([("manifest.json", parts.text())])[:-1024])
        assert message in refused(lambda: verify(path))
        parts.manifest["files"] = good


def test_a_window_that_takes_all_memory(parts, refused, world):
    # the second byte of a frame's header tells the window: 2 ** (10 + 21) bytes
    data = struct.pack("<I", zstandard.MAGIC_NUMBER) + bytes([0, 21 << 3]) + zeros(1 << 20)[6:]
    (world / "a.zst").write_bytes(data)
    assert "zstd says" in refused(lambda: verify(world / "a.zst"))


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"PK\3\4", b"x" * 5000, b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18\xff\xff\xff\xff"]
)
def test_files_that_are_no_archives(refused, world, data):
    (world / "a.zst").write_bytes(data)
    refused(lambda: verify(world / "a.zst"))


def test_places_that_are_no_files(refused, world):
    (world / "folder.zst").mkdir()
    for path in (world / "folder.zst", world / "missing.zst", "/dev/zero"):
        assert "there is no file" in refused(lambda path=path: verify(path))


def test_cut_files(small_bundle, refused, world):
    data = small_bundle.read_bytes()
    rng = random.Random(0)
    for end in [0, 1, 4, 17, 18, len(data) - 1, len(data) - 4, *(rng.randrange(len(data)) for _ in range(20))]:
        (world / "a.zst").write_bytes(data[:end])
        refused(lambda: verify(world / "a.zst"))


def test_changed_bits_of_the_file_and_of_what_it_holds(small_bundle, parts, refused, world, tmp_path):
    whole, plain = small_bundle.read_bytes(), bytes(parts.tar())
    rng = random.Random(0)
    harmless = 0
    for turn in range(60):
        data = bytearray(whole if turn % 2 else plain)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (world / "a.zst").write_bytes(bytes(data) if turn % 2 else compressed(data))
        try:
            (world / "cwd/unpacked").mkdir()
            unpack(world / "a.zst", world / "cwd/unpacked")
            # a changed digit of a score that the manifest tells, say: no reader can know
            harmless += 1
            assert turn % 2 == 0
        except Exception as error:  # noqa: BLE001
            assert type(error).__name__ in ("RequestError", "MachineError"), error
        finally:
            shutil.rmtree(world / "cwd/unpacked")
    assert harmless < 15


def test_a_second_archive_behind_the_first(small_bundle, refused, world):
    data = small_bundle.read_bytes()
    (world / "a.zst").write_bytes(data + data)
    assert "data follow its end" in refused(lambda: verify(world / "a.zst"))
    (world / "a.zst").write_bytes(b"\x50\x2a\x4d\x18\x04\0\0\0evil" + data)
    refused(lambda: verify(world / "a.zst"))


def test_the_good_bundle_is_good(small_bundle, parts, world):
    """Otherwise the refusals above would mean nothing."""
    verify(small_bundle)
    verify(parts.write(world / "a.zst"))
    (world / "b.zst").write_bytes(compressed(io.BytesIO(parts.tar()).read()))
    verify(world / "b.zst")
