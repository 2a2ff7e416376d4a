"""A folder with a description and tensors, which is replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import save

from jdelta import parsing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_T = TypeVar("_T")

CONFIG = "delta_config.json"
TENSORS = "delta.safetensors"
CARD = "README.md"
MARK = "<!-- Written by jdelta. Remove this line, and it will not be overwritten. -->"


def files(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], card: str) -> dict[str, bytes]:
    """What a folder with a delta holds: name to content."""
    data = save(dict(tensors), metadata={"format": "jdelta"})
    text = json.dumps({**config, "sha256": hashlib.sha256(data).hexdigest()}, indent=2) + "\n"
    return {TENSORS: data, CONFIG: text.encode(), CARD: f"{card}\n{MARK}\n".encode()}


def write(
    folder: str | os.PathLike[str], config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], card: str
) -> None:
    """Writes `delta_config.json`, `delta.safetensors` and `README.md`.

    Whatever happens meanwhile, a power failure or another writer too, `read` then gives what was there before or all
    of the new. In a folder that is there, the new tensors come under a name made of their checksum; the description
    that asks for this checksum replaces the old one, which is the moment of change; and then the tensors get their own
    name. Other files there stay, and so does a `README.md` without jdelta's mark.

    Raises:
      OSError: as `replace`. Nothing has changed then.
    """
    new = files(config, tensors, card)
    checksum = hashlib.sha256(new[TENSORS]).hexdigest()

    def swap(beside: Path, target: Path) -> None:
        staged = target / _staged(checksum)
        os.replace(beside / TENSORS, staged)
        sync(target)
        try:
            os.replace(beside / CONFIG, target / CONFIG)
        except OSError:
            staged.unlink()
            raise
        sync(target)
        os.replace(staged, target / TENSORS)
        if (beside / CARD).exists():
            os.replace(beside / CARD, target / CARD)
        for left in target.glob(f".{'[0-9a-f]' * 16}.safetensors"):
            left.unlink()

    if not _may_replace(Path(folder) / CARD):
        del new[CARD]
    replace(folder, new, swap)


def read(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray], bool]:
    """The description, the tensors, and whether these are, bit for bit, those that were written with it.

    Raises:
      FileNotFoundError: there is no such folder, or no delta in it.
      ValueError: a file is no JSON object, or no whole safetensors file.
    """
    source = Path(folder)
    return steadily(source, lambda: _read(source))


def _read(source: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], bool]:
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


def _may_replace(card: Path) -> bool:
    """Whether a file is a model card by jdelta, or there is none."""
    try:
        return not card.is_file() or MARK in card.read_text("utf-8", "replace")
    except PermissionError:
        return False


# --- what folders in any format need


def replace(folder: str | os.PathLike[str], new: Mapping[str, bytes], swap: Callable[[Path, Path], None]) -> None:
    """Puts files into a folder. They are written beside it first; a folder that is not there appears as a whole.

    Writers of one folder take turns, by a lock that a process loses with its life; what one that was killed has left,
    the next removes. A file keeps the mode that it had. A link to a folder is followed; a link in place of a file is
    replaced by the file.

    Args:
      folder: the folder. What leads to it is made, also where a link points.
      new: name to content.
      swap: of the folder with the new files and a folder that is there: moves those into this, by `os.replace`. It
        has to undo what it did when it raises.

    Raises:
      NotADirectoryError: the path is a file, or leads through one.
      IsADirectoryError: in place of one of the files there is a folder.
      TimeoutError: another writer does not end.
      OSError: no permission, no space. In all cases nothing has changed.
    """
    target = _resolved(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _turn(target) as within:
        for name in new:
            if (target / name).is_dir():
                raise IsADirectoryError(f"{target / name} is a folder, where a file is to be written. Move it away.")
        beside = within / f"{_BESIDE}{uuid.uuid4().hex[:8]}"
        beside.mkdir()
        try:
            for name, data in new.items():
                write_durably(beside / name, data)
                with contextlib.suppress(FileNotFoundError):
                    os.chmod(beside / name, stat.S_IMODE(os.stat(target / name).st_mode))
            sync(beside)
            if within == target:
                swap(beside, target)
            else:
                os.rename(beside, target)
            sync(within)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


_BESIDE = ".jdelta."  # what a writer makes in a folder whose turn it has
_PATIENCE = 600.0  # seconds


def _resolved(folder: str | os.PathLike[str]) -> Path:
    """The path behind all links, also where they point at nothing yet. Raises if it cannot be a folder."""
    target = Path(os.path.realpath(folder))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(folder))
    there = next(path for path in (target, *target.parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file. Name a folder to save in.")
    return target


@contextlib.contextmanager
def _turn(target: Path) -> Iterator[Path]:
    """Waits for a writer's turn at a folder: the lock of the folder, or of its parent while it is not there.

    Where the system has no such locks (Windows, some network file systems) there are no turns, and nothing is removed.

    Returns:
      The one of them that is locked. Nobody else has a folder named `.jdelta.*` in it now.
    """
    end = time.monotonic() + _PATIENCE
    while True:
        within = target if target.is_dir() else target.parent
        with _locked(within, end) as locked:
            if within == (target if target.is_dir() else target.parent):  # nobody made it, or took it away, meanwhile
                for left in within.glob(f"{_BESIDE}*") if locked else ():
                    shutil.rmtree(left, ignore_errors=True)
                yield within
                return


@contextlib.contextmanager
def _locked(folder: Path, end: float) -> Iterator[bool]:
    """Holds the lock of a folder, if there are locks here."""
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        locked = True
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError(f"another process has been writing in {folder} for minutes.") from None
                time.sleep(0.005)
            except OSError:
                locked = False
                break
        yield locked
    finally:
        os.close(descriptor)


def steadily(source: Path, read: Callable[[], _T]) -> _T:
    """What `read` gives of the files of a folder, or raises, when no writer has changed them meanwhile."""
    for _ in range(100):
        before, failure = _state(source), None
        try:
            found = read()
        except (OSError, ValueError) as error:
            failure = error
        if _state(source) == before:
            break
        time.sleep(0.005)
    if failure is not None:
        raise failure
    return found


def left_ready(source: Path, names: Collection[str]) -> Path:
    """The folder, or, if a writer died within its `swap`, or is there now, the one beside with all of these files."""
    beside = (path for path in source.glob(f"{_BESIDE}*") if all((path / name).is_file() for name in names))
    return next(beside, source)


def _state(source: Path) -> set[tuple[str, int, int, int]]:
    """What tells the JSON and safetensors files of a folder from others of the same names."""
    try:
        with os.scandir(source) as entries:
            files = [entry for entry in entries if entry.name.endswith((".json", ".safetensors"))]
            return {(file.name, (s := file.stat()).st_ino, s.st_mtime_ns, s.st_size) for file in files}
    except OSError:
        return set()


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


def twin(file: Path, other: Path) -> None:
    """Gives a file a second name, or a copy where the file system has no such thing."""
    try:
        os.link(file, other)
    except OSError:
        write_durably(other, file.read_bytes())


def sync(folder: Path) -> None:
    """Makes renamings in a folder last; where the system has no such thing, they are left to it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
