"""LoRA of several modules in PyTorch becomes that of the one module that computes what they do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np


@dataclasses.dataclass(frozen=True)
class Lora:
    """LoRA at a module.

    Attributes:
      a: `(d_in, r)`.
      b: `(r, d_out)`.
      alpha: as in its configuration.
    """

    a: np.ndarray
    b: np.ndarray
    alpha: float

    @property
    def rank(self) -> int:
        """`r`."""
        return int(self.a.shape[-1])


def joined(parts: Mapping[int, Lora], count: int, d_out: int, use_rslora: bool) -> Lora:
    """What adds to each part of an output what the LoRA of that part adds to it.

    Where all have the same `a`, so has the result: `to_peft` writes such. Otherwise the rank is the sum of theirs, and
    each row of `b` is of one part.

    Args:
      parts: by the number of the part; some may have none.
      count: how many parts there are, of the same width.
      d_out: width of the whole output.
      use_rslora: whether alpha is divided by the root of the rank.

    Raises:
      ValueError: the output of a LoRA has another width than its part.
    """

    def divisor(rank: int) -> float:
        return math.sqrt(rank) if use_rslora else rank

    width, first = d_out // count, parts[min(parts)]
    scales = {i: part.alpha / divisor(part.rank) for i, part in parts.items()}
    scale = max(scales.values(), key=abs)
    for part in parts.values():
        if part.b.shape[1] != width:
            raise ValueError(f"its lora_B makes {part.b.shape[1]} features, and here there are {width}.")
    if all(np.array_equal(part.a, first.a) and scales[i] == scale for i, part in parts.items()):
        a, rows = first.a, {i: slice(None) for i in parts}
    else:
        a = np.concatenate([part.a for part in parts.values()], axis=1)
        ends = np.cumsum([part.rank for part in parts.values()]).tolist()
        rows = {i: slice(end - parts[i].rank, end) for i, end in zip(parts, ends, strict=True)}
    b = np.zeros((a.shape[1], d_out), np.result_type(*(part.b for part in parts.values())))
    for i, part in parts.items():
        factor = scales[i] / scale if scale else 1.0
        b[rows[i], i * width : (i + 1) * width] = part.b if factor == 1 else part.b * np.asarray(factor, b.dtype)
    return Lora(a, b, scale * divisor(a.shape[1]))
