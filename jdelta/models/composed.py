"""Several methods as one delta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import chex

from jdelta.core.method import Method
from jdelta.delta import DeltaModel
from jdelta.hosts.nnx.adapter import DummyInputs
from jdelta.methods.composed import ComposedConfig


class ComposedModel(DeltaModel):
    """Several methods as one delta: one name, one folder, one thing to freeze, detach and save. See `jdelta.compose`.

        delta = jdelta.ComposedModel(model, methods=(jdelta.LoraConfig(lora_r=8), jdelta.AdapterConfig()))

    Each method's leaves are below its name: `composed/lora/a`, `composed/adapter/down/kernel`. Its own arguments are
    those of `ComposedConfig`, the common ones and errors those of `DeltaModel`.
    """

    method_class = ComposedConfig


def compose(
    backbone_model: Any,
    methods: Sequence[Method],
    exclude_modules: Sequence[str] | None = None,
    unfrozen_modules: Sequence[str] | None = None,
    name: str | None = None,
    rng: int | chex.PRNGKey = 0,
    dummy_inputs: DummyInputs | None = None,
) -> ComposedModel:
    """Attaches several methods as one delta.

        mam = jdelta.compose(model, [
            jdelta.PrefixConfig(prefix_token_num=30),
            jdelta.ParallelAdapterConfig(modified_modules=["ff.w1", "ff.w2"], common_structure=True, scaled=4.0),
        ])  # the Mix-And-Match adapter (He et al. 2021, arXiv 2110.04366)

    It computes what the methods attached one by one do. It merges if all of them do.

    Args:
      backbone_model, exclude_modules, unfrozen_modules, name, rng, dummy_inputs: as those of `DeltaModel`.
      methods: the configurations of the methods, at least two. Each says itself which modules it is at, or is at its
        default positions.

    Raises:
      TypeError: one of the methods is no configuration; otherwise as `DeltaModel`.
      ValueError: fewer than two methods, a composition among them, or one that starts from data; otherwise as
        `DeltaModel`. Nothing is attached then.
    """
    return ComposedModel(
        backbone_model,
        methods=tuple(methods),
        exclude_modules=exclude_modules,
        unfrozen_modules=unfrozen_modules,
        name=name,
        rng=rng,
        dummy_inputs=dummy_inputs,
    )
