"""What the comparisons with PyTorch PEFT share, the tier `parity`."""

import importlib
from typing import Any

import numpy as np


class Late:
    """A module that is imported when something of it is used: collecting the tests takes neither torch nor its time."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


torch, peft = Late("torch"), Late("peft")

TOLERANCE = 1e-5  # of the largest entry


def loss_of(logits: Any) -> Any:
    """A scalar with a different weight for each logit, in either framework."""
    weights = np.cos(np.arange(np.prod(logits.shape), dtype=np.float32)).reshape(tuple(logits.shape))
    if isinstance(logits, torch.Tensor):
        return (logits * torch.tensor(weights) + 0.1 * logits**2).mean()
    return (logits * weights + 0.1 * logits**2).mean()


def assert_close(found: Any, expected: np.ndarray, what: str) -> None:
    scale = np.abs(expected).max()
    assert scale > 0
    difference = np.abs(np.asarray(found) - expected).max() / scale
    print(f"{what}: {difference:.1e}")
    assert difference < TOLERANCE, f"{what}: differs by {difference:.1e} of its largest entry"
