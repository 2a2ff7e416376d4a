"""How PEFT stores FourierFT."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from jdelta.methods.fourierft import LARGEST
from jdelta.saved.peft.tuners.dotted import Dotted


@dataclasses.dataclass(frozen=True)
class FourierFTTuner(Dotted):
    """FourierFT, whose places are drawn anew from the seed."""

    def require_fit(self, leaves: Mapping[str, np.ndarray], d_in: int, d_out: int) -> None:
        """Raises `ValueError` for a weight so large that the places depend on the release of PyTorch."""
        if d_in * d_out >= LARGEST:
            raise ValueError(
                f"a weight of {d_in} · {d_out} entries: from {LARGEST:,} on, which frequencies a seed means depends on "
                "the release of PyTorch. Leave the module out, or merge the adapter into the weights."
            )
