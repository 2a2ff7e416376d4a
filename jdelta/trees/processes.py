"""A program of several processes: what fails in one of them fails in all, so that none waits for another for good."""

from __future__ import annotations

import builtins
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax.core import meta

_T = TypeVar("_T")


def together(run: Callable[[], _T], summary: Callable[[_T], str] = lambda _: "") -> _T:
    """Runs a function in each process. Where it raises in one of them, this raises in all.

    Args:
      run: what every process does for itself, such as reading a file. It must not wait for other processes.
      summary: of the result, what has to be equal in all processes.

    Returns:
      What the function returned in this process.

    Raises:
      Exception: of this process; else of the first other one that failed, of the same built-in type.
      ValueError: the summaries differ.
    """
    if jax.process_count() == 1:
        return run()
    results: list[_T] = []
    failed: Exception | None = None
    try:
        results.append(run())
        report = ["", summary(results[0])]
    except Exception as error:
        failed, report = error, [_builtin(error), str(error)]
    reports = [json.loads(text) for text in _exchange(json.dumps(report))]
    if failed is not None:
        raise failed
    for process, (kind, text) in enumerate(reports):
        if kind:
            raise getattr(builtins, kind)(f"in process {process}: {text}")
    if odd := [process for process, (_, text) in enumerate(reports) if text != reports[0][1]]:
        raise ValueError(f"process {odd[0]} finds other contents than process 0. Give all processes the same files.")
    return results[0]


def by_first(run: Callable[[], _T]) -> _T:
    """Runs a function in the first process alone, and returns what it returned there, or raises, in all.

    The result is something that JSON has.
    """
    if jax.process_count() == 1:
        return run()
    result = together(lambda: run() if jax.process_index() == 0 else None)
    shared: _T = json.loads(_exchange(json.dumps(result))[0])
    return shared


def spread(tree: Any) -> bool:
    """Whether other processes hold some of a tree, so that reading it takes all of them."""
    return any(isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in jax.tree.leaves(tree))


def to_host(value: Any) -> np.ndarray:
    """The whole array on this host, also where its shards lie on several, or it is in a box of metadata.

    Where they lie on several, every process has to call this, for the same arrays in the same order.
    """
    value = meta.unbox(value)
    if isinstance(value, jax.Array) and not (value.is_fully_addressable or value.is_fully_replicated):
        from jax.experimental import multihost_utils

        value = multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value)


def _builtin(error: Exception) -> str:
    """The name of the built-in type that an error is of, if one message makes it."""
    types = (kind for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind)
    return next((kind.__name__ for kind in types if not issubclass(kind, UnicodeError)), "Exception")


def _exchange(text: str) -> Sequence[str]:
    """The texts that the processes give, in their order."""
    from jax.experimental import multihost_utils

    data = np.frombuffer(text.encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.int32(data.size))).reshape(-1)
    padded = np.zeros(max(int(lengths.max()), 1), np.uint8)
    padded[: data.size] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [bytes(row[:length]).decode() for row, length in zip(rows, lengths, strict=True)]
