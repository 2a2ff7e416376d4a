"""How changes of one leaf become one, in NumPy: sums, the largest or random entries, elected signs, low ranks.

The combinations are those of PyTorch PEFT's `add_weighted_adapter`. Everything is computed in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import chex
import jax
import numpy as np

from jdelta.core.random_keys import as_key

Sign = Literal["total", "frequency"]
Merge = Callable[[Sequence[np.ndarray], Sequence[float]], np.ndarray]  # from changes of one shape, and their weights


class Combination(NamedTuple):
    """What happens to the changes of one leaf.

    Attributes:
      keep: which entries stay; the others become 0.
      elect: whether entries against the majority's sign are left out, and the others averaged.
      lora: what it works on in LoRA: each of the two factors, their product, or factors side by side.
    """

    keep: Literal["all", "largest", "random"] = "all"
    elect: bool = False
    lora: Literal["factors", "product", "side by side"] = "factors"


COMBINATIONS = {
    "cat": Combination(lora="side by side"),
    "svd": Combination(lora="product"),
    "linear": Combination(),
    "ties": Combination("largest", True),
    "ties_svd": Combination("largest", True, "product"),
    "dare_linear": Combination("random"),
    "dare_linear_svd": Combination("random", lora="product"),
    "dare_ties": Combination("random", True),
    "dare_ties_svd": Combination("random", True, "product"),
    "magnitude_prune": Combination("largest"),
    "magnitude_prune_svd": Combination("largest", lora="product"),
}


def merger(how: Combination, density: float | None, majority_sign_method: Sign, rng: int | chex.PRNGKey) -> Merge:
    """The function that makes one change of several. It draws other entries each time.

    Args:
      how: the combination.
      density: the share of the entries that stays.
      majority_sign_method: the sign of the sum, `"total"`, or that which most have, `"frequency"`.
      rng: seed or key of the random entries.

    Raises:
      ValueError: there is no such method of a majority.
    """
    if majority_sign_method not in ("total", "frequency"):
        raise ValueError(f"majority_sign_method is 'total' or 'frequency', got {majority_sign_method!r}.")
    key = as_key(rng)
    generator = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    share = density or 1.0

    def merge(changes: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
        if how.keep == "largest":
            changes = [_largest(change, share) for change in changes]
        elif how.keep == "random":
            changes = [change * (generator.random(change.shape) < share) / share for change in changes]
        return _elected(changes, weights, majority_sign_method) if how.elect else linear(changes, weights)

    return merge


def wide(value: np.ndarray) -> np.ndarray:
    """The values in float64."""
    return np.asarray(value, np.float64)


def linear(leaves: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """The weighted sum."""
    return sum((weight * wide(leaf) for leaf, weight in zip(leaves, weights, strict=True)), np.zeros(()))


def _largest(change: np.ndarray, density: float) -> np.ndarray:
    """The share of entries that are largest, at least one of them; 0 for the others."""
    flat = change.reshape(-1)
    stay = np.argsort(-np.abs(flat), kind="stable")[: max(1, int(density * flat.size))]
    left = np.zeros_like(flat)
    left[stay] = flat[stay]
    return left.reshape(change.shape)


def _elected(changes: Sequence[np.ndarray], weights: Sequence[float], method: Sign) -> np.ndarray:
    """The mean, over those that have the majority's sign, of change times weight; with no majority, that is plus."""
    stack = np.stack(changes)
    signs = np.sign(stack)
    votes = (stack if method == "total" else signs).sum(0)
    agree = signs == np.where(votes >= 0, 1, -1)
    weighted = stack * agree * np.reshape(weights, (-1, *[1] * (stack.ndim - 1)))
    return weighted.sum(0) / np.maximum(agree.sum(0), 1)


def truncated(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The two factors of the closest matrix of some rank (Eckart and Young 1936); the first one is orthonormal.

    Args:
      matrix: `(…, m, n)`.
      rank: at most `min(m, n)`.

    Returns:
      `(…, m, rank)` and `(…, rank, n)`.
    """
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return u[..., :rank], s[..., :rank, None] * v[..., :rank, :]


def truncated_product(left: np.ndarray, right: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """`truncated(left @ right, rank)`, without making the product, which for an embedding is as large as this."""
    q_left, r_left = np.linalg.qr(left)
    q_right, r_right = np.linalg.qr(np.swapaxes(right, -1, -2))
    u, v = truncated(r_left @ np.swapaxes(r_right, -1, -2), rank)
    return q_left @ u, v @ np.swapaxes(q_right, -1, -2)
