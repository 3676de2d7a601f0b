"""The archive is a plain tar file under zstd, written in one way, and nothing else is read."""

import io
import tarfile

import pytest
import zstandard

from vlprune.bundle import archive
from vlprune.errors import RequestError


MEMBERS = [("manifest.json", b"{}"), ("empty", b""), ("graphs/a.onnx", b"x" * 1000), ("large", b"y" * 600_000)]


@pytest.fixture
def path(tmp_path):
    archive.write(tmp_path / "a.zst", MEMBERS)
    return tmp_path / "a.zst"


def read(path):
    with archive.opened(path) as reader:
        found = [reader.first("manifest.json", 100)]
        found += [b"".join(reader.member(name, len(content))) for name, content in MEMBERS[1:]]
        reader.end()
    return found


def test_what_is_written_is_read(path):
    assert read(path) == [content for _, content in MEMBERS]


def test_tar_reads_it(path):
    data = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(path.read_bytes())).read()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(m.name, m.size, m.mtime, m.uid, m.gid, m.mode, m.type) for m in tar] == [
            (name, len(content), 0, 0, 0, 0o644, tarfile.REGTYPE) for name, content in MEMBERS
        ]


def test_headers_are_those_of_python():
    info = tarfile.TarInfo("graphs/image_encoder.onnx")
    info.size, info.mode = 123_456, 0o644
    assert archive.header("graphs/image_encoder.onnx", 123_456) == info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("lost", [1, 2, 4, 5, 100])
def test_a_cut_file_is_refused(path, lost):
    path.write_bytes(path.read_bytes()[:-lost])
    with pytest.raises(RequestError, match="cut short"):
        read(path)


@pytest.mark.parametrize("more", [b"\0", b"x" * 5000, None])
def test_data_after_the_end_are_refused(path, more):
    data = path.read_bytes()
    path.write_bytes(data + (data if more is None else more))
    with pytest.raises(RequestError, match="data follow its end"):
        read(path)


def test_every_byte_counts(path):
    data = path.read_bytes()
    for at in range(0, len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :])
        try:
            found = read(path)
        except RequestError:
            continue
        assert found == [content for _, content in MEMBERS], at  # a flag that changes nothing
