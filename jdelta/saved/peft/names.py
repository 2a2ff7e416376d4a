"""What things are called, and how arrays lie, in PEFT's files, in PyTorch's models and in those of Flax."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import numpy as np
from flax.core import meta

from jdelta.core.structure import Structure
from jdelta.trees import addressing, surgery
from jdelta.trees.surgery import Tree

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PROMPT = "prompt_embeddings"

Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Names:
    """The names of a Flax model by those of its PyTorch class.

    Attributes:
      structure: the Flax model.
      prefix: the name of the base model in models with a head.
      modules: every module that has leaves, itself or inside: PyTorch's name to Flax'.
      leaves: Flax names.
    """

    structure: Structure
    prefix: str
    modules: Mapping[str, str]
    leaves: frozenset[str]

    @classmethod
    def of(cls, structure: Structure, prefix: str) -> Names:
        """Those of a model whose base model goes by `prefix` in models with a head."""
        modules = {torch_name(module): module for module in modules_of(structure)}
        return cls(structure, prefix, modules, frozenset(shapes_of(structure.params)))

    def find(self, name: str) -> str | None:
        """The Flax name of a module; `None` if the model lacks it."""
        candidates = (name, f"{self.prefix}.{name}", name.removeprefix(f"{self.prefix}."))
        return next((self.modules[candidate] for candidate in candidates if candidate in self.modules), None)

    def module(self, name: str) -> str:
        """The Flax name of a module. Raises `ValueError` if the model lacks it."""
        found = self.find(name)
        if found is not None:
            return found
        reason = self.structure.uncalled.get(name)
        near = addressing.closest([*self.modules], name)
        raise ValueError(
            f"the adapter changes {name!r}, a module that this model lacks."
            + (f" {reason}" if reason else f" Closest: {', '.join(near)}." if near else "")
            + " Load the model class that the adapter was trained on."
        )

    def leaf(self, name: str) -> str:
        """The Flax name of a leaf of the backbone's own. Raises `ValueError` if the model lacks it."""
        above, _, last = name.rpartition(".")
        module = self.module(above)
        for candidate in ("kernel", "embedding", "scale", "weight") if last == "weight" else (last,):
            if f"{module}.{candidate}" in self.leaves:
                return f"{module}.{candidate}"
        raise ValueError(f"the adapter changes {name!r}, and {module!r} has no such leaf in this model.")


def shapes_of(tree: Tree) -> dict[str, tuple[int, ...]]:
    """The shapes of a tree's leaves by name."""
    leaves = surgery.flatten(surgery.parameters(tree)).items()
    return {surgery.name_of(path): meta.unbox(leaf).shape for path, leaf in leaves if leaf is not surgery.empty_node}


def modules_of(structure: Structure) -> list[str]:
    """The names of all modules that have leaves, themselves or inside."""
    paths = surgery.flatten(structure.params)
    return list(dict.fromkeys(surgery.name_of(path[:i]) for path in paths for i in range(1, len(path))))


def torch_name(name: str) -> str:
    """PyTorch's name of a Flax module: the same, but for the layers of ResNet."""
    return re.sub(r"\blayer\.layer_(\d+)\b", r"layer.\1", name)


def torch_leaf(name: str) -> str:
    """PyTorch's name of a Flax leaf."""
    module, _, last = name.rpartition(".")
    return f"{torch_name(module)}.{'weight' if last in ('kernel', 'embedding', 'scale') else last}"


def to_flax(array: np.ndarray) -> np.ndarray:
    """From PyTorch's `(out, in, *window)` to Flax' `(*window, in, out)`."""
    return array.transpose(*range(2, array.ndim), 1, 0)


def to_torch(array: np.ndarray) -> np.ndarray:
    """From Flax' `(*window, in, out)` to PyTorch's `(out, in, *window)`."""
    return array.transpose(-1, -2, *range(array.ndim - 2))


def fitted(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The array with several axes where PyTorch has one; unchanged if it does not fit, which loading then reports."""
    return array.reshape(shape) if array.ndim != len(shape) and array.size == np.prod(shape) else array
