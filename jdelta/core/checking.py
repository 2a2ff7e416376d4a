"""Whether a rule's `product` is what its `update` means: compared on random numbers, on demand."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdelta.core import weights
from jdelta.core.context import Context
from jdelta.core.edits import Edit, WeightEdit
from jdelta.core.rules import HasProduct, name_of, uses_context
from jdelta.core.state import DeltaState
from jdelta.core.structure import Structure
from jdelta.trees import surgery

_checking: contextvars.ContextVar[bool] = contextvars.ContextVar("checking", default=False)
TOLERANCE = 1e-4  # of the largest entry: both are sums in float32, in another order


@contextlib.contextmanager
def checking_products() -> Iterator[None]:
    """While this lasts, attaching a delta compares each rule's `product` with its `update`, for tests of a method.

        with jdelta.checking_products():
            delta = jdelta.DeltaModel(model, ["query"], method=MyMethod())

    Inputs, weights and the delta's leaves are random float32 numbers in the shapes of each module.

    Raises:
      ValueError: by attaching, if a product is another one. It names the module and the rule; the model is as it was.
    """
    token = _checking.set(True)
    try:
        yield
    finally:
        _checking.reset(token)


def check_products(state: DeltaState) -> None:
    """Compares each rule's `product` with its `update` on random numbers, as `jdelta.checking_products` does.

        delta.check_products()

    Raises:
      RuntimeError: the delta is detached.
      ValueError: a product is another one. It names the module and the rule.
    """
    check(state.active("checked").edits, state.structure)


def check_if_asked(edits: Sequence[Edit], structure: Structure) -> None:
    """`check`, while `checking_products` lasts."""
    if _checking.get():
        check(edits, structure)


def check(edits: Sequence[Edit], structure: Structure) -> None:
    """Compares the products of some edits with their updates."""
    for edit in edits:
        if isinstance(edit, WeightEdit) and edit.in_call and isinstance(edit.rule, HasProduct):
            _check(edit, structure)


def _check(edit: WeightEdit, structure: Structure) -> None:
    draw = np.random.default_rng(0)

    def random(shape: tuple[int, ...]) -> jax.Array:
        return jnp.asarray(draw.standard_normal(shape), jnp.float32)

    host = structure[surgery.name_of(edit.host)]
    leaf = random(edit.shape)
    if jnp.issubdtype(host.x.dtype, jnp.integer):
        x = jnp.asarray(draw.integers(0, edit.shape[0], host.x.shape))
    else:
        x = random(host.x.shape)
    shapes = weights.own_shapes(edit)
    own = {name: random(leaf.shape) for name, leaf in shapes.items() if leaf.dtype == jnp.float32}
    if len(own) < len(shapes):  # whole numbers are not any
        own = {**weights.init(dataclasses.replace(edit, layers=()), jax.random.key(0), leaf), **own}
    told: dict[str, Any] = {"context": Context()} if uses_context(edit.rule) else {}
    with jax.ensure_compile_time_eval(), jax.default_matmul_precision("highest"):
        y = edit.linear.product(x, leaf)
        found = weights.product(edit, x, y, weights.seen_own(edit, own), leaf, told)
        if found is None:  # the rule prefers its update here
            return
        want = edit.linear.product(x, weights.update(dataclasses.replace(edit, layers=()), leaf, own))
    where = f"{name_of(edit.rule)} at {host.name}"
    if found.shape != want.shape:
        raise ValueError(f"{where}: product gives shape {found.shape}, and x·update has {want.shape}.")
    off, largest = (float(jnp.abs(value).max()) for value in (found - want, want))
    if not off <= TOLERANCE * max(largest, 1.0):
        raise ValueError(
            f"{where}: on random numbers product differs from x·update by {off:.2g}, where x·update is up to "
            f"{largest:.2g}. They have to be equal: update is what merging adds."
        )
