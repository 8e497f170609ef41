"""GGUF files: metadata and tensors in one file that is mapped into memory, read strictly and written.

The container only; number formats are in gguf_tensors.py, what a model is called in gguf_models.py, the vocabulary in
gguf_tokenizer.py. Nothing in a file is believed: every count and offset is held against the size of the file before
anything is allocated, and what does not fit is refused by name. Source: the GGUF specification in the `ggml`
repository, docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fledge.errors import CheckpointError
from fledge.files import write_file
from fledge.formats.gguf_tensors import KINDS, UNPACKED, WRITTEN, Blocks, Kind, pack_blocks, unpack_blocks

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 1 had 32-bit counts and is long gone
ALIGNMENT_KEY, ALIGNMENT = "general.alignment", 32
MAX_KEY_BYTES, MAX_NAME_BYTES, MAX_AXES = 65535, 64, 4  # the specification's limits
SCALARS = {
    0: ("<B", "uint8"), 1: ("<b", "int8"), 2: ("<H", "uint16"), 3: ("<h", "int16"), 4: ("<I", "uint32"),
    5: ("<i", "int32"), 6: ("<f", "float32"), 7: ("<?", "bool"), 10: ("<Q", "uint64"), 11: ("<q", "int64"),
    12: ("<d", "float64"),
}  # fmt: skip
BOOL, STRING, ARRAY = 7, 8, 9
UINT32, INT32, FLOAT32 = 4, 5, 6
KIND_OF = {kind.code: kind for kind in KINDS.values()}

Value = Any  # str, bool, int, float, list[str], or a numeric array


class Entry(NamedTuple):
    """A tensor of a file. `shape` has the outputs first, as torch has it; `offset` counts from the file's start."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GGUFFile:
    """An opened file. Its tensors stay on the disk until they are asked for."""

    path: Path
    metadata: Mapping[str, Value]
    entries: Mapping[str, Entry]
    data: NDArray[np.uint8]

    def get(self, key: str, kind: type[Any], default: Any = None) -> Any:
        """The value of a key; `CheckpointError` if it is not of this `kind`: str, bool, int, float, or list of str."""
        value = self.metadata.get(key, default)
        if value is not default and (not isinstance(value, kind) or isinstance(value, bool) != (kind is bool)):
            raise CheckpointError(f"{self.path}: {key} {value!r} must be a {kind.__name__}")
        return value

    def tensor(self, name: str) -> Tensor:
        """The tensor as float32, a copy; `CheckpointError` if it holds infinite or undefined numbers."""
        entry = self.entries[name]
        blocks = self._bytes(entry).reshape(-1, entry.kind.block_bytes)
        with np.errstate(invalid="ignore", over="ignore"):  # judged below
            numbers = entry.kind.expand(blocks)
        if not np.isfinite(numbers).all():
            raise CheckpointError(f"{self.path}: tensor '{name}' holds infinite or undefined values; fetch it again")
        return torch.from_numpy(np.ascontiguousarray(numbers).reshape(entry.shape))

    def blocks(self, name: str) -> Blocks | None:
        """The tensor with its quantisation kept, if it is a matrix in one of `UNPACKED`; else None."""
        entry = self.entries[name]
        if entry.kind.name not in UNPACKED or len(entry.shape) != 2:
            return None
        found = unpack_blocks(entry.kind.name, self._bytes(entry), (entry.shape[0], entry.shape[1]))
        if not all(torch.isfinite(part).all() for part in (found.scales, found.offsets) if part is not None):
            raise CheckpointError(f"{self.path}: tensor '{name}' holds infinite or undefined scales; fetch it again")
        return found

    def _bytes(self, entry: Entry) -> NDArray[np.uint8]:
        return self.data[entry.offset : entry.offset + entry.num_bytes]


def read_gguf(path: Path) -> GGUFFile:
    """Open a file and read all but its tensors. `CheckpointError` names what in it is truncated, hostile or unknown."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise CheckpointError(f"{path}: cannot be read ({error}); give a .gguf file") from error
    reader = _Reader(mapped, path)
    if reader.take(4) != MAGIC:
        raise CheckpointError(f"{path}: not a GGUF file (it does not begin with 'GGUF')")
    version = reader.number("<I")
    if version not in VERSIONS:
        raise CheckpointError(f"{path}: GGUF version {version} is not supported: known are 2 and 3, little-endian")
    num_tensors, num_keys = reader.number("<Q"), reader.number("<Q")
    metadata = _read_metadata(reader, num_keys)
    entries = _read_entries(reader, num_tensors, metadata.get(ALIGNMENT_KEY, ALIGNMENT))
    return GGUFFile(path, metadata, entries, np.frombuffer(mapped, dtype=np.uint8))


class _Reader:
    """A place in the mapped file; nothing is read beyond its end."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.place = data, path, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.place

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise self.refusal(f"wants {count} bytes at byte {self.place}, where only {self.left} are left: truncated")
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def string(self, limit: int | None = None) -> str:
        count = self.number("<Q")
        if limit is not None and count > limit:
            raise self.refusal(f"names something with {count} bytes at byte {self.place}; at most {limit} are allowed")
        try:
            return self.take(count).decode()
        except UnicodeDecodeError as error:
            raise self.refusal(f"holds a string that is no UTF-8 before byte {self.place}") from error

    def value(self) -> Value:
        code = self.number("<I")
        if code == STRING:
            return self.string()
        if code == ARRAY:
            return self.array()
        if code not in SCALARS:
            raise self.refusal(f"holds a value of the unknown type {code} at byte {self.place}")
        return self.number(SCALARS[code][0])

    def array(self) -> Value:
        code, count = self.number("<I"), self.number("<Q")
        if code == STRING:
            if count > self.left // 8:
                raise self.refusal(f"announces {count} strings where {self.left} bytes are left: truncated")
            return [self.string() for _ in range(count)]
        if code not in SCALARS:
            raise self.refusal(f"holds an array of the unsupported type {code} at byte {self.place}")
        dtype = np.dtype(SCALARS[code][1]).newbyteorder("<")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype=dtype)

    def refusal(self, trouble: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {trouble}; fetch the file again")


def _read_metadata(reader: _Reader, num_keys: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for _ in range(num_keys):
        key = reader.string(MAX_KEY_BYTES)
        if key in metadata:
            raise reader.refusal(f"holds the key '{key}' twice")
        metadata[key] = reader.value()
    return metadata


def _read_entries(reader: _Reader, num_tensors: int, alignment: Value) -> dict[str, Entry]:
    if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment < 8 or alignment % 8:
        raise reader.refusal(f"{ALIGNMENT_KEY} {alignment!r} must be a multiple of 8")
    entries: dict[str, Entry] = {}
    for _ in range(num_tensors):
        entry = _read_entry(reader, alignment)
        if entry.name in entries:
            raise reader.refusal(f"holds tensor '{entry.name}' twice")
        entries[entry.name] = entry
    start = _aligned(reader.place, alignment)
    placed = {name: entry._replace(offset=start + entry.offset) for name, entry in entries.items()}
    end, before = start, ""
    for entry in sorted(placed.values(), key=lambda entry: entry.offset):
        if entry.offset < end:
            raise reader.refusal(f"tensors '{before}' and '{entry.name}' lie over each other")
        end, before = entry.offset + entry.num_bytes, entry.name
        if end > len(reader.data):
            raise reader.refusal(f"tensor '{entry.name}' ends at byte {end} of {len(reader.data)}: truncated")
    return placed


def _read_entry(reader: _Reader, alignment: int) -> Entry:
    name = reader.string(MAX_NAME_BYTES)
    num_axes = reader.number("<I")
    if not 1 <= num_axes <= MAX_AXES:
        raise reader.refusal(f"tensor '{name}' has {num_axes} axes; 1 to {MAX_AXES} are allowed")
    shape = tuple(reader.number("<Q") for _ in range(num_axes))[::-1]  # GGUF has the inputs first
    code, offset = reader.number("<I"), reader.number("<Q")
    if code not in KIND_OF:
        known = ", ".join(KINDS)
        raise reader.refusal(f"tensor '{name}' is of type {code}, which fledge does not read: known are {known}")
    if offset % alignment:
        raise reader.refusal(f"tensor '{name}' lies at {offset}, which is no multiple of {alignment}")
    kind = KIND_OF[code]
    if min(shape) < 1 or shape[-1] % kind.per_block:
        raise reader.refusal(f"tensor '{name}' of shape {shape} is no whole number of {kind.name} blocks")
    return Entry(name, kind, shape, offset, kind.num_bytes(math.prod(shape)))  # Python's integers do not overflow


def _aligned(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment


# Writing.


class Typed(NamedTuple):
    """A metadata value with the type it is to be written as, a code of SCALARS or STRING."""

    code: int
    value: Value


class Outgoing(NamedTuple):
    """A tensor to write in the format `kind`; `numbers` makes it when its turn comes. `Blocks` stay as they are."""

    name: str
    shape: tuple[int, ...]
    kind: str
    numbers: Callable[[], Tensor | Blocks]


def write_gguf(path: Path, metadata: Mapping[str, Value], tensors: Sequence[Outgoing]) -> None:
    """Write a file, whole or not at all, holding one tensor at a time.

    `metadata` values are strings, booleans, ints (uint32), floats (float32), sequences of one of these, or `Typed`.
    Only formats in `WRITTEN` can be written. `CheckpointError` for numbers that the format cannot hold, and for rows
    that are no whole number of blocks.
    """
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata)))
    for key, value in metadata.items():
        header += _string(key) + _typed(_with_type(value))
    offset = 0
    for tensor in tensors:
        kind = _writable(tensor)
        header += _string(tensor.name) + struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape[::-1])
        header += struct.pack("<IQ", kind.code, offset)
        offset += _aligned(kind.num_bytes(math.prod(tensor.shape)), ALIGNMENT)

    def fill(temporary: Path) -> None:
        with temporary.open("wb") as file:
            _write_padded(file, header)
            for tensor in tensors:
                _write_padded(file, _packed(tensor))

    write_file(path, fill)


def _writable(tensor: Outgoing) -> Kind:
    if tensor.kind not in WRITTEN:
        raise CheckpointError(f"fledge does not write {tensor.kind}; it writes {', '.join(WRITTEN)}")
    kind = KINDS[tensor.kind]
    if tensor.shape[-1] % kind.per_block:
        raise CheckpointError(
            f"'{tensor.name}' cannot be written as {kind.name}: its rows of {tensor.shape[-1]} are no whole number of "
            f"blocks of {kind.per_block}; write F32, F16 or BF16"
        )
    return kind


def _packed(tensor: Outgoing) -> NDArray[np.uint8]:
    numbers, kind = tensor.numbers(), KINDS[tensor.kind]
    if isinstance(numbers, Blocks):
        assert numbers.kind == tensor.kind, tensor.name
        return np.ascontiguousarray(pack_blocks(numbers)).reshape(-1)
    assert kind.shrink is not None
    assert tuple(numbers.shape) == tensor.shape, tensor.name
    data = kind.shrink(numbers.detach().to("cpu", torch.float32).contiguous().numpy().reshape(-1, kind.per_block))
    with np.errstate(invalid="ignore", over="ignore"):
        fits = np.isfinite(kind.expand(data.reshape(-1, kind.block_bytes))).all()
    if not fits:
        raise CheckpointError(f"'{tensor.name}' holds numbers that {kind.name} cannot hold; write F32 or BF16")
    return np.ascontiguousarray(data).reshape(-1)


def _with_type(value: Value) -> Typed:
    if isinstance(value, Typed):
        return value
    for types, code in (((bool,), BOOL), ((str,), STRING), ((int,), UINT32), ((float,), FLOAT32)):
        if isinstance(value, types):
            return Typed(code, value)
    assert isinstance(value, Sequence), f"no GGUF type for {value!r}"
    return Typed(_with_type(value[0]).code if value else STRING, value)


def _typed(typed: Typed) -> bytes:
    if isinstance(typed.value, str) or not isinstance(typed.value, Sequence):
        return struct.pack("<I", typed.code) + _plain(typed.code, typed.value)
    head = struct.pack("<IIQ", ARRAY, typed.code, len(typed.value))
    return head + b"".join(_plain(typed.code, item) for item in typed.value)


def _plain(code: int, value: Value) -> bytes:
    return _string(value) if code == STRING else struct.pack(SCALARS[code][0], value)


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _write_padded(file: BinaryIO, data: bytearray | NDArray[np.uint8]) -> None:
    file.write(memoryview(data))  # type: ignore[arg-type]  # numpy's stubs leave the buffer protocol out
    file.write(b"\0" * (-len(data) % ALIGNMENT))
