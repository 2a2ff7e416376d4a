"""How PEFT names FourierFT: its patterns are others than those of the other methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from jdelta.methods.fourierft import LARGEST, FourierFTConfig
from jdelta.saved.peft.tuners.tuner import Tuner
from jdelta.trees import regexes


@dataclasses.dataclass(frozen=True)
class FourierFTTuner(Tuner):
    """FourierFT, whose places are drawn anew from the seed."""

    def arguments(self, fields: Mapping[str, Any], hosts: Mapping[str, str]) -> dict[str, Any]:
        """The modules' own numbers of frequencies."""
        usual = fields.get("n_frequency", FourierFTConfig.n_frequency)
        patterns = fields.get("n_frequency_pattern") or {}
        own = {pattern: _by_pattern(patterns, name, usual) for name, pattern in hosts.items()}
        return {"n_frequency_pattern": {pattern: count for pattern, count in own.items() if count != usual} or None}

    def require_fit(self, leaves: Mapping[str, np.ndarray], d_in: int, d_out: int) -> None:
        """Raises `ValueError` for a weight so large that the places depend on the release of PyTorch."""
        if d_in * d_out >= LARGEST:
            raise ValueError(
                f"a weight of {d_in} · {d_out} entries: from {LARGEST:,} on, which frequencies a seed means depends on "
                "the release of PyTorch. Leave the module out, or merge the adapter into the weights."
            )

    def written_fields(self, config: Any, hosts: Mapping[str, str]) -> dict[str, Any]:
        """The modules' own numbers of frequencies, by their names: a pattern is looked for after a dot.

        Args:
          config: of the method.
          hosts: PyTorch's name of each module to the one here.

        Raises:
          ValueError: the name of a module ends with that of another.
        """
        usual = config.n_frequency
        own = {name: config.count_of(host) for name, host in hosts.items()}
        patterns = {name: count for name, count in own.items() if count != usual}
        for name, count in own.items():
            if _by_pattern(patterns, name, usual) != count:
                raise ValueError(f"n_frequency_pattern: PEFT would take that of another module for {name!r}.")
        return {"n_frequency_pattern": patterns}


def _by_pattern(patterns: Mapping[str, int], name: str, otherwise: int) -> int:
    """What PEFT reads from a pattern for a module: a regex from the start to after a dot, or else its whole name."""
    found = (value for key, value in patterns.items() if _matches(key, name))
    return next(found, patterns.get(name, otherwise))


def _matches(key: str, name: str) -> bool:
    return regexes.Regex(rf"(?:.*\.{key}$).*", written=key).fullmatch(name)
