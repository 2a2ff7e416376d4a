"""Whether the leaves of a delta can be anywhere, which is asked before any is made."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from flax.core import meta

MOST = 2**50  # bytes of a delta's leaves, where only their shapes are wanted


def size_of(leaves: Iterable[Any]) -> int:
    """The bytes of all leaves together, arrays or shapes."""
    plain = map(meta.unbox, leaves)
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in plain)


def require_room(what: str, leaves: Iterable[Any], values: bool) -> None:
    """Raises `ValueError` if leaves are larger than all memory.

    Args:
      what: whose leaves they are, for the message.
      leaves: their shapes.
      values: whether they are to be made here: then the memory is that of the device where arrays go by default, or of
        this machine if it is a CPU. Otherwise it is 2**50 bytes.
    """
    size, most = size_of(leaves), _memory() if values else MOST
    if size > most:
        raise ValueError(f"{what} would have {size:,} bytes, and there are {most:,}. Take smaller arguments.")


def _memory() -> int:
    device: Any = getattr(jax.config, "jax_default_device", None)
    if not isinstance(device, jax.Device):
        device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(limit)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on this system
        return MOST
