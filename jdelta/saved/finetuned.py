"""A trained delta without its model, in memory or in a folder."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence, Set
from typing import Any, Literal, Protocol, Self, runtime_checkable

import numpy as np

from jdelta.core.config import as_path, as_type, config_from_dict, did_you_mean, require_name, shown
from jdelta.core.method import Method
from jdelta.core.warn import warn
from jdelta.saved import folder
from jdelta.trees import fingerprint
from jdelta.version import __version__

FORMAT = 2  # 1 has no checksum of the description: a change there that makes sense is not noticed
LIBRARIES = ("jax", "flax", "transformers")


@dataclasses.dataclass(frozen=True)
class BackboneInfo:
    """Which backbone a delta was trained on.

    Attributes:
      kind: the class of the model.
      name: the folder or repository of the Hub that it was loaded from; `""` if unknown.
      leaves: the fingerprint of its frozen leaves, `fingerprint.fingerprint`.
    """

    kind: str
    name: str = ""
    leaves: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Finetuned:
    """A trained delta without its model: `delta.finetuned()` returns it, `from_finetuned` attaches it.

        found = jdelta.Finetuned.read("movies/")
        found.values["classifier.kernel"].shape  # (768, 2)
        delta = jdelta.AutoDeltaModel.from_finetuned(found, backbone_model=model)

    Attributes:
      name: the delta's name in the tree.
      config: the method's arguments.
      values: dot-joined name to array: the delta's own leaves, and what else trained, such as a classifier head.
      targets: the names of the modules that it is attached at.
      exclude: the argument of `freeze_module`; `None` if it was not called.
      inserted: names of modules where a layer of the user's own was inserted, which no configuration describes.
      backbone: the model that it was trained on, if known.
      own: which of the values are the delta's own leaves, if these are not exactly those below its name at one of its
        modules or at the root of the tree.
    """

    name: str
    config: Method
    values: Mapping[str, np.ndarray]
    targets: Sequence[str]
    exclude: Sequence[str] | None = None
    inserted: Sequence[str] = ()
    backbone: BackboneInfo | None = None
    own: frozenset[str] | None = None

    def __post_init__(self) -> None:
        require_name(self.name)
        hosts = self._hosts()
        if self.own == {leaf for leaf in self.values if self._place(leaf, hosts) is not None}:
            object.__setattr__(self, "own", None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a folder, as `DeltaModel.save_finetuned` does.

            jdelta.negate("toxic/").save("opposite/")

        Args:
          path: the folder.
        """
        folder.write(as_path("save", path), self._description(), self.values, card(self))

    def files(self) -> dict[str, bytes]:
        """Returns the files that `save` writes: name to content."""
        return folder.files(self._description(), self.values, card(self))

    def checksum(self) -> str:
        """Returns a checksum of the values and their description."""
        values = {name: fingerprint.digest(value) for name, value in sorted(self.values.items())}
        return _checksum({**self._description(), "values": values})

    def _description(self) -> dict[str, Any]:
        arguments = self.config.to_dict()
        description = {
            "jdelta_format": FORMAT,
            "delta_type": arguments.pop("delta_type"),
            "name": self.name,
            "arguments": arguments,
            "targets": list(self.targets),
            "exclude": None if self.exclude is None else list(self.exclude),
            "inserted": list(self.inserted),
            "leaves": {key: fingerprint.kind(value) for key, value in sorted(self.values.items())},
            "versions": _versions(),
            "backbone": None if self.backbone is None else dataclasses.asdict(self.backbone),
        }
        if self.own is not None:
            description["own"] = sorted(self.own)
        description["description_sha256"] = _checksum(description)
        return description

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what `save` wrote.

            found = jdelta.Finetuned.read("movies/")

        A checksum covers the tensors and the description. In folders of earlier versions, of format 1, it covers the
        tensors only: a changed description is an error where it is invalid or does not fit the tensors.

        Args:
          path: the folder.

        Raises:
          FileNotFoundError: the folder does not exist, or there is no delta in it.
          ValueError: a file is damaged, was changed, or is from a newer jdelta. The message names the file and field.
        """
        path = as_path("read", path)
        description, values, intact = folder.read(path)
        where = f"{os.fspath(path)}/{folder.CONFIG}"
        try:
            fields = _fields(description)
            require_name(fields["name"])
            config = _config(fields)
            backbone, own = fields["backbone"], fields.get("own")
            if backbone is not None:
                backbone = BackboneInfo(**_typed(backbone, _BACKBONE, "backbone."))
            if own is not None and not {*own} <= values.keys():
                raise ValueError(f"own is a list of names of leaves, got {shown(own)}.")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        _check(fields["leaves"], values, f"{os.fspath(path)}/{folder.TENSORS}", intact)
        if fields["jdelta_format"] > 1 and fields["description_sha256"] != _checksum(description):
            raise ValueError(
                f"{where} was changed after it was saved: its checksum is another. Take the original, or save it again."
            )
        return cls(
            fields["name"],
            config,
            values,
            fields["targets"],
            fields["exclude"],
            fields["inserted"],
            backbone,
            None if own is None else frozenset(own),
        )

    def is_own(self, name: str) -> bool:
        """Whether a leaf is one of the delta's own, and not of the backbone's.

        Args:
          name: the dot-joined name of the leaf.
        """
        return self._place(name, self._hosts()) is not None if self.own is None else name in self.own

    def renamed(self, name: str) -> Self:
        """Returns the same delta with another name in the tree.

        Args:
          name: the new name.

        Raises:
          ValueError: a delta cannot have that name.
        """
        require_name(name)
        hosts = self._hosts()
        places = {leaf: self._place(leaf, hosts) for leaf in self.values if self.own is None or leaf in self.own}
        new = {leaf: _renamed(leaf, place, name) for leaf, place in places.items() if self.own or place is not None}
        values = {new.get(leaf, leaf): value for leaf, value in self.values.items()}
        own = frozenset(new.values())
        return dataclasses.replace(self, name=name, values=values, own=own)

    def _hosts(self) -> set[str]:
        return {"", *self.targets}

    def _place(self, leaf: str, hosts: Set[str]) -> int | None:
        """Where in a leaf's path the delta's name is: after a host, the longest, or at the root. `None`: nowhere."""
        parts = leaf.split(".")
        places = [i for i, part in enumerate(parts[:-1]) if part == self.name and ".".join(parts[:i]) in hosts]
        return places[-1] if places else None


def _renamed(leaf: str, place: int | None, name: str) -> str:
    parts = leaf.split(".")
    return leaf if place is None else ".".join([*parts[:place], name, *parts[place + 1 :]])


def _config(fields: Mapping[str, Any]) -> Method:
    """The arguments. Earlier versions lack those that came since, with the defaults."""
    arguments = fields["arguments"]
    if "delta_type" in arguments:
        raise ValueError("the key 'arguments.delta_type' is unknown.")
    config = config_from_dict({"delta_type": fields["delta_type"], **arguments})
    missing = {field.name for field in dataclasses.fields(config)} - arguments.keys()
    if missing and fields["versions"].get("jdelta") == __version__:
        raise ValueError(f"the argument {min(missing)!r} is missing.")
    return config


def _check(listed: Mapping[str, str], values: Mapping[str, np.ndarray], file: str, intact: bool) -> None:
    """Raises `ValueError` unless the tensors are those that were saved."""
    odd = [f"{name} does not belong there" for name in sorted(values.keys() - listed.keys())]
    odd += [f"{name} is missing" for name in sorted(listed.keys() - values.keys())]
    both = sorted(listed.keys() & values.keys())
    odd += [
        f"{n} is {fingerprint.kind(values[n])}, not {listed[n]}"
        for n in both
        if fingerprint.kind(values[n]) != listed[n]
    ]
    if odd:
        raise ValueError(f"{file} is not what {folder.CONFIG} describes: {listing(odd)}.")
    if not intact:
        raise ValueError(
            f"{file} was changed after it was saved: its checksum is another. Take the original, or save it again."
        )


@runtime_checkable
class HasFinetuned(Protocol):
    """An attached delta."""

    def finetuned(self) -> Finetuned:
        """The trained delta apart from the model."""
        ...


def listing(items: Sequence[str], most: int = 3) -> str:
    """The first few of many, the start of each, and how many more there are."""
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(item if len(item) < 500 else f"{item[:400]}…" for item in items[:most]) + more


_FIELDS: dict[str, Any] = {
    "jdelta_format": int,
    "delta_type": str,
    "name": str,
    "arguments": dict[str, Any],
    "targets": tuple[str, ...],
    "leaves": dict[str, str],
    "exclude": tuple[str, ...] | None,
    "inserted": tuple[str, ...],
    "backbone": dict[str, Any] | None,
    "versions": dict[str, str],
    "sha256": str,
}
_BACKBONE: dict[str, Any] = {"kind": str, "name": str, "leaves": dict[str, str]}


def _fields(description: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a description, each of its type. Raises `TypeError` or `ValueError`, naming the field."""
    written = description.get("jdelta_format")
    if type(written) is int and written > FORMAT:
        by = _dict(description.get("versions")).get("jdelta", "a later version")
        raise ValueError(
            f"written by jdelta {by} in format {written}; this jdelta, {__version__}, knows formats up to {FORMAT}. "
            "Upgrade jdelta."
        )
    if type(written) is int and written < 1:
        raise ValueError(f"jdelta_format is at least 1, got {written}.")
    new = {"description_sha256": str} if type(written) is int and written > 1 else {}
    return _typed(description, {**_FIELDS, **new}, "", {"own": tuple[str, ...] | None})


def _typed(
    found: Mapping[str, Any], types: Mapping[str, Any], at: str, optional: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The values of an object's keys as their types hold them; `at` is what goes before the keys in messages."""
    known = {**types, **(optional or {})}
    for key in types:
        if key not in found:
            raise ValueError(f"{at + key!r} is missing. There are {shown(sorted(found))}.")
    for key in found:
        if key not in known:
            raise ValueError(f"the key {shown(at + key)} is unknown.{did_you_mean(key[:200], known)}")
    return {key: as_type(at + key, value, known[key]) for key, value in found.items()}


def _checksum(description: Mapping[str, Any]) -> str:
    """The SHA-256 of what a description says, but for the two checksums."""
    said = {key: value for key, value in description.items() if key not in ("sha256", "description_sha256")}
    said = json.loads(json.dumps(said))  # lists for tuples, and keys as JSON has them
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _dict(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


def _versions() -> dict[str, str]:
    """Of jdelta, and of the libraries that are here."""
    found = {"jdelta": __version__}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def card(found: Finetuned) -> str:
    """A short model card, in the Hub's form."""
    count = sum(value.size for value in found.values.values())
    size = sum(value.nbytes for value in found.values.values())
    backbone = found.backbone or BackboneInfo("", "")
    base = f"base_model: {backbone.name}\n" if _is_repository(backbone.name) else ""
    arguments = "\n".join(f"- `{key}`: `{value!r}`" for key, value in found.config.to_dict().items())
    method = type(found.config).__name__.removesuffix("Config")
    on = f" for `{backbone.kind}`{f' from `{backbone.name}`' if backbone.name else ''}" if backbone.kind else ""
    return f"""---
library_name: jdelta
tags:
- jdelta
- {found.config.delta_type}
{base}---

# {method} delta

A [jdelta](https://pypi.org/project/jdelta) delta{on}: {count:,} parameters, {size:,} bytes, on
{len(found.targets)} modules.

```python
import jdelta

delta = jdelta.AutoDeltaModel.from_finetuned("path or repository", backbone_model=model)
```

{arguments}
"""


def require_check_hash(value: Any) -> None:
    """Raises `ValueError` unless it is `True`, `False` or `"warn"`."""
    if not isinstance(value, bool) and not (isinstance(value, str) and value == "warn"):
        raise ValueError(f"check_hash is True, False or 'warn', got {shown(value)}.")


def require_same(have: Mapping[str, str], found: Finetuned, check_hash: bool | Literal["warn"]) -> None:
    """Compares a backbone's fingerprint with that of the one that a delta was trained on.

    Args:
      have: `fingerprint.fingerprint` of the backbone's leaves, those that the delta brings left out.
      found: the delta.
      check_hash: `True` to refuse another backbone, `"warn"` to warn, `False` to take it.

    Raises:
      ValueError: `check_hash` is `True`, and the backbone is another.
    """
    require_check_hash(check_hash)
    if not check_hash or found.backbone is None:
        return
    structure, values = fingerprint.differences(have, found.backbone.leaves)
    if not structure and not values:
        return
    if structure:
        what = f"its structure is another: {listing(structure)}"
    else:
        what = (
            f"its structure is the same, but {len(values)} of {len(have)} leaves have other values: {listing(values)}"
        )
    of = f"{found.backbone.kind} {found.backbone.name!r}" if found.backbone.name else found.backbone.kind
    message = (
        f"this backbone is not the one that delta {found.name!r} was trained on ({of}): {what}. Load that one; or, if "
        "this is meant, pass check_hash=False."
    )
    if check_hash != "warn":
        raise ValueError(message)
    warn(message)


def _is_repository(name: str) -> bool:
    return name.count("/") <= 1 and not os.path.exists(name) and not name.startswith((".", "/", "~")) and name != ""
