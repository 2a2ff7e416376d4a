"""The methods that change weights, a row each, for the tests that go through all of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest

import jdelta
from jdelta.methods.adalora import AdaLoraRule
from jdelta.methods.c3a import C3ARule
from jdelta.methods.delora import DeloraRule
from jdelta.methods.fourierft import FourierFTRule
from jdelta.methods.gralora import GraLoraRule
from jdelta.methods.hira import HiraRule
from jdelta.methods.hra import HRARule
from jdelta.methods.ia3 import IA3Rule
from jdelta.methods.loha import LohaRule
from jdelta.methods.lokr import LokrRule
from jdelta.methods.lora_rules import DoraRule, LoraRule
from jdelta.methods.miss import BatRule, MissRule
from jdelta.methods.oft import OFTRule
from jdelta.methods.randlora import RandLoraRule
from jdelta.methods.road import RoadRule
from jdelta.methods.shira import ShiraRule
from jdelta.methods.vera import VeraRule


@dataclasses.dataclass(frozen=True)
class Row:
    """A method.

    Attributes:
      model: its constructor.
      arguments: small ones; its default positions are those of LoRA, or in `modules`.
      rule: makes its rule for the tests of rules, of a module whose widths are multiples of nothing in particular;
        `None` if it needs more than its own leaves.
      starts_at_identity: whether the output is unchanged at initialisation.
      only: host kinds of `test_rules` that it takes; `None`: all.
      nnx_modules: of the network in `nnx_networks`, those that it takes: the last has an odd number of outputs.
    """

    model: Any
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rule: Callable[[], Any] | None = None
    starts_at_identity: bool = True
    only: tuple[str, ...] | None = None
    nnx_modules: tuple[str, ...] = ("dense", "product", "heads.0")


# Features that come in have to be in the last axes: not those of convolutions, embeddings and axes of experts.
FEATURES_IN = (
    *("Dense", "DenseGeneral out", "DenseGeneral in", "Einsum heads"),
    *("nnx Linear", "nnx LinearGeneral", "nnx Einsum", "nnx Einsum w"),
)
# Features that come out can be anything but those of experts, and of channels that are convolved in groups.
FEATURES_OUT = (*FEATURES_IN, "Conv", "Embed", "nnx Conv", "nnx Embed")
# Both numbers of features are even.
EVEN = ("DenseGeneral in", "Conv", "grouped Conv", "nnx LinearGeneral", "nnx Conv")
METHODS = {
    "lora": Row(jdelta.LoraModel, {"lora_r": 2}, lambda: LoraRule(rank=2, scale=1.5)),
    "dora": Row(jdelta.LoraModel, {"lora_r": 2, "use_dora": True}, lambda: DoraRule(rank=2, scale=1.5)),
    "pissa": Row(jdelta.LoraModel, {"lora_r": 2, "init_lora_weights": "pissa"}, lambda: LoraRule(2, 2, start="pissa")),
    "olora": Row(jdelta.LoraModel, {"lora_r": 2, "init_lora_weights": "olora"}),
    "orthogonal": Row(jdelta.LoraModel, {"lora_r": 2, "init_lora_weights": "orthogonal"}),
    "adalora": Row(jdelta.AdaLoraModel, {"init_r": 2, "target_r": 1}, lambda: AdaLoraRule(rank=2, scale=1.5)),
    "hira": Row(jdelta.HiraModel, {"r": 2}, lambda: HiraRule(rank=2)),
    "loha": Row(jdelta.LohaModel, {"r": 2, "alpha": 6}, lambda: LohaRule(rank=2, scale=1.5)),
    "lokr": Row(jdelta.LokrModel, {"r": 2, "alpha": 6}, lambda: LokrRule(rank=2, scale=1.5)),
    "lokr-both": Row(
        jdelta.LokrModel,
        {"r": 1, "decompose_factor": 4, "decompose_both": True},
        lambda: LokrRule(rank=1, scale=1.5, factor=3, both=True),
    ),
    "delora": Row(jdelta.DeloraModel, {"r": 2}, lambda: DeloraRule(rank=2, strength=1.5)),
    "miss": Row(jdelta.MissModel, {"r": 4}, lambda: MissRule(rank=3)),
    "miss-mini": Row(jdelta.MissModel, {"r": 4, "init_weights": "mini"}, lambda: MissRule(rank=3, columns=2)),
    "miss-bat": Row(
        jdelta.MissModel,
        {"r": 1, "init_weights": "bat"},
        lambda: BatRule(rank=2),
        only=EVEN,
    ),
    "shira": Row(jdelta.ShiraModel, {"r": 1}, lambda: ShiraRule(rank=1)),
    "hra": Row(jdelta.HRAModel, {"r": 2}, lambda: HRARule(rank=4), only=FEATURES_IN),
    "hra-gs": Row(
        jdelta.HRAModel,
        {"r": 2, "apply_GS": True},
        lambda: HRARule(rank=3, orthogonal=True),
        starts_at_identity=False,
        only=FEATURES_IN,
    ),
    "gralora": Row(
        jdelta.GraLoraModel,
        {"r": 4, "alpha": 6},
        lambda: GraLoraRule(rank=4, blocks=2, scale=1.5),
        only=EVEN,
        nnx_modules=("dense", "product"),
    ),
    "gralora-hybrid": Row(
        jdelta.GraLoraModel,
        {"r": 2, "alpha": 6, "gralora_k": 1, "hybrid_r": 2},
        lambda: GraLoraRule(rank=2, blocks=1, scale=1.5, hybrid_rank=2),
    ),
    "randlora": Row(jdelta.RandLoraModel, {"r": 3, "randlora_alpha": 6}, lambda: RandLoraRule(rank=2, scale=0.5)),
    "vera": Row(jdelta.VeraModel, {"r": 2}, lambda: VeraRule(rank=2)),
    "vera-saved": Row(jdelta.VeraModel, {"r": 2, "save_projection": True}),
    "oft": Row(jdelta.OFTModel, {"oft_block_size": 2}, lambda: OFTRule(5), only=FEATURES_IN),
    "oft-exact": Row(
        jdelta.OFTModel,
        {"r": 2, "oft_block_size": 0, "block_share": True, "use_cayley_neumann": False},
        lambda: OFTRule(5, shared=True, terms=None),
        only=FEATURES_IN,
    ),
    **{
        variant.replace("_", "-"): Row(
            jdelta.RoadModel,
            {"variant": variant, "group_size": 2},
            functools.partial(RoadRule, variant, 2),
            only=FEATURES_OUT,
            nnx_modules=("dense", "product"),
        )
        for variant in ("road_1", "road_2")
    },
    "ia3": Row(jdelta.IA3Model, {"feedforward_modules": []}, lambda: IA3Rule("out"), only=FEATURES_OUT),
    "ia3-in": Row(jdelta.IA3Model, {"feedforward_modules": ["[r].*"]}, lambda: IA3Rule("in"), only=FEATURES_IN),
    "c3a": Row(
        jdelta.C3AModel,
        {"block_size": 2},
        lambda: C3ARule(size=2),
        starts_at_identity=False,
        only=("DenseGeneral in", "Conv", "grouped Conv", "nnx LinearGeneral", "nnx Conv"),  # of even widths
        nnx_modules=("dense", "product"),
    ),
    "fourierft": Row(
        jdelta.FourierFTModel,
        {"n_frequency": 9, "scaling": 20},
        lambda: FourierFTRule(count=9, scaling=20),
        starts_at_identity=False,
    ),
}


def rows(*quick: str) -> pytest.MarkDecorator:
    """Makes a test go through all methods, as `row`. If some are named, the others are slow."""
    return pytest.mark.parametrize(
        "row",
        [
            pytest.param(row, id=name, marks=() if not quick or name in quick else pytest.mark.slow)
            for name, row in METHODS.items()
        ],
    )
