"""How PEFT stores AdaLoRA: singular values are a column, and ranks that training chose are lists of bools."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jdelta.saved.peft.tuners.tuner import Tuner

VALUES = "lora_E"


@dataclasses.dataclass(frozen=True)
class AdaLoraTuner(Tuner):
    """AdaLoRA. PEFT stores the triplets that are kept, and scales by the rank that a module had at first."""

    def arguments(self, fields: Mapping[str, Any], hosts: Mapping[str, str]) -> dict[str, Any]:
        """The ranks that are left."""
        given = fields.get("rank_pattern") or {}
        ranks = {name.removesuffix(f".{VALUES}"): sum(kept) for name, kept in given.items()}
        if gone := [name for name in hosts if ranks.get(name) == 0]:
            raise ValueError(f"rank_pattern keeps nothing at {gone[0]!r}: leave that module out of the adapter.")
        return {"rank_pattern": {pattern: ranks[name] for name, pattern in hosts.items() if name in ranks} or None}

    def leaves(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The leaves at a module, from its tensors."""
        return {**super().leaves(tensors), "e": tensors["e"].reshape(-1)}

    def written_fields(self, config: Any, hosts: Mapping[str, str]) -> dict[str, Any]:
        """The first of the triplets are those that are there."""
        if config.total_step is None:
            raise ValueError("PEFT's AdaLoRA needs total_step, and this delta has none. Give it to the configuration.")
        if not config.rank_pattern:
            return {"rank_pattern": None}
        kept = {name: config.rule(host).rank for name, host in hosts.items()}
        if above := [name for name, rank in kept.items() if rank > config.init_r]:
            raise ValueError(f"PEFT has no rank above init_r={config.init_r}, and {above[0]!r} has one.")
        return {
            "rank_pattern": {
                f"{name}.{VALUES}": [i < rank for i in range(config.init_r)] for name, rank in kept.items()
            }
        }

    def written(self, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The tensors of a module, from its leaves."""
        return {**super().written(leaves), "e": leaves["e"].reshape(-1, 1)}
