"""Naming rules: which modules does a pattern mean?

A name is the dot-joined path of a module (`bert.encoder.layer.0.attention.self.query`). A pattern is either

- an **end-match**: `"attention.output.dense"` means every name that ends with it at a dot boundary, so
  `"0.attention.output.dense"` means layer 0 and not layer 10; or
- a **regex**: `"[r](\\d)+\\.output.dense"`: after the `[r]`, a regular expression that has to match up to the end
  of the name, beginning at the name's start or after a dot.

These are the rules of OpenDelta (its `name_based_addressing`).
"""

from __future__ import annotations

import difflib
import functools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from jdelta.trees import regexes

REGEX_MARK = "[r]"


def match(names: Collection[str], patterns: Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """Returns the names that match any of the patterns, in the order of `names`.

        jdelta.match(names, [r"[r](\\d)+\\.output.dense"], exclude=["11"])

    Args:
      names: dot-joined module names.
      patterns: end-matches and `[r]` regexes; a name is included if one of them matches.
      exclude: patterns of names to exclude, together with everything below them.

    Returns:
      The matching names, each once.

    Raises:
      TypeError: `names`, `patterns` or `exclude` is not a list of strings.
      ValueError: an invalid regex, or a pattern that matches nothing (the message shows the closest names).
    """
    names = list(dict.fromkeys(_strings(names, "a list of names", "a name")))
    found: set[str] = set()
    for pattern in checked(patterns):
        hits = [name for name in names if matches(name, pattern)]
        if not hits:
            raise ValueError(nothing_matches(pattern, names))
        found.update(hits)
    left_out: set[str] = set()
    for pattern in checked(exclude):
        hits = [name for name in names if matches_at_or_above(name, pattern)]
        if not hits:
            raise ValueError(f"exclude: {nothing_matches(pattern, names)}")
        left_out.update(hits)
    return [name for name in names if name in found and name not in left_out]


def matches(name: str, pattern: str) -> bool:
    """Whether one name is meant by one pattern."""
    return _matcher(pattern)(name)


def matches_at_or_above(name: str, pattern: str) -> bool:
    """Whether a name, or one that encloses it, is meant by the pattern."""
    parts = name.split(".")
    return any(matches(".".join(parts[:i]), pattern) for i in range(1, len(parts) + 1))


def exact(name: str, names: Iterable[str] | None = None) -> str:
    """A pattern that means this one of the names, or of any that there may be, and no other."""
    is_plain = names is not None and not any(other.endswith(f".{name}") for other in names)
    return name if is_plain else f"{REGEX_MARK}^{re.escape(name)}"


def first_match(patterns: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """What the first pattern that means this name stands for."""
    return next((value for pattern, value in (patterns or {}).items() if matches(name, pattern)), otherwise)


def nothing_matches(pattern: str, names: Sequence[str], kind: str = "module") -> str:
    """The message for a pattern that matches nothing: what was asked, and what is closest."""
    asked = "matches" if pattern.startswith(REGEX_MARK) else "ends with"
    message = f"no {kind} {asked} {pattern!r}."
    if near := closest(names, pattern, kind=kind):
        message += f" Closest: {', '.join(near)}."
    return message


def closest(names: Sequence[str], pattern: str, most: int = 3, kind: str = "module") -> list[str]:
    """The name endings most like a pattern, repeated layers counted: `['….self.query (12 modules)']`."""
    words = re.sub(r"[\\()+*?^$\[\]]", "", pattern.removeprefix(REGEX_MARK))
    length = words.count(".") + 1
    endings = Counter(re.sub(r"\b\d+\b", "*", ".".join(name.split(".")[-length:])) for name in names)
    near = difflib.get_close_matches(re.sub(r"\b\d+\b", "*", words), endings, n=most, cutoff=0.5)
    return [f"….{end} ({endings[end]} {kind}s)" if endings[end] > 1 else f"….{end}" for end in near]


@functools.lru_cache(maxsize=4096)
def _matcher(pattern: str) -> Callable[[str], bool]:
    if not pattern or pattern == REGEX_MARK:
        raise ValueError("an empty pattern names nothing.")
    if not pattern.startswith(REGEX_MARK):
        return lambda name: name == pattern or name.endswith("." + pattern)
    regex = regexes.Regex(pattern.removeprefix(REGEX_MARK), written=pattern)
    return lambda name: regex.fullmatch(name, [0, *(i + 1 for i, char in enumerate(name) if char == ".")])


def checked(patterns: Sequence[str]) -> Sequence[str]:
    """The patterns, if they are a sequence of strings; else a `TypeError` that says what to write."""
    if isinstance(patterns, str):
        raise TypeError(f"expected a list of patterns, got the string {patterns!r}. Write [{patterns!r}].")
    _strings(patterns, "a list of patterns", "a pattern")
    return patterns


def _strings(found: Any, many: str, one: str) -> Iterable[str]:
    """What was given, if it is strings; else a `TypeError` that calls them all `many`, and one of them `one`."""
    if isinstance(found, Mapping | str | bytes) or not isinstance(found, Collection):
        raise TypeError(f"expected {many}, got {found!r}.")
    for item in found:
        if not isinstance(item, str):
            raise TypeError(f"{one} is a string, got {item!r}.")
    return found
