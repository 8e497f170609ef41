"""GGUF containers: against the `gguf` package in both directions, and against files that lie."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fledge.errors import CheckpointError
from fledge.formats.gguf import INT32, Outgoing, Typed, read_gguf, write_gguf

gguf = pytest.importorskip("gguf")

METADATA: dict[str, Any] = {
    "general.architecture": "llama",
    "a.number": 7,
    "a.float": 0.25,
    "a.flag": True,
    "a.text": "鸟 and\n\0 more",
    "some.strings": ["", "x", "鸟"],
    "some.numbers": Typed(INT32, [-3, 4]),
    "some.floats": [0.5, -1.0],
}


def outgoing(name: str, *shape: int, kind: str = "F32") -> Outgoing:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))
    return Outgoing(name, shape, kind, lambda: tensor)


TENSORS = [outgoing("one", 5), outgoing("two", 3, 64, kind="Q4_1"), outgoing("three", 2, 3, 4, kind="F16")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "file.gguf", METADATA, TENSORS)
    return tmp_path / "file.gguf"


def test_what_we_write_the_gguf_package_reads(path: Path) -> None:
    theirs = gguf.GGUFReader(path)
    for key, value in METADATA.items():
        assert theirs.fields[key].contents() == (value.value if isinstance(value, Typed) else value), key
    assert theirs.fields["some.numbers"].types[1] == gguf.GGUFValueType.INT32
    for theirs_one, ours in zip(theirs.tensors, TENSORS, strict=True):
        expanded = gguf.quants.dequantize(theirs_one.data, theirs_one.tensor_type).reshape(ours.shape)
        assert theirs_one.name == ours.name
        assert np.abs(expanded - np.asarray(ours.numbers())).max() < 0.2
        assert np.array_equal(expanded, read_gguf(path).tensor(ours.name).numpy())


def test_what_the_gguf_package_writes_we_read(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "qwen2")
    writer.add_uint64("a.big", 2**60)
    writer.add_int8("a.small", -5)
    writer.add_float64("a.double", 1e300)
    writer.add_bool("a.flag", False)
    writer.add_array("some.flags", [True, False])
    writer.add_array("some.words", ["a", "b"])
    writer.add_custom_alignment(64)
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    writer.add_tensor("x", x)
    writer.add_tensor("y", x.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = read_gguf(tmp_path / "theirs.gguf")
    assert (file.metadata["a.big"], file.metadata["a.small"], file.metadata["a.double"]) == (2**60, -5, 1e300)
    assert list(file.metadata["some.flags"]) == [True, False]
    assert file.metadata["some.words"] == ["a", "b"]
    assert np.array_equal(file.tensor("x").numpy(), x)
    assert file.entries["y"].shape == (3, 4)
    assert np.array_equal(file.tensor("y").numpy(), x)


def test_every_truncation_is_refused(path: Path) -> None:
    data = path.read_bytes()
    end = max(entry.offset + entry.num_bytes for entry in read_gguf(path).entries.values())
    for length in range(end):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"file\.gguf"):
            read_gguf(path)


def test_a_damaged_file_is_read_or_refused_and_nothing_else(path: Path) -> None:
    """600 files with a few bytes of the header changed."""
    data, draw = path.read_bytes(), random.Random(0)
    header = min(entry.offset for entry in read_gguf(path).entries.values())
    refused = 0
    for _ in range(600):
        damaged = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(4, header)
            damaged[place] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
        path.write_bytes(damaged)
        try:
            file = read_gguf(path)
            for name in file.entries:
                file.tensor(name)
                file.blocks(name)
        except CheckpointError:
            refused += 1
    assert refused > 150


def header(num_tensors: int = 0, num_keys: int = 0, *parts: bytes, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + b"".join(parts)


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def entry(name: bytes = b"x", shape: tuple[int, ...] = (4,), code: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, code, offset)


HUGE = 2**64 - 1


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "cannot be read"),
        (b"GGUX" + bytes(100), "not a GGUF file"),
        (header(version=1), "version 1 is not supported"),
        (header(version=3 << 24), "little-endian"),
        (header(HUGE, 0), "truncated"),
        (header(0, HUGE), "truncated"),
        (header(0, 1, struct.pack("<Q", HUGE)), "at most 65535"),
        (header(0, 1, text(b"k"), struct.pack("<IQ", 8, HUGE)), "truncated"),
        (header(0, 1, text(b"k"), struct.pack("<IIQ", 9, 4, HUGE)), "truncated"),
        (header(0, 1, text(b"k"), struct.pack("<IIQ", 9, 4, 2**62)), "truncated"),
        (header(0, 1, text(b"k"), struct.pack("<IIQ", 9, 8, HUGE)), "truncated"),
        (header(0, 1, text(b"k"), struct.pack("<IIQ", 9, 9, 1)), "unsupported type 9"),
        (header(0, 1, text(b"k"), struct.pack("<I", 77)), "unknown type 77"),
        (header(0, 1, text(b"\xff\xfe"), struct.pack("<I", 77)), "no UTF-8"),
        (header(0, 2, *[text(b"k") + struct.pack("<IB", 0, 1)] * 2), "the key 'k' twice"),
        (header(0, 1, text(b"general.alignment"), struct.pack("<II", 4, 0)), "multiple of 8"),
        (header(0, 1, text(b"general.alignment"), struct.pack("<I", 8), text(b"32")), "multiple of 8"),
        (header(1, 0, entry(b"n" * 65)), "at most 64"),
        (header(1, 0, entry(shape=())), "has 0 axes"),
        (header(1, 0, text(b"x"), struct.pack("<I", 2**31)), "axes"),
        (header(1, 0, entry(shape=(0,))), "no whole number"),
        (header(1, 0, entry(shape=(33,), code=2)), "no whole number of Q4_0 blocks"),
        (header(1, 0, entry(code=4)), "of type 4, which fledge does not read"),
        (header(1, 0, entry(offset=4)), "no multiple of 32"),
        (header(1, 0, entry(offset=2**63)), "truncated"),
        (header(1, 0, entry(shape=(2**32, 2**32))), "truncated"),
        (header(1, 0, entry(shape=(2**62, 4))), "truncated"),
        (header(2, 0, entry(), entry()) + bytes(200), "tensor 'x' twice"),
        (
            header(2, 0, entry(shape=(16,)), entry(b"y", offset=32)) + bytes(200),
            "'x' and 'y' lie over each other",
        ),
    ],
)
def test_a_hostile_header_is_refused_by_name(data: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "hostile.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match=complaint):
        read_gguf(tmp_path / "hostile.gguf")


@pytest.mark.parametrize(("kind", "content"), [("F32", struct.pack("<f", float("nan"))), ("F16", b"\x00\x7c" * 2)])
def test_undefined_numbers_are_refused_by_the_name_of_their_tensor(kind: str, content: bytes, path: Path) -> None:
    code = {"F32": 0, "F16": 1}[kind]
    count = len(content) // (4 if kind == "F32" else 2)
    data = header(1, 0, entry(b"weights", (count,), code))
    path.write_bytes(data + bytes(-len(data) % 32) + content)
    with pytest.raises(CheckpointError, match="'weights' holds infinite or undefined"):
        read_gguf(path).tensor("weights")


def test_undefined_scales_of_kept_blocks_are_refused(path: Path) -> None:
    data = header(1, 0, entry(b"weights", (32, 1), 8))
    path.write_bytes(data + bytes(-len(data) % 32) + b"\x00\x7e" + bytes(32))
    with pytest.raises(CheckpointError, match="'weights' holds infinite or undefined scales"):
        read_gguf(path).blocks("weights")


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: outgoing("x", 2, 33, kind="Q8_0"), "rows of 33 are no whole number of blocks of 32"),
        (lambda: outgoing("x", 2, 256, kind="Q4_K"), "does not write Q4_K"),
        (
            lambda: Outgoing("x", (2,), "F16", lambda: torch.tensor([1.0, 1e6])),
            "numbers that F16 cannot hold",
        ),
        (
            lambda: Outgoing("x", (1,), "F32", lambda: torch.tensor([torch.nan])),
            "numbers that F32 cannot hold",
        ),
    ],
)
def test_what_cannot_be_written_leaves_no_file(make: Callable[[], Outgoing], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        write_gguf(tmp_path / "out.gguf", {}, [outgoing("first", 4), make()])
    assert list(tmp_path.iterdir()) == []
