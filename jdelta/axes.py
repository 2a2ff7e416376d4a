"""Which axis of which weights the features of an activation come from, so that a delta's leaves can be split alike."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from jdelta.structure import ModuleInfo, Structure
from jdelta.surgery import Path


class Axis(NamedTuple):
    """One axis of one of the backbone's leaves.

    Attributes:
      leaf: path of the leaf.
      number: which of its axes, as the module itself sees it: inside `nn.scan` without the layer axis.
    """

    leaf: Path
    number: int


Axes = tuple[Axis | None, ...]  # None: an axis that no weights have


def of_input(host: ModuleInfo, structure: Structure) -> Axes:
    """The axes of weights that the features of a module's input meet; of a block, those in the first module in it."""
    known = _of_weights(host)
    if known is not None:
        return known[0]
    inside = [info for info in structure.below(host.path)[1:] if _width(info, "x") == _width(host, "x")]
    return next((found[0][-1:] for info in _linear_first(inside) if (found := _of_weights(info))), (None,))


def of_output(host: ModuleInfo, structure: Structure) -> Axes:
    """The axes of weights that the features of an output come from; of a block, those in the last module in it."""
    known = _of_weights(host)
    if known is not None:
        return known[1]
    inside = [info for info in reversed(structure.below(host.path)[1:]) if _width(info, "y") == _width(host, "y")]
    return next((found[1][-1:] for info in _linear_first(inside) if (found := _of_weights(info))), (None,))


def is_transposed(host: ModuleInfo) -> bool:
    """Whether a module with a kernel of two axes stores the output's axis first; asked of the module, if need be."""
    if issubclass(host.type, (nn.Dense, nn.DenseGeneral)):
        return False
    if (d := host.x.shape[-1]) != host.params["kernel"].shape[0]:
        return True
    if d != host.params["kernel"].shape[1]:
        return False
    with jax.ensure_compile_time_eval():
        key_kernel, key_x = jax.random.split(jax.random.key(0))
        kernel, x = jax.random.normal(key_kernel, (d, d)), jax.random.normal(key_x, (1, d))
        given = {key: jnp.zeros(leaf.shape) for key, leaf in host.params.items()} | {"kernel": kernel}
        y = host.type(**host.fields, parent=None).apply({"params": given}, x)
        return bool(jnp.abs(y - x @ kernel).sum() > jnp.abs(y - x @ kernel.T).sum())


def _of_weights(host: ModuleInfo) -> tuple[Axes, Axes] | None:
    """The axes of input and output among those of the module's own weights; `None` if that is not known."""
    if issubclass(host.type, nn.Embed):
        return _split(host, "embedding", 1)
    kernel = host.params.get("kernel")
    if kernel is None:
        vector = next((key for key in ("scale", "weight") if key in host.params), None)
        fits = vector is not None and host.params[vector].shape == (_width(host, "y"),)
        return ((Axis((*host.path, vector), 0),),) * 2 if fits and vector is not None else None
    if issubclass(host.type, nn.Conv):
        window = len(kernel.shape) - 2
        return (Axis((*host.path, "kernel"), window),), (Axis((*host.path, "kernel"), window + 1),)
    if issubclass(host.type, nn.DenseGeneral):
        axis, batch = host.fields["axis"], host.fields["batch_dims"]
        return _split(host, "kernel", 1 if isinstance(axis, int) else len(axis)) if not batch else None
    if "einsum_str" in host.fields or len(kernel.shape) != 2:
        return None
    if {_width(host, "x"), _width(host, "y")} != set(kernel.shape):
        return None
    x, y = _split(host, "kernel", 1)
    return (y, x) if is_transposed(host) else (x, y)


def _split(host: ModuleInfo, key: str, inputs: int) -> tuple[Axes, Axes]:
    """The axes of a leaf, of which the first are the input's."""
    axes = tuple(Axis((*host.path, key), i) for i in range(len(host.params[key].shape)))
    return axes[:inputs], axes[inputs:]


def _linear_first(modules: list[ModuleInfo]) -> list[ModuleInfo]:
    """In the same order, but normalisations, whose scales are often whole where kernels are split, at the end."""
    return sorted(modules, key=lambda info: "kernel" not in info.params)


def _width(info: ModuleInfo, side: str) -> Any:
    """The number of features; `None` where there is no array."""
    try:
        return getattr(info, side).shape[-1]
    except (TypeError, IndexError):
        return None
