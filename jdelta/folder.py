"""A folder with a description and tensors, which is replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

CONFIG = "delta_config.json"
TENSORS = "delta.safetensors"
CARD = "README.md"
MARK = "<!-- Written by jdelta. Remove this line, and it will not be overwritten. -->"


# Those of the format; safetensors' own reader for NumPy does not know the last three.
_DTYPES: dict[str, Any] = {
    "BOOL": np.bool_,
    **{f"I{bits}": np.dtype(f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": np.dtype(f"uint{bits}") for bits in (8, 16, 32, 64)},
    **{f"F{bits}": np.dtype(f"float{bits}") for bits in (16, 32, 64)},
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
}


def write(
    folder: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], card: str
) -> None:
    """Writes `delta_config.json`, `delta.safetensors` and `README.md`.

    Whatever happens meanwhile, a power failure too, `read` then gives what was there before or all of the new.
    Everything is written beside the folder first. Then a new folder appears by one renaming. In a folder that is there,
    the new tensors come under a name made of their checksum; the description that asks for this checksum replaces the
    old one, which is the moment of change; and then the tensors get their own name. Other files there stay, and so
    does a `README.md` without jdelta's mark.

    Raises:
      NotADirectoryError: the path is a file.
      OSError: no permission, no space. Nothing has changed then.
    """
    target = Path(folder)
    data = save(dict(tensors), metadata={"format": "jdelta"})
    checksum = hashlib.sha256(data).hexdigest()
    text = json.dumps({**config, "sha256": checksum}, indent=2) + "\n"
    files = {TENSORS: data, CONFIG: text.encode(), CARD: f"{card}\n{MARK}\n".encode()}
    with prepared(target, files) as new:
        if not target.exists():
            return
        staged = target / _staged(checksum)
        os.replace(new / TENSORS, staged)
        sync(target)
        os.replace(new / CONFIG, target / CONFIG)
        sync(target)
        os.replace(staged, target / TENSORS)
        if not (target / CARD).exists() or MARK in (target / CARD).read_text("utf-8", "replace"):
            os.replace(new / CARD, target / CARD)
        for left in target.glob(_staged("*")):
            left.unlink()


def read(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray], bool]:
    """The description, the tensors, and whether these are, bit for bit, those that were written with it.

    Raises:
      FileNotFoundError: there is no such folder, or no delta in it.
      ValueError: a file is no JSON object, or no whole safetensors file.
    """
    source = Path(folder)
    if not (source / CONFIG).is_file():
        raise FileNotFoundError(f"{source} holds no saved delta: {CONFIG} is missing; {found_in(source)}.")
    config = parse_object(source / CONFIG)
    checksum = str(config.get("sha256"))
    data = b""
    for file in (source / TENSORS, source / _staged(checksum)):  # staged: the writer died at the last step
        if file.is_file():
            data = file.read_bytes()
            if hashlib.sha256(data).hexdigest() == checksum:
                return config, parse_tensors(file, data), True
    if not (source / TENSORS).is_file():
        raise FileNotFoundError(f"{source} holds no saved delta: {TENSORS} is missing.")
    return config, parse_tensors(source / TENSORS, (source / TENSORS).read_bytes()), False


def _staged(checksum: str) -> str:
    return f".{checksum[:16]}.safetensors"


# --- what folders in any format need


@contextlib.contextmanager
def prepared(target: Path, files: Mapping[str, bytes]) -> Iterator[Path]:
    """Writes files beside a folder before anything changes; what is not moved into it within the context, is removed.

    If the folder is not there, what was written becomes it at the end, by one renaming.

    Args:
      target: the folder.
      files: name to content.

    Returns:
      The folder with the files, on the same file system.

    Raises:
      NotADirectoryError: `target` is a file.
    """
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file. Name a folder to save in.")
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = (target if target.is_dir() else target.parent) / f".{target.name}.{uuid.uuid4().hex[:8]}"
    beside.mkdir()
    try:
        for name, data in files.items():
            write_durably(beside / name, data)
        yield beside
        if target.exists():
            sync(target)
        else:
            os.rename(beside, target)
        sync(target.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def found_in(source: Path) -> str:
    """What a folder holds, for messages about what it lacks."""
    if not source.is_dir():
        return "there is no such folder"
    return f"it holds {', '.join(sorted(path.name for path in source.iterdir())) or 'nothing'}"


def parse_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `ValueError` if there is none."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON file: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no JSON object, but {type(found).__name__}.")
    return found


def parse_tensors(file: Path, data: bytes) -> dict[str, np.ndarray]:
    """Name to array, by name, from the bytes of the safetensors file `file`. Raises `ValueError` if they are none."""
    try:
        return {
            name: np.frombuffer(found["data"], _DTYPES[found["dtype"]]).reshape(found["shape"])
            for name, found in sorted(deserialize(data), key=lambda item: item[0])  # it has them in any order
        }
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no whole safetensors file ({len(data):,} bytes): {error}") from error


def write_durably(file: Path, data: bytes) -> None:
    """Writes a file, and returns when it is on the disk."""
    with open(file, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def sync(folder: Path) -> None:
    """Makes renamings in a folder last; where the system has no such thing, they are left to it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
