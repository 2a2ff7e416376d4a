"""The methods that the sentiment examples train, with their arguments and learning rates."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Method:
    """A method's arguments, what trains besides the classifier, and the peak learning rates of both.

    The rates of `METHODS` are the best of several each, judged by 1,000 of the training sentences, which did not train:
    `compare_methods.py --choose-rates`.

    Attributes:
      learning_rate: of what trains.
      arguments: of the method.
      trains: patterns of what trains besides the classifier.
      classifier_rate: of the classifier, which is new.
      delta_type: the method; by default the name under which it stands in `METHODS`.
      optimizer: options of `delta.optimizer`.
    """

    learning_rate: float
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    trains: tuple[str, ...] = ("deltas",)
    classifier_rate: float = 1e-3
    delta_type: str | None = None
    optimizer: dict[str, Any] = dataclasses.field(default_factory=dict)


EVERY_DENSE = ["query", "key", "value", "dense"]


def at_every_dense(learning_rate: float, delta_type: str | None = None, **arguments: Any) -> Method:
    return Method(learning_rate, {"modified_modules": EVERY_DENSE, **arguments}, delta_type=delta_type)


METHODS = {
    "lora": at_every_dense(1e-3),
    "lora_plus": dataclasses.replace(at_every_dense(3e-4, "lora"), optimizer={"lora_plus_ratio": 16}),
    "lora_fa": at_every_dense(1e-3, "lora", freeze_a=True),
    "rslora": at_every_dense(1e-3, "lora", use_rslora=True),
    "dora": at_every_dense(1e-3, "lora", use_dora=True),
    "pissa": at_every_dense(1e-3, "lora", init_lora_weights="pissa"),
    "olora": at_every_dense(1e-3, "lora", init_lora_weights="olora"),
    "adalora": at_every_dense(3e-3, total_step=200, tinit=20, tfinal=60),  # of the 200 steps of compare_methods.py
    "hira": at_every_dense(3e-3),
    "loha": at_every_dense(3e-3),
    "lokr": at_every_dense(3e-3),
    "delora": at_every_dense(3e-3),
    "miss": at_every_dense(1e-3),
    "miss_bat": at_every_dense(1e-3, "miss", init_weights="bat"),
    "shira": at_every_dense(1e-3),
    "hra": at_every_dense(1e-3),
    "oft": at_every_dense(1e-3),
    "vera": at_every_dense(1e-2),
    "road": at_every_dense(3e-3),
    "c3a": at_every_dense(3e-3, block_size=128),
    "fourierft": at_every_dense(3e-2),
    "randlora": at_every_dense(1e-3),
    "gralora": at_every_dense(1e-3),
    "ia3": Method(1e-2),
    "adapter": Method(1e-3),
    "parallel_adapter": Method(1e-3),
    "low_rank_adapter": Method(3e-3, {"zero_up": True}),
    "compacter": Method(3e-3, {"zero_up": True}),
    "bitfit": Method(3e-3, {"modified_modules": ["bert"]}, classifier_rate=3e-3),
    "ln_tuning": Method(3e-3),
    "prefix": Method(2e-4),
    "mam": Method(
        1e-3,
        {
            "methods": [
                {"delta_type": "prefix", "prefix_token_num": 8},
                {
                    "delta_type": "parallel_adapter",
                    "modified_modules": ["ff.w1", "ff.w2"],
                    "common_structure": True,
                    "scaled": 4.0,
                },
            ]
        },
        delta_type="composed",
    ),
    "soft_prompt": Method(3e-2, {"soft_token_num": 20}),
    "full": Method(5e-5, trains=("bert",)),
    "head": Method(3e-2, trains=(), classifier_rate=3e-2),
}
