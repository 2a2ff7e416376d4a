"""Common names, such as `attn.q` or `ff.w2`, for modules that each family of models names differently.

The table maps the class of a block, and all its subclasses, to the common names of what is inside it. A block is found
wherever it is in a model, so a family is covered also inside a wrapper. `register_common_names` adds to it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flax import linen as nn
from flax import nnx

from jdelta.core import module_tree
from jdelta.core.structure import ModuleInfo, Structure
from jdelta.names import guess
from jdelta.names.decoders import DECODERS
from jdelta.names.table import NAMES, TABLE, Names, as_tuple
from jdelta.trees import addressing, surgery


def resolve(structure: Structure, names: Sequence[str]) -> list[ModuleInfo]:
    """The modules that common names mean, in order of execution.

    A name means itself and what is named below it where it has no module of its own: `"ff"` in BERT, whose two
    feed-forward layers have no common parent, means `ff.w1`, `ff.w2` and `ff.layer_norm`; `"layer_norm"` means every
    name that ends with it. Names that this model lacks are passed over if it has one of the others.

    Raises:
      ValueError: a name that is no common name, a model without a block of a known family (the message shows its
        structure and the line that registers it), or one that has none of these names.
    """
    for name in names:
        _check_name(name)
    blocks = _blocks(structure)
    if not blocks:
        raise ValueError(_unknown_model(structure, names))
    modules = known(structure, names)
    if names and not modules:
        have = [name for name in NAMES if known(structure, [name])]
        tied = sorted(places(structure, names) & structure.uncalled.keys())
        reasons = [f" {path!r} cannot be a target: {structure.uncalled[path]}" for path in tied]
        raise ValueError(
            f"{structure[''].type.__name__} has none of the common names {', '.join(names)}. "
            f"It has: {', '.join(have)}.{''.join(reasons)}"
        )
    return modules


def known(structure: Structure, names: Sequence[str]) -> list[ModuleInfo]:
    """What of the names is known in a model, in order of execution; nothing is an error."""
    found = places(structure, names)
    return [info for info in structure if info.name and info.name in found]


def places(structure: Structure, names: Sequence[str]) -> set[str]:
    """The full names that common names mean in a model, whether there is a module of that name or not."""
    return {path for block, entry in _blocks(structure) for name in names for path in _paths(block, entry, name)}


def means(structure: Structure, name: str, host: ModuleInfo) -> bool:
    """Whether a common name means this module."""
    around = [structure.modules.get(surgery.name_of(host.path[:i])) for i in range(len(host.path) + 1)]
    return any(host.name in _paths(info, _entry_of(info), name) for info in around if info is not None)


def register_common_names(
    block: type[nn.Module] | type[nnx.Module] | str, names: Mapping[str, str | Sequence[str]]
) -> None:
    """Adds a family of models to the common names, or replaces one.

        jdelta.register_common_names("MyBlock", {"attn.q": "attention.wq", "ff.w1": ("mlp.gate", "mlp.up")})

    Default positions and `common_structure=True` then work on every model with such blocks.

    Args:
      block: the class of a block, or its name. Subclasses are covered too.
      names: common name to the path of the module from the block, or several paths; `""` is the block itself.

    Raises:
      TypeError: the block is neither a class of flax nor a name, or a path is not a string.
      ValueError: a name is not a common name, or a path is not dot-joined.
    """
    if not isinstance(block, str) and not (isinstance(block, type) and issubclass(block, (nn.Module, nnx.Module))):
        raise TypeError(f"register_common_names: the block is a class of linen or nnx, or its name, got {block!r}.")
    if not isinstance(names, Mapping):
        raise TypeError(f"register_common_names: the names are a mapping {{'attn.q': 'path', …}}, got {names!r}.")
    key = block if isinstance(block, str) else block.__name__
    if not key.isidentifier():
        raise ValueError(f"register_common_names: {key!r} is not the name of a class.")
    if not names:
        raise ValueError(f"register_common_names: no names were given for {key}.")
    entry: dict[str, tuple[str, ...]] = {}
    for name, value in names.items():
        _check_name(name)
        paths = (value,) if isinstance(value, str) else value
        if not isinstance(paths, (tuple, list)) or not all(isinstance(path, str) for path in paths):
            raise TypeError(
                f"register_common_names: {name!r} of {key} is a path like 'attention.query', or several, got {value!r}."
            )
        for path in paths:
            if path and not all(part and part == part.strip() for part in path.split(".")):
                raise ValueError(f"register_common_names: {name!r} of {key}: {path!r} is not a dot-joined path.")
        entry[name] = tuple(paths)
    TABLE[key] = entry


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"a common name is a string, got {name!r}.")
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name!r} is no common name.{hint} There are: {', '.join(NAMES)}.")


def _blocks(structure: Structure) -> list[tuple[ModuleInfo, Names]]:
    """The blocks of known families. A class that merely shares its name with one has nothing at the table's paths."""
    blocks, there = [], structure.modules.keys() | structure.uncalled.keys()
    for info in structure:
        entry = _entry_of(info)
        if any(path in there for name in entry for path in _paths(info, entry, name)):
            blocks.append((info, entry))
    return blocks


def _entry_of(block: ModuleInfo) -> Names:
    """What is known of a module's class, or of the first that it inherits from; nothing, if no class is known."""
    return next(filter(None, map(_entry, block.type.__mro__)), {})


def _entry(block: type) -> Names | None:
    """What is known of a class by its name, which whoever registers one gives, or by its qualified name."""
    return TABLE.get(block.__name__) or DECODERS.get(f"{block.__module__}.{block.__qualname__}")


def _paths(block: ModuleInfo, entry: Names, wanted: str) -> Iterator[str]:
    """The full names of what a common name means in a block."""
    for name, value in entry.items():
        below = name.startswith(wanted + ".") and wanted not in entry
        if name == wanted or below or name.endswith("." + wanted):
            for path in as_tuple(value):
                yield ".".join((*block.path, path) if path else block.path)


def _unknown_model(structure: Structure, names: Sequence[str]) -> str:
    guesses = guess.guess(structure)
    asked = [path for entry in guesses.values() for name in names for path in as_tuple(entry.get(name, ()))]
    example = list(dict.fromkeys(asked)) or guess.linears(structure)
    lines = [f"jdelta.register_common_names({block!r}, {entry})".replace("'", '"') for block, entry in guesses.items()]
    tree = _indented(module_tree.lines(structure))
    message = (
        f"{structure[''].type.__name__} has no block of a known family, so neither default positions nor common names "
        f"(here {', '.join(names)}) mean anything in it. It is this model:\n\n{tree}\n\n"
        f"Name the modules{f', for example modified_modules={example[:2]}' if example else ', in modified_modules'}"
    )
    if not lines:
        return message + "."
    return f"{message}, or say what its blocks hold (guessed from the names, so check it):\n\n{_indented(lines)}"


def _indented(lines: Sequence[str]) -> str:
    return "\n".join(f"    {line}" for line in lines)


def finder(structure: Structure, exclude: Sequence[str], label: str) -> Callable[[Sequence[str]], list[ModuleInfo]]:
    """What finds the modules that common names mean, without excluded ones; `label` is who asks, for messages."""

    def find(patterns: Sequence[str]) -> list[ModuleInfo]:
        try:
            resolved = resolve(structure, addressing.checked(patterns))
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from error
        found = [info.name for info in resolved]
        return structure.find([f"[r]^{re.escape(name)}" for name in found], exclude) if found else []

    return find
