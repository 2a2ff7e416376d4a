"""LoRA: a low-rank change of a weight (Hu et al. 2021, arXiv 2106.09685).

`W + (alpha / r) a b`, as `y + (alpha / r) · dropout(x) a b`. Numbers agree with PyTorch PEFT's for the same weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from jdelta.core.config import require_positive_int, require_probability
from jdelta.core.edits import Edit, WeightEdit
from jdelta.core.linear import weight_edits
from jdelta.core.linear_maps import BoundLinear, LookupMap
from jdelta.core.method import Method
from jdelta.core.placement import resolved
from jdelta.core.rules import Leaves, Side
from jdelta.core.structure import ModuleInfo, ParameterInfo, Structure
from jdelta.core.warn import warn
from jdelta.methods.parameter import kaiming_uniform
from jdelta.trees import addressing, surgery


@dataclasses.dataclass(frozen=True)
class LoraRule:
    """`ΔW = scale · a b`.

    Attributes:
      rank: of the change, `r`.
      scale: factor of the change.
      dropout: rate of dropout on the input of `a`.
      of_rows: whether the weight is a table of rows that are looked up. As in PEFT, `a` starts at 0 there and `b` at
        N(0, 1); else `a` at U(±1/√d_in) and `b` at 0.
    """

    axes: ClassVar[Mapping[str, tuple[Side | None, ...]]] = {"a": ("in", None), "b": (None, "out")}

    rank: int
    scale: float
    dropout: float = 0.0
    of_rows: bool = False

    def init(self, key: jax.Array, weight: jax.ShapeDtypeStruct | jax.Array) -> Leaves:
        d_in, d_out = weight.shape
        if self.of_rows:
            return {"a": jnp.zeros((d_in, self.rank)), "b": jax.random.normal(key, (self.rank, d_out))}
        return {"a": kaiming_uniform(key, (d_in, self.rank), jnp.float32), "b": jnp.zeros((self.rank, d_out))}

    def update(self, weight: jax.Array, own: Leaves) -> jax.Array:
        return self.scale * (own["a"] @ own["b"])

    def product(self, x: jax.Array, y: jax.Array, own: Leaves, linear: BoundLinear) -> jax.Array:
        return linear.low_rank(x, own["a"], self.scale * own["b"])


@dataclasses.dataclass(frozen=True)
class LoraConfig(Method):
    """Arguments of LoRA.

        config = jdelta.LoraConfig(lora_r=8, modified_modules=["query", "value"])
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    Attributes:
      lora_r: the rank.
      lora_alpha: the update is scaled by `lora_alpha / lora_r`.
      lora_dropout: rate of dropout on the input of `a`.
      rank_pattern: patterns of modules to their own rank, in place of `lora_r`; the first that matches counts.
      alpha_pattern: likewise, in place of `lora_alpha`.
      use_rslora: scale by `lora_alpha / sqrt(lora_r)` (Kalajdzievski 2023, arXiv 2312.03732).
    """

    delta_type = "lora"
    default_modified_modules = ("attn.q", "attn.v", "conv")  # conv: of ResNet and its like

    pattern_fields: ClassVar[tuple[str, ...]] = ("rank_pattern", "alpha_pattern")

    lora_r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    rank_pattern: dict[str, int] | None = dataclasses.field(default=None, hash=False)
    alpha_pattern: dict[str, float] | None = dataclasses.field(default=None, hash=False)
    use_rslora: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("lora_r", self.lora_r)
        require_probability("lora_dropout", self.lora_dropout)
        for pattern, rank in (self.rank_pattern or {}).items():
            require_positive_int(f"rank_pattern[{pattern!r}]", rank)

    def rank_of(self, host: str) -> int:
        """The rank at the module of this name."""
        return addressing.first_match(self.rank_pattern, host, self.lora_r)

    def alpha_of(self, host: str) -> float:
        """The `lora_alpha` at the module of this name."""
        return addressing.first_match(self.alpha_pattern, host, self.lora_alpha)

    def scale_of(self, host: str) -> float:
        """The factor of the update of the module of this name."""
        rank = self.rank_of(host)
        return self.alpha_of(host) / (math.sqrt(rank) if self.use_rslora else rank)

    def edits(self, host: ModuleInfo, structure: Structure) -> Iterable[Edit]:
        rule = LoraRule(self.rank_of(host.name), self.scale_of(host.name), self.lora_dropout)
        try:
            edits = list(weight_edits(host, rule))
        except TypeError as error:
            raise TypeError(f"LoRA needs a linear module; {error}{_instead(host, structure)}") from error
        for edit in edits:
            if isinstance(edit.linear, LookupMap):
                edit = dataclasses.replace(edit, rule=dataclasses.replace(rule, dropout=0.0, of_rows=True))
            _warn_of_rank(host.name, rule.rank, *edit.linear.layout(edit.shape).matrix_shape(edit.shape))
            yield edit

    def parameter_edits(self, parameter: ParameterInfo, structure: Structure) -> Iterable[Edit]:
        name = parameter.name
        rule = LoraRule(self.rank_of(name), self.scale_of(name), self.lora_dropout)
        edit = resolved(WeightEdit(parameter.path, rule, own=parameter.path[-1:]), structure)
        if len(edit.shape) < 2:
            raise ValueError(f"LoRA needs a matrix, and it has shape {edit.shape}.")
        _warn_of_rank(name, rule.rank, *edit.linear.layout(edit.shape).matrix_shape(edit.shape))
        yield edit


def _instead(host: ModuleInfo, structure: Structure) -> str:
    """What can be done where a module has no kernel of its own."""
    if "kernel" in host.params:
        return ""
    weighted = (
        info for info in structure.below(host.path) if any(len(leaf.shape) > 1 for leaf in info.params.values())
    )
    inside = [info.name for info in weighted if info is not host and not info.sharing]
    if inside:
        return f" Name a linear module inside it, such as {inside[0]!r}."
    ways = f" An adapter goes after any module; its parameters can train, with unfrozen_modules=[{host.name!r}]."
    if host.sharing:
        classes = ", ".join(cls.__name__ for cls in host.sharing.values())
        return (
            f" It holds the weights of modules in its scope (nn.share_scope: {classes}). Name its parameters, with "
            f"modified_parameters=[{surgery.name_of((*host.path, next(iter(host.params))))!r}] for example.{ways}"
        )
    return ways if host.params else ""


def _warn_of_rank(name: str, rank: int, d_in: int, d_out: int) -> None:
    """Such ranks are valid, and PEFT's `all-linear` makes them where a classifier has few outputs."""
    if rank > min(d_in, d_out):
        warn(
            f"LoraModel at {name}: lora_r={rank} is above the width of this module, {d_in} -> {d_out}, whose "
            f"changes have rank {min(d_in, d_out)} at most. With that in rank_pattern, less is trained and stored.",
        )
