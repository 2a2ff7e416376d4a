"""What the comparisons with PyTorch PEFT share. Importing it skips a test file where torch or peft is missing."""

from typing import Any

import numpy as np
import pytest

REASON = "compares with PyTorch PEFT: pip install 'jdelta[parity]'"
torch = pytest.importorskip("torch", reason=REASON)
peft = pytest.importorskip("peft", reason=REASON)

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
