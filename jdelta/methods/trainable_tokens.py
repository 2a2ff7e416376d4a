"""Trainable tokens: the rows of some tokens train, and take the places of theirs in an embedding.

As PyTorch PEFT's method of this name, whose numbers it has. A head that computes with the embedding has them too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jdelta.core.edits import Edit, WeightEdit
from jdelta.core.linear import linear_map, weight_edits
from jdelta.core.linear_maps import BoundLinear, LookupMap, StoredMap
from jdelta.core.method import Method, Site
from jdelta.core.placement import resolved
from jdelta.core.rules import Leaves, Side
from jdelta.core.structure import ModuleInfo, ParameterInfo, Structure
from jdelta.names import common_names
from jdelta.trees import surgery


@dataclasses.dataclass(frozen=True)
class TrainableTokensRule:
    """`W[i] = tokens[j]`, where `i` is the token with the index `j` among those that train.

    Attributes:
      token_indices: the rows that train.
      random: whether they start at N(0, 1), and not at the weight's.
    """

    axes: ClassVar[Mapping[str, tuple[Side | None, ...]]] = {"tokens": (None, "out")}

    token_indices: tuple[int, ...]
    random: bool = False

    @property
    def starts_from_weight(self) -> bool:
        """Whether `init` needs the weight's value."""
        return not self.random

    def init(self, key: jax.Array, weight: jax.ShapeDtypeStruct | jax.Array) -> Leaves:
        rows, width = weight.shape
        if (largest := max(self.token_indices)) >= rows:
            raise ValueError(f"token_indices has {largest}, and the embedding has {rows} rows.")
        if self.random or isinstance(weight, jax.ShapeDtypeStruct):
            return {"tokens": jax.random.normal(key, (len(self.token_indices), width))}
        return {"tokens": weight[np.array(self.token_indices)]}

    def update(self, weight: jax.Array, own: Leaves) -> jax.Array:
        rows = np.array(self.token_indices)
        return jnp.zeros_like(weight).at[rows].set(own["tokens"] - weight[rows])

    def product(self, x: jax.Array, y: jax.Array, own: Leaves, linear: BoundLinear) -> jax.Array | None:
        """The difference of the rows, where `x` is one of the tokens."""
        if not isinstance(linear.linear, LookupMap):
            return None
        order = np.argsort(self.token_indices)
        tokens = jnp.asarray(np.array(self.token_indices)[order], x.dtype)
        at = jnp.searchsorted(tokens, x).clip(max=len(order) - 1)
        new = own["tokens"].astype(y.dtype)[jnp.asarray(order)[at]]
        return jnp.where((tokens[at] == x)[..., None], new - y, 0)


@dataclasses.dataclass(frozen=True)
class TrainableTokensConfig(Method):
    """Arguments of trainable tokens.

        config = jdelta.TrainableTokensConfig(token_indices=[30522, 30523])
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    Attributes:
      token_indices: ids of the tokens that train, each once.
      init_weights: whether the rows start at those of the embedding. Otherwise they start at N(0, 1), and the output
        changes at once.
    """

    delta_type = "trainable_tokens"
    default_modified_modules = ("embeddings",)

    token_indices: tuple[int, ...] = ()
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if odd := [index for index in self.token_indices if not 0 <= index < 2**31]:
            raise ValueError(f"token_indices are ids of tokens, at least 0 and below 2**31; got {odd[0]}.")
        if len({*self.token_indices}) < len(self.token_indices):
            double = next(index for index in self.token_indices if self.token_indices.count(index) > 1)
            raise ValueError(f"token_indices has {double} more than once.")

    @classmethod
    def takes_single_modules(cls) -> bool:
        """Each embedding has rows of its own."""
        return True

    def place(self, site: Site, patterns: Sequence[str]) -> Iterable[Edit]:
        """By default the embedding that is called first, as PEFT; one that is run by methods, by its parameter."""
        if self.modified_modules is not None or not patterns:
            yield from super().place(site, patterns)
            return
        structure = site.structure
        try:
            hosts = site.find(patterns)
        except ValueError:
            named = common_names.places(structure, patterns)
            parameters = [each for each in structure.parameters if surgery.name_of(each.path[:-1]) in named]
            matrices = [each for each in parameters if len(each.shape) == 2]
            if len(matrices) != 1:
                raise
            yield from self.parameter_edits(matrices[0], structure)
            return
        tables = [host for host in hosts if isinstance(linear_map(host), LookupMap)]  # not those of patches
        first = dataclasses.replace(site, find=lambda _: (tables or hosts)[:1])
        yield from super().place(first, patterns)

    def edits(self, host: ModuleInfo, structure: Structure) -> Iterable[Edit]:
        linear = linear_map(host)
        if not isinstance(linear, LookupMap):
            raise TypeError("it is no embedding, which has a row for each token.")
        if host.name in structure.tied:  # what computes with its rows besides has the changed ones too
            return [resolved(WeightEdit((*host.path, linear.weights), self.rule(host.name)), structure)]
        return weight_edits(host, self.rule(host.name))

    def parameter_edits(self, parameter: ParameterInfo, structure: Structure) -> Iterable[Edit]:
        edit = resolved(WeightEdit(parameter.path, self.rule(parameter.name), own=parameter.path[-1:]), structure)
        if not isinstance(edit.linear, LookupMap | StoredMap) or len(edit.shape) != 2:
            raise TypeError(f"it is no embedding, which has a row for each token; it has shape {edit.shape}.")
        yield edit

    def rule(self, name: str) -> TrainableTokensRule:
        if not self.token_indices:
            raise ValueError("token_indices is empty. Name the tokens whose rows train.")
        return TrainableTokensRule(self.token_indices, random=not self.init_weights)
