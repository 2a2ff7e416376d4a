"""AdaLoRA's budget: which singular values stay, as an optax transformation (Zhang et al. 2023, arXiv 2303.10512).

The importance of an entry of a leaf is `|value · gradient|`, smoothed, times its smoothed uncertainty. That of a
triplet, a column of `a`, an entry of `e` and a row of `b`, is the sum of its means over these. What is in PEFT a call
of `update_and_allocate(step)` after each step of the optimizer, with steps from 0, happens in its update.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.core import meta

from jdelta.trees import surgery
from jdelta.trees.surgery import Path

NAMES = ("a", "e", "b")


@dataclasses.dataclass(frozen=True)
class Budget:
    """How many singular values are left, step by step.

    Attributes:
      target: the mean number for each matrix, in the end.
      first: steps before it shrinks.
      last: steps at the end in which nothing is chosen anew.
      every: how many steps pass from one choice to the next.
      total: the number of steps.
      betas: of the smoothing of importance and of uncertainty.
    """

    target: int
    first: int
    last: int
    every: int
    total: int
    betas: tuple[float, float]

    @property
    def end(self) -> int:
        """The step of the last choice."""
        return self.total - self.last

    def left(self, initial: int, matrices: int) -> np.ndarray:
        """The number that is left after each step, `(end + 1,)`: falling with the third power, rounded down.

        In float64: in float32 the numbers of long trainings would be rounded otherwise.
        """
        step, target = np.arange(self.end + 1), min(self.target * matrices, initial)
        share = np.clip(1 - (step - self.first) / (self.end - self.first), 0, 1)
        return ((initial - target) * share**3 + target).astype(np.int32)

    def chooses(self, step: jax.Array) -> jax.Array:
        """Whether it is chosen after a step which entries are set to 0."""
        return (step > self.first) & ((step == self.end) | ((step < self.end) & (step % self.every == 0)))


class BudgetState(NamedTuple):
    """The state of `with_budget`: by delta and name, `{path: {"a": …, "e": …, "b": …}}`.

    Attributes:
      inner: of the optimizer.
      step: how many steps were made.
      gradients: the sum of the gradients since the last step.
      seen: how many those are; more than one between the steps of `optax.MultiSteps`.
      importance: smoothed, of each entry.
      uncertainty: likewise.
      kept: whether each entry of `e` stays, by the last choice.
    """

    inner: Any
    step: jax.Array
    gradients: Any
    seen: jax.Array
    importance: Any
    uncertainty: Any
    kept: Any


def with_budget(tx: Any, hosts: Sequence[Path], budget: Budget) -> optax.GradientTransformationExtraArgs:
    """An optimizer after whose steps the singular values that matter least are 0.

    Args:
      tx: the optimizer of the factors, and of what else trains.
      hosts: where the triplets are: the paths of the delta's leaves without `"a"`, `"e"` and `"b"`.
      budget: how many stay.
    """

    def own(tree: Any) -> dict[str, dict[str, jax.Array]]:
        """The leaves of the triplets in a tree of what trains."""
        held = {path: leaf for path, leaf in surgery.parameters_of(tree).items() if jax.tree.leaves(leaf)}  # not masked
        return {
            surgery.name_of(host): {name: meta.unbox(held[*host, name]) for name in NAMES if (*host, name) in held}
            for host in hosts
        }

    def init(params: Any) -> BudgetState:
        mine = own(params)
        if lacking := [host for host, leaves in mine.items() if len(leaves) < len(NAMES)]:
            raise ValueError(f"AdaLoRA's budget needs all of a, e and b to train, and not all at {lacking[0]} do.")
        gradients, importance, uncertainty = (jax.tree.map(jnp.zeros_like, mine) for _ in range(3))  # to be donated
        step, seen = (jnp.zeros((), jnp.int32) for _ in range(2))
        kept = {host: jnp.ones(leaves["e"].shape, bool) for host, leaves in mine.items()}
        return BudgetState(tx.init(params), step, gradients, seen, importance, uncertainty, kept)

    def update(updates: Any, state: Any, params: Any = None, **more: Any) -> tuple[Any, BudgetState]:
        if params is None:
            raise ValueError("AdaLoRA's optimizer needs the parameters: tx.update(gradients, state, params).")
        gradients = jax.tree.map(jnp.add, state.gradients, own(updates))
        seen = state.seen + 1
        updates, inner = tx.update(updates, state.inner, params, **more)
        before, steps = own(params), own(updates)
        counted = state._replace(inner=inner, gradients=gradients, seen=seen)
        stepped, zeroed = _after_step(counted, jax.tree.map(jnp.add, before, steps), budget)
        if isinstance(tx, optax.MultiSteps):
            is_step = tx.has_updated(inner)
            stepped = jax.tree.map(lambda new, old: jnp.where(is_step, new, old), stepped, counted)
            zeroed = jax.tree.map(lambda mask: mask & is_step, zeroed)
        flat, begin = surgery.flatten(updates), surgery.root(updates)
        for host in hosts:
            name, path = surgery.name_of(host), (*begin, *host, "e")
            new = jnp.where(zeroed[name], -before[name]["e"], steps[name]["e"])
            flat[path] = surgery.in_box_of(flat[path], new)
        return surgery.unflatten(flat, like=updates), stepped

    return optax.GradientTransformationExtraArgs(init, update)


def _after_step(state: BudgetState, values: Any, budget: Budget) -> tuple[BudgetState, dict[str, jax.Array]]:
    """The state after a step, and which entries of `e` are set to 0."""
    step, (beta1, beta2) = state.step, budget.betas
    mean = jax.tree.map(lambda g: g / state.seen, state.gradients)
    now = jax.tree.map(lambda value, gradient: jnp.abs(value * gradient), values, mean)
    counts = step < budget.end
    importance = jax.tree.map(
        lambda old, new: jnp.where(counts, beta1 * old + (1 - beta1) * new, old), state.importance, now
    )
    uncertainty = jax.tree.map(
        lambda old, new, smooth: jnp.where(counts, beta2 * old + (1 - beta2) * jnp.abs(new - smooth), old),
        *(state.uncertainty, now, importance),
    )
    score = _scores(jax.tree.map(jnp.multiply, importance, uncertainty))
    every = jnp.sort(jnp.concatenate([each.ravel() for each in score.values()]))
    matrices = sum(each.size // each.shape[-1] for each in score.values())
    fall = len(every) - jnp.asarray(budget.left(len(every), matrices))[jnp.minimum(step, budget.end)]
    threshold = jnp.where(fall > 0, every[jnp.maximum(fall - 1, 0)], -jnp.inf)
    chooses = budget.chooses(step)
    kept = {host: jnp.where(chooses, score[host] > threshold, state.kept[host]) for host in score}
    zeroed = {host: ~kept[host] & (chooses | (step > budget.end)) for host in score}
    new = BudgetState(
        *(state.inner, step + 1, jax.tree.map(jnp.zeros_like, state.gradients), jnp.zeros_like(state.seen)),
        *(importance, uncertainty, kept),
    )
    return new, zeroed


def _scores(entries: Mapping[str, Mapping[str, jax.Array]]) -> dict[str, jax.Array]:
    """The importance of each triplet, `(*layers, r)`."""
    found = {}
    for host, leaves in entries.items():
        a, b = matrices(**leaves)
        found[host] = leaves["e"] + a.mean(axis=-2) + b.mean(axis=-1)
    return found


def matrices(a: jax.Array, e: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`a` as `(*layers, d_in, r)` and `b` as `(*layers, r, d_out)`, for `e`, `(*layers, r)`."""
    *layers, rank = e.shape
    return a.reshape(*layers, -1, rank), b.reshape(*layers, rank, -1)
