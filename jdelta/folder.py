"""A folder with a description and tensors, which is replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from jdelta import parsing

CONFIG = "delta_config.json"
TENSORS = "delta.safetensors"
CARD = "README.md"
MARK = "<!-- Written by jdelta. Remove this line, and it will not be overwritten. -->"


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
    config = parsing.json_object(source / CONFIG)
    checksum, leaves = str(config.get("sha256")), config.get("leaves")
    limit = parsing.header_limit(leaves if isinstance(leaves, dict) else ())
    found: list[dict[str, np.ndarray]] = []
    failed: list[ValueError] = []
    files = [source / TENSORS]
    if re.fullmatch(r"[0-9a-f]{64}", checksum):
        files.append(source / _staged(checksum))  # the writer died at the last step
    for file in files:
        if file.is_file():
            try:
                tensors, have = parsing.tensors(file, limit)
            except ValueError as error:
                failed.append(error)
                continue
            if have == checksum:
                return config, tensors, True
            found.append(tensors)
    if failed:
        raise failed[0]
    if not found:
        raise FileNotFoundError(f"{source} holds no saved delta: {TENSORS} is missing.")
    return config, found[0], False


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
