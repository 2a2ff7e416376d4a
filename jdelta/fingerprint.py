"""Which backbone it was: a digest of every leaf, the same on every device and under every sharding."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from flax.core import meta

_DIGITS = 16  # of each leaf's SHA-256, in hex


def fingerprint(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Name to `dtype[shape] digest` of each leaf, in the order of the names; the digest is left out of a shape.

    The digest is that of the values alone, so it tells other values from another structure. Leaves are fetched to the
    host one after another; a model of 110 million float32 parameters takes about half a second.

    Args:
      leaves: name to array, sharded or not, or to `jax.ShapeDtypeStruct`.
    """

    def described(leaf: Any) -> str:
        value = meta.unbox(leaf)
        return kind(value) if isinstance(value, jax.ShapeDtypeStruct) else f"{kind(value)} {digest(value)}"

    names = sorted(leaves)
    with ThreadPoolExecutor(2) as threads:  # hashing leaves Python's lock alone
        return dict(zip(names, threads.map(lambda name: described(leaves[name]), names), strict=True))


def kind(value: Any) -> str:
    """`float32[16, 4]`."""
    return f"{np.dtype(value.dtype).name}{list(value.shape)}"


def differences(have: Mapping[str, str], want: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """How two fingerprints differ: in structure, and in values alone. A line for each leaf; shapes have no values."""
    structure, values = [], []
    for name in sorted(have.keys() | want.keys()):
        if name not in want:
            structure.append(f"{name} is new")
        elif name not in have:
            structure.append(f"{name} is missing")
        else:
            kinds, digests = zip(*(text.rpartition("]")[::2] for text in (have[name], want[name])), strict=True)
            if kinds[0] != kinds[1]:
                structure.append(f"{name} is {kinds[0]}], not {kinds[1]}]")
            elif all(digests) and digests[0] != digests[1]:
                values.append(name)
    return structure, values


_known: dict[int, tuple[weakref.ref, str]] = {}  # of the arrays of jax that live, by id: these never change


def digest(value: Any) -> str:
    """SHA-256 of an array's bytes, shortened. It is computed once for an array of jax."""
    if not isinstance(value, jax.Array):
        return _digest(value)
    key = id(value)
    if key not in _known:
        _known[key] = (weakref.ref(value, lambda _: _known.pop(key, None)), _digest(value))
    return _known[key][1]


def _digest(value: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(to_host(value)).reshape(-1).view(np.uint8).data).hexdigest()[:_DIGITS]


def to_host(value: Any) -> np.ndarray:
    """The whole array on this host, also where its shards lie on several, or it is in a box of metadata."""
    value = meta.unbox(value)
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        from jax.experimental import multihost_utils

        value = multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value)
