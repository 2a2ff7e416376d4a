"""AdaLoRA: LoRA whose ranks shrink in training, where they matter least (Zhang et al. 2023, arXiv 2303.10512).

`W + alpha / (r + 1e-5) · a diag(e) b`. Numbers and schedule agree with PyTorch PEFT's for the same weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jdelta.core.config import (
    require_positive,
    require_positive_int,
    require_positive_ints,
    require_probability,
    shown,
)
from jdelta.core.linear_maps import BoundLinear
from jdelta.core.method import Method
from jdelta.core.rules import Leaves, Side
from jdelta.methods.rank_budget import Budget, matrices, with_budget
from jdelta.trees import addressing
from jdelta.trees.surgery import Path


@dataclasses.dataclass(frozen=True)
class AdaLoraRule:
    """`ΔW = scale · a diag(e) b`.

    Attributes:
      rank: of the change, `r`.
      scale: factor of the change.
      dropout: rate of dropout on the input of `a`.
      starts_at_zero: whether `e` starts at 0, and `a` and `b` at N(0, 0.02²); else all at N(0, 1).
    """

    axes: ClassVar[Mapping[str, tuple[Side | None, ...]]] = {"a": ("in", None), "e": (None,), "b": (None, "out")}

    rank: int
    scale: float
    dropout: float = 0.0
    starts_at_zero: bool = True

    def init(self, key: jax.Array, weight: jax.ShapeDtypeStruct | jax.Array) -> Leaves:
        (d_in, d_out), (of_a, of_e, of_b) = weight.shape, jax.random.split(key, 3)
        spread = 0.02 if self.starts_at_zero else 1.0
        return {
            "a": spread * jax.random.normal(of_a, (d_in, self.rank)),
            "e": jnp.zeros(self.rank) if self.starts_at_zero else jax.random.normal(of_e, (self.rank,)),
            "b": spread * jax.random.normal(of_b, (self.rank, d_out)),
        }

    def update(self, weight: jax.Array, own: Leaves) -> jax.Array:
        return self.scale * (own["a"] * own["e"]) @ own["b"]

    def product(self, x: jax.Array, y: jax.Array, own: Leaves, linear: BoundLinear) -> jax.Array:
        return linear.low_rank(x, own["a"], self.scale * own["e"][:, None] * own["b"])


@dataclasses.dataclass(frozen=True)
class AdaLoraConfig(Method):
    """Arguments of AdaLoRA.

        config = jdelta.AdaLoraConfig(init_r=12, target_r=8, tinit=100, tfinal=200, total_step=1000)
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)
        tx = delta.optimizer(optax.adamw(1e-3))  # it sets entries of `e` to 0 on the way
        loss = task_loss + delta.penalty(params)  # keeps `a` and `b` near orthogonal

    Attributes:
      init_r: the rank at first.
      target_r: the mean of the ranks in the end.
      lora_alpha: the update is scaled by `lora_alpha / (init_r + 1e-5)`.
      lora_dropout: rate of dropout on the input of `a`.
      tinit: steps before ranks begin to shrink.
      tfinal: steps at the end in which they stay as they are.
      deltaT: how many steps pass from one choice to the next.
      beta1: by what the mean importance of an entry remembers.
      beta2: likewise, of its uncertainty.
      orth_reg_weight: of the penalty, the mean of `‖aᵀa − I‖` and `‖b bᵀ − I‖` over the modules.
      total_step: steps of the training; needed by the optimizer.
      init_lora_weights: whether `e` starts at 0. Otherwise the output changes at once.
      rank_pattern: patterns of modules to their own rank, in place of `init_r`; the first that matches counts. The
        scale does not follow it.
    """

    delta_type = "adalora"
    default_modified_modules = ("attn.q", "attn.v", "conv")

    pattern_fields: ClassVar[tuple[str, ...]] = ("rank_pattern",)

    init_r: int = 12
    target_r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    init_lora_weights: bool = True
    rank_pattern: dict[str, int] | None = dataclasses.field(default=None, hash=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("init_r", "target_r", "deltaT"):
            require_positive_int(name, getattr(self, name))
        require_positive("lora_alpha", self.lora_alpha)
        require_probability("lora_dropout", self.lora_dropout)
        require_positive_ints("rank_pattern", self.rank_pattern)
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is between 0 and 1, got {getattr(self, name):g}.")
        for name in ("tinit", "tfinal", "orth_reg_weight"):
            if not 0 <= getattr(self, name) < 2**31:
                raise ValueError(f"{name} is at least 0 and below 2**31, got {shown(getattr(self, name))}.")
        if self.target_r > self.init_r:
            raise ValueError(f"target_r={self.target_r} is above init_r={self.init_r}: ranks shrink. Take a lower one.")
        if self.total_step is not None:
            if not 0 < self.total_step < 2**31:
                raise ValueError(f"total_step is at least 1 and below 2**31, got {shown(self.total_step)}.")
            if self.tinit >= self.total_step - self.tfinal:
                raise ValueError(
                    f"no steps are left in which ranks shrink: of total_step={self.total_step}, tinit={self.tinit} "
                    f"come before and tfinal={self.tfinal} after. Take fewer of these."
                )

    def rule(self, name: str) -> AdaLoraRule:
        rank = addressing.first_match(self.rank_pattern, name, self.init_r)
        scale = self.lora_alpha / (self.init_r + 1e-5)
        return AdaLoraRule(rank, scale, self.lora_dropout, self.init_lora_weights)

    def penalty(self, own: Mapping[Path, jax.Array]) -> jax.Array | float:
        far = []
        for path, e in own.items():
            if path[-1] == "e":
                a, b = matrices(own[(*path[:-1], "a")], e, own[(*path[:-1], "b")])
                far += [_distance(jnp.swapaxes(a, -1, -2) @ a), _distance(b @ jnp.swapaxes(b, -1, -2))]
        return self.orth_reg_weight * jnp.concatenate([each.ravel() for each in far]).mean() if far else 0.0

    def optimizer(self, tx: Any, leaves: Iterable[Path] = ()) -> Any:
        """The optimizer, which also chooses the entries of `e` that are set to 0."""
        if self.total_step is None:
            raise ValueError(
                "AdaLoRA's optimizer needs total_step, the number of steps, by which its ranks shrink. Give it to the "
                "configuration: AdaLoraModel(…, total_step=1000)."
            )
        budget = Budget(self.target_r, self.tinit, self.tfinal, self.deltaT, self.total_step, (self.beta1, self.beta2))
        return with_budget(tx, [path[:-1] for path in leaves if path[-1] == "e"], budget)


def _distance(gram: jax.Array) -> jax.Array:
    """`‖G − I‖` of each matrix, with a gradient of 0 where it is 0."""
    squared = jnp.sum((gram - jnp.eye(gram.shape[-1])) ** 2, axis=(-2, -1))
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1)), 0)
