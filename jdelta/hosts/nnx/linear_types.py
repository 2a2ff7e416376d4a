"""The linear modules of flax.nnx, by their classes and the static attributes which leave them linear."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection

from flax import nnx

from jdelta.core import linear
from jdelta.core.linear_maps import LinearMap
from jdelta.core.linear_types import conv, conv_transpose, dense, einsum, embed, over_axes
from jdelta.core.structure import ModuleInfo

_SHARED = ("use_bias", "dtype", "param_dtype", "precision")
_WINDOWS = ("kernel_shape", "kernel_size", "strides", "padding", "input_dilation", "kernel_dilation")


def install() -> None:
    """Registers them."""
    _register(nnx.Linear, dense, {"in_features", "out_features", *_SHARED})
    _register(nnx.LinearGeneral, _linear_general, {"in_features", "out_features", "axis", "batch_axis", *_SHARED})
    _register(nnx.Einsum, einsum, {"einsum_str", "kernel_shape", "bias_shape", *_SHARED})
    _register(nnx.Conv, conv, {"in_features", "out_features", "feature_group_count", *_WINDOWS, *_SHARED})
    _register(nnx.Embed, embed, {"num_embeddings", "features", "dtype", "param_dtype"})
    linear.register_known(nnx.ConvTranspose, conv_transpose, None, {})


def _linear_general(host: ModuleInfo) -> LinearMap:
    if host.fields["batch_axis"]:
        raise TypeError("this one is a LinearGeneral with batch_axis, which is not supported.")
    return over_axes(host, host.fields["axis"])


def _register(
    module_type: type[nnx.Module], describe: Callable[[ModuleInfo], LinearMap], plain: Collection[str]
) -> None:
    # Arguments of the constructor are attributes of the same names.
    parameters = inspect.signature(module_type.__init__).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    linear.register_known(module_type, describe, plain, defaults)
