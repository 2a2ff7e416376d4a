"""What training leaves behind: a delta apart from any model, in memory or in a folder."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import numpy as np

from jdelta import fingerprint, folder
from jdelta.config import DeltaConfig, config_from_dict, did_you_mean, require_name
from jdelta.version import __version__

FORMAT = 1
LIBRARIES = ("jax", "flax", "transformers")


@dataclasses.dataclass(frozen=True)
class BackboneInfo:
    """Which backbone a delta was trained on.

    Attributes:
      kind: the class of the model.
      name: where it was loaded from, a folder or a repository of the Hub; `""` if nobody knows.
      leaves: the fingerprint of its frozen leaves, `fingerprint.fingerprint`.
    """

    kind: str
    name: str = ""
    leaves: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Finetuned:
    """A trained delta apart from any model: `delta.finetuned()` gives it, `from_finetuned` takes it.

    Attributes:
      name: the delta's name in the tree.
      config: the method's arguments.
      values: dot-name to array: the delta's own leaves, and what else trained, such as a classifier head.
      targets: the names of the modules it sits on.
      exclude: what `freeze_module` was told; `None` if it was not called.
      inserted: names of modules where a layer was put by hand, which no configuration describes.
      backbone: what it was trained on, if that is known.
      own: which of the values are the delta's own leaves, if not just those below its name at one of its modules or at
        the root of the tree.
    """

    name: str
    config: DeltaConfig
    values: Mapping[str, np.ndarray]
    targets: Sequence[str]
    exclude: Sequence[str] | None = None
    inserted: Sequence[str] = ()
    backbone: BackboneInfo | None = None
    own: frozenset[str] | None = None

    def __post_init__(self) -> None:
        require_name(self.name)
        if self.own == {leaf for leaf in self.values if self._place(leaf) is not None}:
            object.__setattr__(self, "own", None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a folder, as `DeltaModel.save_finetuned`."""
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
            "versions": {"jdelta": __version__} | {name: importlib.metadata.version(name) for name in LIBRARIES},
            "backbone": None if self.backbone is None else dataclasses.asdict(self.backbone),
        }
        if self.own is not None:
            description["own"] = sorted(self.own)
        folder.write(path, description, self.values, card(self))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Self:
        """The inverse of `save`.

        Raises:
          FileNotFoundError: no folder, or no delta in it.
          TypeError, ValueError: a file is damaged, was changed, or comes from a newer jdelta.
        """
        description, values, intact = folder.read(path)
        where = f"{os.fspath(path)}/{folder.CONFIG}"
        written = description.get("jdelta_format")
        if isinstance(written, int) and written > FORMAT:
            by = _dict(description.get("versions")).get("jdelta", "a later version")
            raise ValueError(
                f"{where}: written by jdelta {by} in format {written}; this jdelta, {__version__}, knows formats up to "
                f"{FORMAT}. Upgrade jdelta."
            )
        known = {*_TYPES, "versions", "sha256", "own"}
        for key in known - description.keys() - {"own"}:
            raise ValueError(f"{where}: {key!r} is missing. It has {', '.join(sorted(description)) or 'no keys'}.")
        for key in description.keys() - known:
            raise ValueError(f"{where}: the key {key!r} is unknown.{did_you_mean(key, known)}")
        for key, (kinds, word) in _TYPES.items():
            if not isinstance(description[key], kinds):
                raise TypeError(f"{where}: {key!r} is {word}, got {description[key]!r}.")
        own = description.get("own")
        if own is not None and not (isinstance(own, list) and {*map(str, own)} <= values.keys()):
            raise TypeError(f"{where}: 'own' is a list of names of leaves, got {own!r}.")
        try:
            require_name(description["name"])
            config = config_from_dict({"delta_type": description["delta_type"], **description["arguments"]})
            _check_arguments(config, description)
            backbone = None if description["backbone"] is None else BackboneInfo(**description["backbone"])
        except (TypeError, ValueError) as error:
            raise type(error)(f"{where}: {error}") from error
        _check(description["leaves"], values, f"{os.fspath(path)}/{folder.TENSORS}", intact)
        return cls(
            description["name"],
            config,
            values,
            tuple(description["targets"]),
            description["exclude"],
            tuple(description["inserted"]),
            backbone,
            None if own is None else frozenset(map(str, own)),
        )

    def is_own(self, name: str) -> bool:
        """Whether a leaf is the delta's, and not one of the backbone's."""
        return self._place(name) is not None if self.own is None else name in self.own

    def renamed(self, name: str) -> Self:
        """The same under another name in the tree. Raises `ValueError` if a delta cannot have it."""
        require_name(name)
        new = {leaf: self._renamed(leaf, name) if self.is_own(leaf) else leaf for leaf in self.values}
        values = {new[leaf]: value for leaf, value in self.values.items()}
        own = frozenset(new[leaf] for leaf in self.values if self.is_own(leaf))
        return dataclasses.replace(self, name=name, values=values, own=own)

    def _place(self, leaf: str) -> int | None:
        """Where in a leaf's path the delta's name is: after a host, the longest, or at the root. `None`: nowhere."""
        parts, hosts = leaf.split("."), {"", *self.targets}
        places = [i for i, part in enumerate(parts[:-1]) if part == self.name and ".".join(parts[:i]) in hosts]
        return places[-1] if places else None

    def _renamed(self, leaf: str, name: str) -> str:
        parts, at = leaf.split("."), self._place(leaf)
        return leaf if at is None else ".".join([*parts[:at], name, *parts[at + 1 :]])


def _check_arguments(config: DeltaConfig, description: Mapping[str, Any]) -> None:
    """Raises `ValueError` if an argument is missing. Earlier versions lack those that came since, with the defaults."""
    missing = {field.name for field in dataclasses.fields(config)} - description["arguments"].keys()
    if missing and _dict(description["versions"]).get("jdelta") == __version__:
        raise ValueError(f"the argument {min(missing)!r} is missing.")


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


def listing(items: Sequence[str], most: int = 3) -> str:
    """The first few of many, and how many more there are."""
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


_TYPES: dict[str, tuple[Any, str]] = {
    "jdelta_format": (int, "a whole number"),
    "delta_type": (str, "a string"),
    "name": (str, "a string"),
    "arguments": (dict, "an object"),
    "targets": (list, "a list of names"),
    "leaves": (dict, "an object"),
    "exclude": ((list, type(None)), "a list of patterns, or null"),
    "inserted": (list, "a list of names"),
    "backbone": ((dict, type(None)), "an object, or null"),
}


def _dict(value: Any) -> dict:
    return value if isinstance(value, dict) else {}


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


def require_same(have: Mapping[str, str], found: Finetuned, check_hash: bool | Literal["warn"]) -> None:
    """Compares a backbone's fingerprint with that of the one that a delta was trained on.

    Args:
      have: `fingerprint.fingerprint` of the backbone's leaves, those that the delta brings left out.
      found: the delta.
      check_hash: `True` to refuse another backbone, `"warn"` to warn, `False` to take it.

    Raises:
      ValueError: `check_hash` is `True`, and the backbone is another.
    """
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
    warnings.warn(message, stacklevel=4)


def _is_repository(name: str) -> bool:
    return name.count("/") <= 1 and not os.path.exists(name) and not name.startswith((".", "/", "~")) and name != ""
