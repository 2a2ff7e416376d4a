"""How the layers lay out their input for a product."""

from __future__ import annotations

import jax


def rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape to give the axes before those of a product.

    On a CPU one axis, since XLA is ten times slower there at the gradient of a product over several. Elsewhere they
    stay as they are: if a mesh splits the sequence, it cannot be joined with the batch without being gathered.
    """
    return (-1,) if jax.default_backend() == "cpu" else shape
