"""The linear modules of flax.linen, by their classes and the fields which leave them linear."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

from flax import linen as nn

from jdelta.core import linear
from jdelta.core.linear_maps import LinearMap
from jdelta.core.linear_types import conv, conv_transpose, dense, einsum, embed, over_axes
from jdelta.core.structure import ModuleInfo

_SHARED = ("use_bias", "dtype", "param_dtype", "precision", "kernel_init", "bias_init")
_CONV = ("features", "kernel_size", "strides", "padding", "input_dilation", "kernel_dilation", "feature_group_count")


def install() -> None:
    """Registers them."""
    _register(nn.Dense, dense, {"features", *_SHARED})
    _register(nn.DenseGeneral, _dense_general, {"features", "axis", "batch_dims", *_SHARED})
    _register(nn.Einsum, einsum, {"shape", "einsum_str", *_SHARED})
    _register(nn.Conv, conv, {*_CONV, *_SHARED})
    _register(nn.Embed, embed, {"num_embeddings", "features", "dtype", "param_dtype", "embedding_init"})
    linear.register_known(nn.ConvTranspose, conv_transpose, None, {})


def _dense_general(host: ModuleInfo) -> LinearMap:
    if host.fields["batch_dims"]:
        raise TypeError("this one is a DenseGeneral with batch_dims, which are not supported.")
    return over_axes(host, host.fields["axis"])


def _register(
    module_type: type[nn.Module], describe: Callable[[ModuleInfo], LinearMap], plain: Collection[str]
) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(module_type)}
    linear.register_known(module_type, describe, plain, defaults)
