"""A folder with a description and tensors, which is replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from safetensors.numpy import save

from jdelta.core import parsing
from jdelta.core.warn import warn

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
    of the new. Other files there stay, and so does a `README.md` without jdelta's mark.

    Raises:
      OSError: as `replace`. Nothing has changed then.
    """
    new = files(config, tensors, card)
    if not _may_replace(Path(folder) / CARD):
        del new[CARD]
    replace(folder, new, CONFIG)


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
        source = left_ready(source, CONFIG)
    if not (source / CONFIG).is_file():
        raise FileNotFoundError(f"{source} holds no saved delta: {CONFIG} is missing; {found_in(source)}.")
    config = parsing.json_object(source / CONFIG)
    if not (source / TENSORS).is_file():
        raise FileNotFoundError(f"{source} holds no saved delta: {TENSORS} is missing.")
    leaves = config.get("leaves")
    limit = parsing.header_limit(leaves if isinstance(leaves, dict) else ())
    tensors, checksum = parsing.tensors(source / TENSORS, limit)
    return config, tensors, checksum == config.get("sha256")


def _may_replace(card: Path) -> bool:
    """Whether a file is a model card by jdelta, or there is none."""
    try:
        return not card.is_file() or MARK in card.read_text("utf-8", "replace")
    except PermissionError:
        return False


# --- what folders in any format need


def replace(folder: str | os.PathLike[str], new: Mapping[str, bytes], description: str) -> None:
    """Puts files into a folder, all or none. One that is not there appears as a whole.

    They are written to a folder beside them first, `.jdelta.…`. Then the old description goes, the other files are
    replaced, and the new description comes. So no program takes what is between for a delta; if this one dies there,
    `left_ready` has all of the new, and the next save goes on from it.

    Writers of one folder take turns, by a lock that a process loses with its life; what one that was killed has left,
    the next removes. A file keeps the mode that it had. A link to a folder is followed; a link in place of a file is
    replaced by the file.

    Args:
      folder: the folder. What leads to it is made, also where a link points.
      new: name to content.
      description: which of them makes the folder a delta. It is a `.json`.

    Raises:
      NotADirectoryError: the path is a file, or leads through one.
      IsADirectoryError: in place of one of the files there is a folder.
      TimeoutError: another writer does not end.
      OSError: no permission, no space. In all cases nothing has changed.
    """
    target = _resolved(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _turn(target) as beside:
        for name in new:
            if (target / name).is_dir():
                raise IsADirectoryError(f"{target / name} is a folder, where a file is to be written. Move it away.")
        beside.mkdir()
        try:
            for name, data in new.items():
                write_durably(beside / name, data)
                with contextlib.suppress(FileNotFoundError):
                    os.chmod(beside / name, stat.S_IMODE(os.stat(target / name).st_mode))
            sync(beside)
            if beside.parent == target:
                _swap(beside, target, description, [name for name in new if name != description])
            else:
                os.rename(beside, target)
                sync(target.parent)
        finally:
            if not _is_between(beside, target):
                shutil.rmtree(beside, ignore_errors=True)


_BESIDE = ".jdelta."  # how names begin of what a writer makes, and removes
_OLD, _NEW = "old.", "new."  # second names, beside, of files that are replaced and of those that replace them
_PATIENCE = 600.0  # seconds


def _swap(beside: Path, target: Path, description: str, others: Collection[str]) -> None:
    """Moves files into the folder; if it raises, whatever it is, the folder is as it was."""
    for name in (*others, description):
        _twin(beside / name, beside / f"{_NEW}{name}")
        if os.path.lexists(target / name):
            _twin(target / name, beside / f"{_OLD}{name}")
    sync(beside)
    try:
        (target / description).unlink(missing_ok=True)
        sync(target)
        for name in others:
            os.replace(beside / f"{_NEW}{name}", target / name)
        sync(target)
        os.replace(beside / f"{_NEW}{description}", target / description)
        sync(target)
    except BaseException:
        (target / description).unlink(missing_ok=True)
        for name in (*others, description):
            if os.path.lexists(beside / f"{_OLD}{name}"):
                os.replace(beside / f"{_OLD}{name}", target / name)
            else:
                (target / name).unlink(missing_ok=True)
        raise


def left_ready(source: Path, description: str) -> Path:
    """The folder, or, if a writer is between its old description and the new or died there, the one with the new."""
    return next((beside for beside in source.glob(f"{_BESIDE}*") if _is_between(beside, source, description)), source)


def _is_between(beside: Path, target: Path, description: str = "") -> bool:
    """Whether the folder's description, of this or any name, is gone, and all of the new is beside."""
    old = [path.name.removeprefix(_OLD) for path in beside.glob(f"{_OLD}*.json")]
    return any(name == (description or name) and not os.path.lexists(target / name) for name in old)


def _clear(within: Path, key: str) -> None:
    """Removes what writers left that are dead, or finishes it; by one whose turn it is.

    A folder of another machine is left for a day: on some network file systems locks do not reach so far.
    """
    for left in within.glob(f"{_BESIDE}{key}{'[0-9a-f]' * 16}"):
        if not left.name.startswith(f"{_BESIDE}{key}{_HERE}") and time.time() - left.stat().st_mtime < 24 * 3600:
            continue
        if _is_between(left, within):
            new = [path for path in left.iterdir() if not path.name.startswith((_OLD, _NEW))]
            for path in sorted(new, key=lambda path: path.suffix == ".json"):
                again = left / f"{_NEW}{path.name}"
                again.unlink(missing_ok=True)
                _twin(path, again)
                os.replace(again, within / path.name)
                sync(within)
        shutil.rmtree(left, ignore_errors=True)


def _digest(name: str) -> str:
    """Eight letters for a name of any length."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _resolved(folder: str | os.PathLike[str]) -> Path:
    """The path behind all links, also where they point at nothing yet. Raises if it cannot be a folder."""
    target = Path(os.path.realpath(folder))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(folder))
    there = next(path for path in (target, *target.parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{there} is a file. Name a folder to save in.")
    return target


_HERE = _digest(platform.node())


@contextlib.contextmanager
def _turn(target: Path) -> Iterator[Path]:
    """Waits for a writer's turn at a folder, and gives a name for what is to be made beside its files.

    That is a name in the folder, or in its parent while it is not there. Where the system has no locks (some network
    file systems, of which it warns, and Windows) there are no turns, and nothing is removed.
    """
    end, key = time.monotonic() + _PATIENCE, f"{_digest(target.name)}."
    while True:
        within, of = (target, "") if target.is_dir() else (target.parent, key)
        with _locked(within / f"{_BESIDE}{of}lock", end) as locked:
            if (within == target) == target.is_dir():  # nobody made it, or took it away, meanwhile
                if locked:
                    _clear(within, of)
                if within == target and (made := target.parent / f"{_BESIDE}{key}lock").exists():
                    with contextlib.suppress(OSError), _locked(made, end) as locked:  # its maker died, or soon ends
                        if locked:
                            _clear(target.parent, key)
                yield within / f"{_BESIDE}{of}{_HERE}{uuid.uuid4().hex[:8]}"
                return


@contextlib.contextmanager
def _locked(file: Path, end: float) -> Iterator[bool]:
    """Holds the lock of this name, if there are locks here. It is a file, as other machines see no lock of a folder."""
    while fcntl is not None:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with contextlib.suppress(OSError):  # it is another user's
                os.fchmod(descriptor, 0o666)  # so that others may take it up when its writer is killed
            locked = _lock(descriptor, file, end)
            if _is_open(file, descriptor):  # not removed by the one before
                try:
                    yield locked
                finally:
                    with contextlib.suppress(OSError):  # the save is done
                        file.unlink()
                return
        finally:
            os.close(descriptor)
    yield False


def _is_open(file: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _lock(descriptor: int, file: Path, end: float) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end:
                raise TimeoutError(f"another process has been writing in {file.parent} for minutes.") from None
            time.sleep(0.005)
        except OSError as error:
            warn(f"{file.parent} has no locks ({error}): let one program at a time save there.")
            return False


def steadily(source: Path, read: Callable[[], _T]) -> _T:
    """What `read` gives of the files of a folder, or raises, when no writer has changed them meanwhile."""
    for _ in range(100):
        before, failure = _state(source), None
        try:
            found = read()
        except (OSError, ValueError) as error:
            failure = error
        if _state(source) == before:
            if failure is not None:
                raise failure
            return found
        time.sleep(0.005)
    raise TimeoutError(f"{source} is written all the time, and cannot be read.")


def _state(source: Path) -> set[tuple[str, int, int, int]]:
    """What tells the JSON and safetensors files of a folder from others of the same names."""
    found = set()
    for file in source.glob("*.*"):
        if file.suffix in (".json", ".safetensors"):
            with contextlib.suppress(OSError):
                status = file.stat()
                found.add((file.name, status.st_ino, status.st_mtime_ns, status.st_size))
    return found


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


def _twin(file: Path, other: Path) -> None:
    """Gives a file a second name, or a copy where the file system has no such thing."""
    try:
        os.link(file, other)
    except OSError:
        write_durably(other, file.read_bytes())
        shutil.copymode(file, other)


def sync(folder: Path) -> None:
    """Makes renamings in a folder last; where the system has no such thing, they are left to it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
