"""JSON and safetensors files that anybody may have written: read with bounded work, and whole or not at all."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

MOST_TEXT = 2**24  # bytes of a JSON file; the description of a model of 100,000 leaves has some ten million
DEEPEST = 20  # levels of a JSON file

_DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


# --- JSON


def json_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      ValueError: there is none, or it is one that programs read in different ways, as `parsed` says. The message names
        the file.
    """
    size = file.stat().st_size
    if size > MOST_TEXT:
        raise ValueError(f"{file} has {size:,} bytes, and is no description of a delta: {MOST_TEXT:,} are the most.")
    try:
        found = parsed(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON file that can be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object, but {type(found).__name__}.")
    return found


def parsed(text: str | bytes) -> Any:
    """What JSON says, where that is the same for all programs.

    Raises:
      ValueError: it is no JSON in UTF-8, a key is there twice, a number is none of 64 bits, text is no Unicode, or it
        is nested deeper than 20 levels. The message names the field.
    """
    try:
        found = _loaded(text)
        _require_plain(found, ())
        return found
    except RecursionError:
        raise ValueError(f"it is nested deeper than {DEEPEST} levels.") from None


def _loaded(text: str | bytes) -> Any:
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not in UTF-8: {error.reason} at byte {error.start}.") from error
    return json.loads(text, parse_int=_whole_number, object_pairs_hook=_without_doubles)


def _whole_number(digits: str) -> float:
    return int(digits) if len(digits) < 25 else math.inf  # Python converts no thousands of digits


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        double = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {double[:200]!r} is there twice.")
    return found


def _require_plain(value: Any, path: tuple[str, ...]) -> None:
    """Raises `ValueError` for values that JSON should not have, or nested too deeply."""
    if isinstance(value, dict | list):
        if len(path) >= DEEPEST:
            raise ValueError(f"{_field(path)} is nested deeper than {DEEPEST} levels.")
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if not _is_unicode(key) or not _is_unicode(item):
                raise ValueError(
                    f"{_field((*path, str(key)))} is no Unicode text: half of a pair of surrogates stands alone."
                )
            if not isinstance(item, str):
                _require_plain(item, (*path, str(key)))
    elif isinstance(value, float | int):
        if not (math.isfinite(value) and abs(value) <= (2**63 if isinstance(value, int) else math.inf)):
            raise ValueError(f"{_field(path)} is no finite number of 64 bits.")
    elif not _is_unicode(value):
        raise ValueError("it is no Unicode text: half of a pair of surrogates stands alone.")


def _field(path: tuple[str, ...]) -> str:
    return repr(".".join(path)[:200]) if path else "the whole"


def _is_unicode(value: Any) -> bool:
    """Whether it is no text, or text that can be encoded."""
    if not isinstance(value, str) or value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- safetensors


def header_limit(names: Iterable[str]) -> int:
    """How many bytes the header of a file with tensors of these names has at most, with room to spare."""
    return 2**16 + sum(300 + 2 * len(json.dumps(name)) for name in names)


def tensors(file: Path, limit: int) -> tuple[dict[str, np.ndarray], str]:
    """Name to array, by name, of a safetensors file; and the SHA-256 of the file.

    The header is read first: nothing is allocated for tensors that the file does not hold.

    Args:
      file: the file.
      limit: how many bytes the header may have.

    Raises:
      ValueError: it is no whole safetensors file: a header that is cut off, longer than the limit or unknown, tensors
        that overlap, leave gaps or reach beyond the file. The message names the file, and the tensor.
    """
    with open(file, "rb") as source:
        size = os.fstat(source.fileno()).st_size
        try:
            head = _head(source, size, limit)
            held = _held(_loaded(head[8:]), size - len(head))
            data = source.read()
            found = {name: _array(data, *held[name]) for name in sorted(held)}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is no whole safetensors file ({size:,} bytes): {error}") from error
    checksum = hashlib.sha256(head)
    checksum.update(data)
    return found, checksum.hexdigest()


def _head(source: BinaryIO, size: int, limit: int) -> bytes:
    """The length of the header, in 8 bytes, and the header."""
    first = source.read(8)
    length = int.from_bytes(first, "little")
    if len(first) < 8 or length > size - 8:
        raise ValueError("its header is cut off.")
    if length > limit:
        raise ValueError(f"its header has {length:,} bytes; for what is expected here, {limit:,} are the most.")
    return first + source.read(length)


def _held(header: Any, size: int) -> dict[str, tuple[np.dtype, tuple[int, ...], int]]:
    """The dtype, shape and offset of each tensor, by name; checked to fill `size` bytes without gaps and overlaps."""
    if not isinstance(header, dict):
        raise ValueError(f"its header is no JSON object, but {type(header).__name__}.")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its '__metadata__' is no object of texts.")
    held, spans = {}, []
    for name, entry in header.items():
        if not isinstance(entry, Mapping) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"the header's entry of {name!r} is not its dtype, shape and data_offsets.")
        word, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(word, str) or word not in _DTYPES:
            raise ValueError(f"{name!r} has dtype {word!r}. Known are {', '.join(_DTYPES)}.")
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            raise ValueError(f"{name!r} has shape {shape!r} and data_offsets {offsets!r}, which are none.")
        dtype = np.dtype(_DTYPES[word])
        if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
            raise ValueError(
                f"{name!r} of {word}{shape} does not have the {offsets[1] - offsets[0]:,} bytes of its own."
            )
        held[name] = (dtype, tuple(shape), offsets[0])
        spans.append((*offsets, name))
    spans.sort()
    for (_, end, before), (start, _, name) in itertools.pairwise([(0, 0, ""), *spans, (size, size, "")]):
        if start != end:
            what = "overlap" if start < end else "have a gap between them"
            pair = " and ".join(repr(one) if one else "the file's bounds" for one in (before, name))
            raise ValueError(f"{pair} {what}: one ends at byte {end:,}, the next begins at {start:,}.")
    return held


def _are_sizes(found: Any) -> bool:
    return isinstance(found, list) and all(type(size) is int and size >= 0 for size in found)


def _array(data: bytes, dtype: np.dtype, shape: tuple[int, ...], start: int) -> np.ndarray:
    end = start + math.prod(shape) * dtype.itemsize
    return np.frombuffer(data[start:end], dtype).reshape(shape)  # a copy, aligned
