"""Parallel adapter: a small network beside a span of modules (He et al. 2021, arXiv 2110.04366).

`y_end + scaled · up(act(down(x_start)))`, from the input of one module to the output of a later one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import jax.numpy as jnp

from jdelta.core.config import require_positive_int
from jdelta.core.edits import CallEdit
from jdelta.core.method import Method, Site
from jdelta.core.structure import ModuleInfo
from jdelta.methods.bottleneck import Bottleneck, require_non_linearity


@dataclasses.dataclass(frozen=True)
class ParallelAdapterConfig(Method):
    """Arguments of ParallelAdapter.

        config = jdelta.ParallelAdapterConfig(bottleneck_dim=16)
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    Attributes:
      bottleneck_dim: width in the middle.
      non_linearity: gelu_new, gelu, relu, silu, tanh, …
      scaled: factor of the adapter's output.
      zero_up: start `up` at 0, so that the output is unchanged at initialisation; by default N(0, 0.01²).
    """

    delta_type = "parallel_adapter"
    default_modified_modules = ("attn", "attn", "ff.w1", "ff.w2")

    bottleneck_dim: int = 24
    non_linearity: str = "gelu_new"
    scaled: float = 1.0
    zero_up: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("bottleneck_dim", self.bottleneck_dim)
        require_non_linearity(self.non_linearity)

    def place(self, site: Site, patterns: Sequence[str]) -> Iterable[CallEdit]:
        if isinstance(patterns, str) or len(patterns) % 2:
            raise ValueError(
                f"ParallelAdapterModel takes pairs of patterns, from and to; got {patterns!r}. "
                "To span single modules, write each pattern twice."
            )
        for start, end in zip(patterns[::2], patterns[1::2], strict=True):
            for first, last in _pair(site.find([start]), site.find([end]), list(site.structure)):
                try:
                    yield self._span(first, last)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{self.described()} from {first.name} to {last.name}: {error}") from error

    def _span(self, start: ModuleInfo, end: ModuleInfo) -> CallEdit:
        if not jnp.issubdtype(start.x.dtype, jnp.floating):
            raise TypeError(f"the first takes an array of {start.x.dtype}; needs floats.")
        if start.x.shape[:-1] != end.y.shape[:-1]:
            raise ValueError(f"such a span does not fit: input {start.x.shape}, output {end.y.shape}.")
        layer = Bottleneck(
            self.bottleneck_dim,
            features=end.y.shape[-1],
            non_linearity=self.non_linearity,
            scale=self.scaled,
            zero_up=self.zero_up,
        )
        return CallEdit(end.path, "parallel", layer, span_input=start.path)


def _pair(
    starts: Sequence[ModuleInfo], ends: Sequence[ModuleInfo], order: Sequence[ModuleInfo]
) -> Iterable[tuple[ModuleInfo, ModuleInfo]]:
    """Each end with the nearest start at or before it, in order of execution; no start serves twice."""
    place = {info.path: i for i, info in enumerate(order)}
    used = -1
    for end in ends:
        before = [start for start in starts if used < place[start.path] <= place[end.path]]
        if not before:
            raise ValueError(f"no module of {[s.name for s in starts][:3]} runs before {end.name} to start its span.")
        used = place[before[-1].path]
        yield before[-1], end
