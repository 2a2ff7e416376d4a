"""Starts of LoRA from data: EVA from the inputs of modules, CorDA from these and the weight, LoRA-GA from gradients.

Numbers agree with PyTorch PEFT's for the same sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jdelta.core.config import shown
from jdelta.core.data_starts import DataStart, Sums
from jdelta.core.edits import Edit, WeightEdit
from jdelta.core.structure import Structure
from jdelta.core.weights import layout_of
from jdelta.methods.lora_rules import LoraRule, padded
from jdelta.trees import addressing, surgery


@dataclasses.dataclass(frozen=True)
class EvaStart(DataStart):
    """`a` at the leading principal components of the module's inputs, `b` at 0, so that the output is unchanged.

        delta = jdelta.LoraModel(model, lora_r=8, init_lora_weights="eva")
        delta.init_from_data(batches, rho=2.0)

    EVA, Paischer et al. 2024, arXiv 2410.07170. Ranks are shared out: of all components, those that explain the largest
    shares of their inputs' variance are taken, as many as the ranks sum up to. The delta then has `rank_pattern` and
    `alpha_pattern`, and modules that get no rank are none of its `targets` any more. Layers inside `nn.scan` have one
    rank, by the mean of their shares.

    Attributes:
      rho: up to how many times its rank a module may get; with 1, ranks stay as they are.
      whiten: divide components by the root of their singular values.
      adjust_alpha: multiply `lora_alpha` as the rank, so that the scale stays.
    """

    rho: float = 2.0
    whiten: bool = False
    adjust_alpha: bool = True

    sums: ClassVar[Literal["inputs", "gradients"]] = "inputs"

    def __post_init__(self) -> None:
        if not self.rho >= 1:
            raise ValueError(f"init_from_data: rho is 1 or more, got {shown(self.rho)}.")

    def check(self, edit: Edit) -> None:
        _require_factors(edit)

    def of_inputs(self, x: jax.Array) -> Sums:
        return {"gram": _product(x.T, x), "total": jnp.sum(x, axis=0, keepdims=True)}

    def adapted(self, method: Any, structure: Structure, found: Mapping[Edit, Sums]) -> Any:
        if self.rho == 1:
            return method
        if any(isinstance(value, jax.core.Tracer) for sums in found.values() for value in sums.values()):
            raise ValueError("init_from_data: inside jax.jit ranks cannot follow from values. Pass rho=1.")
        names = {surgery.name_of(edit.host): (edit, sums) for edit, sums in found.items()}
        before = {name: method.rank_of(name) for name in names}
        limits = {name: round(rank * self.rho) for name, rank in before.items()}
        shares = {name: _shares(edit, sums, limits[name]) for name, (edit, sums) in names.items()}
        costs = {name: sums["count"].size for name, (_, sums) in names.items()}  # how many layers have the rank
        ranks = _shared_out(shares, before, costs)
        if ranks == before:
            return method
        patterns = {name: addressing.exact(name, structure.modules) for name, rank in ranks.items() if rank}
        alphas = {
            name: method.alpha_of(name) * (ranks[name] / before[name] if self.adjust_alpha else 1) for name in patterns
        }
        return dataclasses.replace(
            method,
            modified_modules=tuple(patterns.values()),
            common_structure=None,
            rank_pattern={p: ranks[name] for name, p in patterns.items() if ranks[name] != method.lora_r} or None,
            alpha_pattern={p: alphas[name] for name, p in patterns.items() if alphas[name] != method.lora_alpha}
            or None,
        )

    def init(self, edit: Edit, key: jax.Array, weight: Any, own: Sums, sums: Sums) -> Sums:
        variances, components = _principal(sums)
        rank = own["a"].shape[-1]
        if self.whiten:
            components = components / jnp.sqrt(jnp.sqrt(jnp.maximum(variances, jnp.finfo(jnp.float32).tiny)))
        a, b = padded(components[:, :rank], jnp.zeros_like(own["b"]), rank)
        return _started(weight, own, a, b)


@dataclasses.dataclass(frozen=True)
class CordaStart(DataStart):
    """`a b` at a part of the weight, chosen by the covariance of the module's inputs. That part is subtracted.

        delta = jdelta.LoraModel(model, lora_r=8, init_lora_weights="corda")
        delta.init_from_data(batches, mode="kpm")

    CorDA, Yang et al. 2024, arXiv 2406.05223: of the SVD of `C W`, where `C` is the covariance, the leading vectors
    (`"ipm"`, for a new task) or the last ones (`"kpm"`, which keeps what the batches ask for), times `C⁻¹`. As in the
    authors' code, the inputs of each call are divided by their largest value, and `C` gets a small diagonal.

    Attributes:
      mode: `"ipm"` or `"kpm"`.
    """

    mode: Literal["ipm", "kpm"] = "ipm"

    sums: ClassVar[Literal["inputs", "gradients"]] = "inputs"

    def __post_init__(self) -> None:
        _require_choice("mode", self.mode, ("ipm", "kpm"))

    def check(self, edit: Edit) -> None:
        _require_factors(edit)

    def of_inputs(self, x: jax.Array) -> Sums:
        largest = jnp.abs(jnp.max(x))
        x = x / jnp.where(largest > 0, largest, 1)
        return {"covariance": _product(x.T, x), "calls": jnp.ones((1, 1))}

    def init(self, edit: Edit, key: jax.Array, weight: Any, own: Sums, sums: Sums) -> Sums:
        rule, rank = _rule_of(edit), own["a"].shape[-1]
        covariance, inverse = _inverted(sums["covariance"] / sums["calls"])
        u, s, v = jnp.linalg.svd(_product(covariance, weight), full_matrices=False)
        part = slice(0, rank) if self.mode == "ipm" else slice(max(len(s) - rank, 0), len(s))
        root = jnp.sqrt(s[part] / rule.scale)
        return _started(weight, own, *padded(_product(inverse, u[:, part]) * root, root[:, None] * v[part], rank))


@dataclasses.dataclass(frozen=True)
class LoraGaStart(DataStart):
    """`a` and `b` at singular vectors of the weight's gradient. Their product is subtracted from the weight.

        delta = jdelta.LoraModel(model, lora_r=8, init_lora_weights="lora_ga")
        delta.init_from_data(batches, loss)

    LoRA-GA, Wang et al. 2024, arXiv 2407.05000; PEFT's numbers: its `b` is multiplied by the singular values too. PEFT
    takes a randomised SVD, this one is exact.

    Attributes:
      direction: which of the leading `2 r` vectors: `"ArB2r"`, the first `r` for `a` and the others for `b`; `"A2rBr"`,
        the other way round; `"ArBr"`, in turns; `"random"`, the same `r` for both.
      scale: `"stable"`: `b` times `d_out^¼ / √gamma`; `"weight_svd"`: so that `b` begins with the weight's largest
        singular value; `"gd_scale"`: both by LoRA's scale; `"unit"`.
      gamma: of `"stable"`.
    """

    direction: Literal["ArB2r", "A2rBr", "ArBr", "random"] = "ArB2r"
    scale: Literal["stable", "weight_svd", "gd_scale", "unit"] = "stable"
    gamma: float = 16

    sums: ClassVar[Literal["inputs", "gradients"]] = "gradients"

    def __post_init__(self) -> None:
        _require_choice("direction", self.direction, ("ArB2r", "A2rBr", "ArBr", "random"))
        _require_choice("scale", self.scale, ("stable", "weight_svd", "gd_scale", "unit"))
        if not self.gamma > 0:
            raise ValueError(f"init_from_data: gamma is above 0, got {shown(self.gamma)}.")

    def check(self, edit: Edit) -> None:
        assert isinstance(edit, WeightEdit)
        rank, shape = _require_factors(edit).rank, layout_of(edit).matrix_shape(edit.shape)
        if 2 * rank > min(shape):
            raise ValueError(
                f"LoRA-GA takes 2 · {rank} singular vectors of the gradient, which is {shape[0]} by {shape[1]}: take "
                f"lora_r={min(shape) // 2} or less there, by rank_pattern for example."
            )

    def init(self, edit: Edit, key: jax.Array, weight: Any, own: Sums, sums: Sums) -> Sums:
        rule, r = _rule_of(edit), own["a"].shape[-1]
        u, s, v = jnp.linalg.svd(sums["gradient"], full_matrices=False)
        chosen = jax.random.permutation(key, 2 * r)[:r]
        of_a, of_b = {
            "ArB2r": (jnp.arange(r), jnp.arange(r, 2 * r)),
            "A2rBr": (jnp.arange(r, 2 * r), jnp.arange(r)),
            "ArBr": (jnp.arange(1, 2 * r, 2), jnp.arange(0, 2 * r, 2)),
            "random": (chosen, chosen),
        }[self.direction]
        a, b = u[:, of_a], s[of_b, None] * v[of_b]
        if self.scale == "stable":
            b = b * (weight.shape[1] ** 0.25 / self.gamma**0.5)
        elif self.scale == "weight_svd":
            largest = jnp.linalg.svd(weight, compute_uv=False)[0]
            b = b * jnp.where(s[of_b[0]] > 0, largest / s[of_b[0]], 1)
        elif self.scale == "gd_scale":
            a, b = a / rule.scale, b / rule.scale
        return _started(weight, own, a, b)


STARTS = {"eva": EvaStart, "corda": CordaStart, "lora_ga": LoraGaStart}


def data_start(start: bool | str, options: Mapping[str, Any]) -> DataStart:
    """The start from data of this `init_lora_weights`. Raises `TypeError` or `ValueError` if there is none such."""
    kind = STARTS.get(start) if isinstance(start, str) else None
    if kind is None:
        raise ValueError(
            f"init_from_data: LoRA with init_lora_weights={shown(start)} does not start from data. Those that do are "
            f"{', '.join(map(repr, STARTS))}."
        )
    known = [field.name for field in dataclasses.fields(kind)]
    if unknown := options.keys() - {*known}:
        raise TypeError(f"init_from_data: {start!r} has no option {min(unknown)!r}. It has {', '.join(known)}.")
    made: DataStart = kind(**options)
    return made


# --- what they share


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _started(weight: jax.Array, own: Sums, a: jax.Array, b: jax.Array) -> Sums:
    """The leaves of which the change is 0 now."""
    new = {"a": a, "b": b}
    if "a0" in own:
        new |= {"a0": a, "b0": b}
    if "m" in own:
        new["m"] = jnp.linalg.norm(weight, axis=0)
    return new


def _principal(sums: Sums) -> tuple[jax.Array, jax.Array]:
    """The variances of the inputs, times their number, largest first, and the components `(d_in, d_in)`.

    The largest entry of each component is positive, as in PEFT.
    """
    centred = sums["gram"] - _product(sums["total"].T, sums["total"]) / jnp.reshape(sums["count"], ())
    variances, components = jnp.linalg.eigh(centred)
    variances, components = jnp.maximum(variances[::-1], 0), components[:, ::-1]
    largest = jnp.take_along_axis(components, jnp.argmax(jnp.abs(components), axis=0)[None], axis=0)
    return variances, components * jnp.sign(largest)


def _shares(edit: Edit, sums: Sums, limit: int) -> list[float]:
    """The shares of variance of the leading components, in each of the layers: their mean."""
    assert isinstance(edit, WeightEdit)
    run: Any = lambda sums: _principal(sums)[0]  # noqa: E731
    for axis in edit.layers:
        run = jax.vmap(run, axis)
    variances = jax.jit(run)(dict(sums))
    every = variances.reshape(-1, variances.shape[-1])
    shares = every / jnp.maximum(jnp.sum(every, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    n = min(limit, *layout_of(edit).matrix_shape(edit.shape))
    return [float(share) for share in jnp.mean(shares, axis=0)[:n]]


def _shared_out(
    shares: Mapping[str, list[float]], ranks: Mapping[str, int], costs: Mapping[str, int]
) -> dict[str, int]:
    """The ranks by which the largest shares are taken, as many as the ranks that were there sum up to."""
    every = [(share, name) for name, of in shares.items() for share in of]
    taken, left = dict.fromkeys(ranks, 0), sum(rank * costs[name] for name, rank in ranks.items())
    for _, name in sorted(every, key=lambda one: -one[0]):  # equal ones in the order of execution
        if costs[name] <= left:
            taken[name] += 1
            left -= costs[name]
    return taken


def _inverted(covariance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The covariance with a diagonal by which it can be inverted, and its inverse."""
    identity = jnp.eye(len(covariance))

    def damped(damp: jax.Array) -> tuple[jax.Array, jax.Array]:
        fixed = covariance + identity * jnp.mean(jnp.diag(covariance)) * damp
        return fixed, jnp.linalg.inv(fixed)

    def is_off(damp: jax.Array) -> jax.Array:
        fixed, inverse = damped(damp)
        return ~(jnp.linalg.norm(_product(fixed, inverse) - identity) < 0.05) & (damp < 1e6)

    return damped(jax.lax.while_loop(is_off, lambda damp: 2 * damp, jnp.float32(0.01)))


def _rule_of(edit: Edit) -> LoraRule:
    assert isinstance(edit, WeightEdit)
    rule: LoraRule = edit.rule
    return rule


def _require_factors(edit: Edit) -> LoraRule:
    """The rule of an edit. Raises `ValueError` for an embedding."""
    rule = _rule_of(edit)
    if rule.of_rows:
        raise ValueError(
            "an embedding has no vectors of inputs, and does not start from data. Leave it out, and give it a LoRA of "
            "its own."
        )
    return rule


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"init_from_data: {name} is one of {', '.join(map(repr, choices))}, got {shown(value)}.")
