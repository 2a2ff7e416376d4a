"""What things are called, and how arrays lie, in PEFT's files, in PyTorch's models and in those of Flax."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import meta

from jdelta.core.linear import linear_map
from jdelta.core.linear_maps import Layout
from jdelta.core.structure import Structure
from jdelta.saved.peft.torch_leaves import BASES, Parts, base_model, torch_leaves
from jdelta.trees import addressing, surgery
from jdelta.trees.surgery import Tree

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PROMPT = "prompt_embeddings"
NORM = "ln_tuning_layers"  # what PEFT calls the copy of a norm, inside its host
TOKENS = "trainable_tokens_delta"  # and the rows of tokens

Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Names:
    """The names of a Flax model and those of its PyTorch class.

    A module that computes several outputs at once, such as keys and values, may be several modules in PyTorch: its
    parts, and its weight has theirs.

    Attributes:
      structure: the Flax model.
      bases: what the base model is called in models with a head: in this one, and in others.
      modules: every module that has leaves, itself or inside: PyTorch's name to Flax'.
      leaves: likewise.
      parts: Flax' names of modules and leaves to PyTorch's. What is absent is nothing in PyTorch.
      tied: Flax' names of modules with whose weights the head computes too.
    """

    structure: Structure
    bases: tuple[str, ...]
    modules: Mapping[str, str]
    leaves: Mapping[str, str]
    parts: Mapping[str, Parts]
    tied: frozenset[str]

    @classmethod
    def of(cls, structure: Structure, prefix: str = "") -> Names:
        """Those of a model whose base model goes by `prefix` in models with a head."""
        names, tied = shapes_of(structure.params), structure.tied
        bases: tuple[str, ...] = (prefix,)
        leaves = torch_leaves(structure[""].type, names)
        if leaves is None:
            modules: dict[str, Parts] = {module: (torch_name(module),) for module in modules_of(structure)}
            leaves = {leaf: (torch_leaf(leaf),) for leaf in names}
        else:
            weights = {leaf: parts for leaf, parts in leaves.items() if parts[0].endswith(".weight")}
            modules = {owner(leaf): tuple(map(owner, parts)) for leaf, parts in weights.items()}
            bases = (base_model(names), *BASES)
            tied |= frozenset() if "lm_head.w" in leaves else {"embedder"}
        return cls(structure, bases, _inverse(modules), _inverse(leaves), {**modules, **leaves}, tied)

    def find(self, name: str) -> str | None:
        """The Flax name of a module; `None` if the model lacks it."""
        return next((self.modules[spelling] for spelling in self._spellings(name) if spelling in self.modules), None)

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
        found = next((self.leaves[spelling] for spelling in self._spellings(name) if spelling in self.leaves), None)
        if found is not None:
            return found
        module = self.module(owner(name))
        raise ValueError(f"the adapter changes {name!r}, and {module!r} has no such leaf in this model.")

    def torch(self, name: str) -> Parts:
        """The names in PyTorch of a Flax module or leaf. Raises `ValueError` if PyTorch's model lacks it."""
        if name not in self.parts:
            raise ValueError(f"{name!r} of {self.structure[''].type.__name__} is nothing in PyTorch's model.")
        return self.parts[name]

    def part(self, name: str, flax: str) -> int:
        """Which part of a Flax module or leaf a name in PyTorch is."""
        return next(
            self.parts[flax].index(spelling) for spelling in self._spellings(name) if spelling in self.parts[flax]
        )

    def _spellings(self, name: str) -> tuple[str, ...]:
        """What a name may mean, as models with and without a head have it."""
        inside = [name.removeprefix(f"{base}.") for base in self.bases]
        return (name, *(f"{self.bases[0]}.{rest}" for rest in inside), *inside)

    # --- how arrays lie

    def in_torch(self, leaf: str, value: np.ndarray) -> dict[str, np.ndarray]:
        """A leaf of the backbone's as PyTorch has it, by its names there."""
        parts = self.torch(leaf)
        if layout := self._layout(leaf):
            return dict(zip(parts, np.split(np.asarray(layout.matrix(jnp.asarray(value))).T, len(parts)), strict=True))
        if leaf.endswith(".kernel"):
            info = self.structure.modules.get(owner(leaf))
            if value.ndim != 2 and not (info and issubclass(info.type, nn.Conv)):
                raise ValueError(f"{leaf!r} has shape {value.shape}, and PyTorch has no dense layer with so many axes.")
            value = to_torch(value)
        return {parts[0]: value}

    def in_flax(self, leaf: str, tensor: np.ndarray) -> np.ndarray:
        """A tensor of PyTorch's, that of all parts, as the leaf; unchanged if it does not fit."""
        shape = shapes_of(self.structure.params)[leaf]
        layout = self._layout(leaf)
        if layout and tensor.shape[::-1] == layout.matrix_shape(shape):
            return np.asarray(layout.stored(jnp.asarray(tensor.T), shape))
        return fitted(to_flax(tensor) if leaf.endswith(".kernel") else tensor, shape)

    def _layout(self, leaf: str) -> Layout | None:
        """Which axes are which in the weight of an einsum, of which PyTorch has one matrix or several."""
        module, _, last = leaf.rpartition(".")
        info = self.structure.modules.get(module)
        if info is None or last != "w" or len(info.params[last].shape) < 2:
            return None
        return linear_map(info).layout(info.params[last].shape)


def _inverse(parts: Mapping[str, Parts]) -> dict[str, str]:
    return {name: flax for flax, names in parts.items() for name in names}


def owner(leaf: str) -> str:
    """The name of the module that a leaf belongs to."""
    return leaf.rpartition(".")[0]


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
