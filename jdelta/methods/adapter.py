"""Adapter: a small network after a module (Houlsby et al. 2019, arXiv 1902.00751).

`y + up(act(down(y)))`, initialised like OpenDelta's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import jax

from jdelta.core.config import require_positive_int
from jdelta.core.edits import CallEdit
from jdelta.core.method import Method
from jdelta.core.structure import ModuleInfo, Structure
from jdelta.methods.bottleneck import Bottleneck, require_non_linearity


@dataclasses.dataclass(frozen=True)
class AdapterConfig(Method):
    """Arguments of Adapter.

        config = jdelta.AdapterConfig(bottleneck_dim=16)
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    Attributes:
      bottleneck_dim: width in the middle.
      non_linearity: gelu_new, gelu, relu, silu, tanh, …
      zero_up: start `up` at 0, so that the output is unchanged at initialisation. By default its kernel is
        N(0, 0.01²) as in the paper, and the output is changed a little.
    """

    delta_type = "adapter"
    default_modified_modules = ("attn.proj", "ff.w2", "block")  # block: of ResNet and its like

    bottleneck_dim: int = 24
    non_linearity: str = "gelu_new"
    zero_up: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_int("bottleneck_dim", self.bottleneck_dim)
        require_non_linearity(self.non_linearity)

    def edits(self, host: ModuleInfo, structure: Structure) -> Iterable[CallEdit]:
        layer = Adapter(self.bottleneck_dim, non_linearity=self.non_linearity, zero_up=self.zero_up)
        yield CallEdit(host.path, "after", layer)


class Adapter(Bottleneck):
    """`y + scale · up(act(down(y)))`."""

    def __call__(self, y: jax.Array) -> jax.Array:
        return y + super().__call__(y)
