"""What of the backbone's own trained with a delta, as PEFT saves it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from jdelta.saved.finetuned import Finetuned, listing
from jdelta.saved.peft.names import Names, owner, shapes_of


def trained_leaves(found: Finetuned, names: Names) -> tuple[set[str], set[str]]:
    """The backbone's leaves that trained: those of whole modules, and single biases.

    Raises:
      ValueError: others, which PEFT cannot train.
    """
    leaves = shapes_of(names.structure.params)
    trained = leaves.keys() & found.values.keys()
    other = {*map(owner, leaves.keys() - trained), *found.targets}
    partly = {name[:i] for name in other for i in _ends(name)}
    whole = {leaf for leaf in trained if owner(leaf) not in partly}
    biases = {leaf for leaf in trained - whole if names.torch(leaf)[0].endswith(".bias")}
    if odd := sorted(trained - whole - biases):
        raise ValueError(
            f"PEFT trains whole modules without a delta of their own, and biases; this delta trains {listing(odd)}. "
            "Choose others with freeze_module."
        )
    owners = set(map(owner, whole))
    for name in sorted(owners):
        if name in names.tied:
            raise ValueError(
                f"the head computes with the embedding {name!r}, and PEFT would train it apart from the head."
            )
        alike = {flax for module, flax in names.modules.items() if module.endswith(names.torch(name))}
        if lone := sorted(alike - owners):
            raise ValueError(
                f"PEFT takes the ends of names: with {name!r} it would train {listing(lone)} too. Train these as well."
            )
    return whole, biases


def _ends(name: str) -> list[int]:
    """Where the names of the modules around this one end, and its own."""
    return [i for i in range(len(name) + 1) if name[i : i + 1] in (".", "")]


def owners_of(leaves: Iterable[str], names: Names) -> list[str]:
    """The names, in PyTorch, of the modules that leaves belong to; not of those inside another."""
    owners = {owner(leaf) for leaf in leaves}
    outer = [name for name in owners if not any(name[:i] in owners - {name} for i in _ends(name))]
    return sorted(part for name in outer for part in names.torch(name))


def in_torch(leaves: Iterable[str], found: Finetuned, names: Names) -> dict[str, np.ndarray]:
    """Leaves of the backbone's as PyTorch has them."""
    return {name: value for leaf in leaves for name, value in names.in_torch(leaf, found.values[leaf]).items()}
