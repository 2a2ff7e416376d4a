"""Regular expressions as `re` has them, without its worst case; for those of a file, within a limit of time.

For a pattern of twenty characters `re` can take longer than anybody waits, and nothing can stop it. Patterns for which
it might are matched in another way: for each part of the pattern and each position, where can a match end that begins
there? This takes a time that grows with a power of the name's length, and is stopped when the limit is reached.

`re._parser` and `re._compiler` are private: they give the parts of a pattern as `re` understands them. If they change,
`tests/test_patterns_of_files.py` fails, which compares both ways of matching.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from re import _compiler, _constants, _parser  # type: ignore[attr-defined]
from typing import Any

SECONDS = 2.0  # that the patterns of one file have, all together
LONGEST = 10_000  # characters of such a pattern

_left: ContextVar[list[float] | None] = ContextVar("left", default=None)  # seconds, in a list of one; None: no limit


@contextlib.contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """Within it, all matching together takes at most so long. Inside another one, that one's limit counts."""
    if _left.get() is not None:
        yield
        return
    token = _left.set([seconds])
    try:
        yield
    finally:
        _left.reset(token)


@dataclasses.dataclass(frozen=True)
class Regex:
    """A regular expression, of Python's syntax.

    Attributes:
      text: the expression.
      written: what messages call it, if not just that.

    Raises:
      ValueError: it is none; or within a limit, it is too long.
    """

    text: str
    written: str = ""

    def __post_init__(self) -> None:
        with self._charged():
            if _left.get() is not None and len(self.text) > LONGEST:
                raise ValueError(f"{self._named} has {len(self.text):,} characters; {LONGEST:,} are the most.")
            try:
                self._compiled  # noqa: B018
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{self._named} is not a valid regular expression: {error}.") from error

    def fullmatch(self, name: str, starts: Sequence[int] = (0,)) -> bool:
        """Whether it matches a name from one of some positions to its end.

        Raises:
          ValueError: within a limit, it takes too long, or it has a part that only `re` can match.
        """
        with self._charged() as until:
            if self._is_tame or (self._tree is None and _left.get() is None):
                return any(self._compiled.fullmatch(name, start) for start in starts)
            if self._tree is None:
                raise ValueError(
                    f"{self._named} repeats, and depends on what a group matched: as the pattern of a file, that is "
                    "not matched. Name the modules."
                )
            search = _Search(name, until)
            return any(len(name) in search.ends(self._tree, start) for start in starts)

    @contextlib.contextmanager
    def _charged(self) -> Iterator[float]:
        """Takes the time of what is done within it from what is left; gives the time at which that is over."""
        left, before = _left.get(), time.perf_counter()
        try:
            if left is not None and left[0] <= 0:
                raise TimeoutError
            yield math.inf if left is None else before + left[0]
        except TimeoutError:
            raise ValueError(
                f"{self._named} takes too long to match: the patterns of a file have {SECONDS:g} seconds. Write it "
                "without repetitions of repetitions, or name the modules."
            ) from None
        finally:
            if left is not None:
                left[0] -= time.perf_counter() - before

    @property
    def _named(self) -> str:
        name = self.written or self.text
        return repr(name if len(name) < 200 else f"{name[:200]}…")

    @functools.cached_property
    def _compiled(self) -> re.Pattern[str]:
        return re.compile(self.text)

    @functools.cached_property
    def _parsed(self) -> Any:
        return _parser.parse(self.text)

    @functools.cached_property
    def _is_tame(self) -> bool:
        """Whether `re` needs a time that is at most a square of the name's length."""
        return _repetitions(self._parsed) <= 2

    @functools.cached_property
    def _tree(self) -> _Part | None:
        """Its parts; `None`, if one of them is none that `_Search` knows, or they are nested too deeply for it."""
        try:
            return _sequence(self._parsed, self._parsed.state.flags, 0)
        except NotImplementedError:
            return None


_REPEATS = {_constants.MAX_REPEAT, _constants.MIN_REPEAT, getattr(_constants, "POSSESSIVE_REPEAT", None)}


def _repetitions(items: Any) -> float:
    """How many times in a row a part is repeated at will; infinity, where a repeated part is more than a character."""
    count = 0.0
    for op, argument in items:
        if op in _REPEATS:
            _, most, inner = argument
            count += _repetitions(inner) if most == 1 else 1 if _is_character(inner) else float("inf")
        elif op is _constants.SUBPATTERN:
            count += _repetitions(argument[-1])
        elif op is _constants.BRANCH:
            count += sum(map(_repetitions, argument[1]))
        elif op in (_constants.ASSERT, _constants.ASSERT_NOT):
            count += _repetitions(argument[1])
        elif op not in _CHARACTERS and op is not _constants.AT:
            count = float("inf")
    return count


_CHARACTERS = {_constants.LITERAL, _constants.NOT_LITERAL, _constants.ANY, _constants.IN}


def _is_character(items: Any) -> bool:
    if len(items) != 1:
        return False
    op, argument = items[0]
    return _is_character(argument[-1]) if op is _constants.SUBPATTERN else op in _CHARACTERS


# --- the other way to match


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """A part of a pattern.

    Attributes:
      kind: `"leaf"`, one character or a boundary, by `re`; `"sequence"`, `"branch"`, `"repeat"` of other parts;
        `"look"` ahead, or `width` characters behind, for a match or for none.
    """

    kind: str
    parts: tuple[_Part, ...] = ()
    leaf: Any = None
    least: int = 0
    most: int = 0
    width: int | None = None
    negated: bool = False


def _sequence(items: Any, flags: int, depth: int) -> _Part:
    if depth > 50:
        raise NotImplementedError
    return _Part("sequence", tuple(_part(op, argument, flags, depth + 1) for op, argument in items))


def _part(op: Any, argument: Any, flags: int, depth: int) -> _Part:
    if op in _CHARACTERS or op is _constants.AT:
        state = _parser.State()
        state.flags = flags
        return _Part("leaf", leaf=_compiler.compile(_parser.SubPattern(state, [(op, argument)]), flags))
    if op is _constants.SUBPATTERN:
        _, add, remove, inner = argument
        return _sequence(inner, (flags | add) & ~remove, depth)
    if op is _constants.BRANCH:
        return _Part("branch", tuple(_sequence(items, flags, depth) for items in argument[1]))
    if op in (_constants.MAX_REPEAT, _constants.MIN_REPEAT):
        least, most, inner = argument
        return _Part("repeat", (_sequence(inner, flags, depth),), least=least, most=int(most))
    if op in (_constants.ASSERT, _constants.ASSERT_NOT):
        direction, inner = argument
        width = inner.getwidth()[0] if direction < 0 else None
        return _Part("look", (_sequence(inner, flags, depth),), width=width, negated=op is _constants.ASSERT_NOT)
    raise NotImplementedError(op)


class _Search:
    """Where matches can end in one name.

    Args:
      name: what is matched.
      until: when to stop, on `time.perf_counter`.
    """

    def __init__(self, name: str, until: float) -> None:
        self.name, self.until = name, until
        self.known: dict[tuple[_Part, int], frozenset[int]] = {}

    def ends(self, part: _Part, at: int) -> frozenset[int]:
        """The positions where a match of the part can end that begins at this one."""
        if (part, at) not in self.known:
            if time.perf_counter() > self.until:
                raise TimeoutError
            self.known[part, at] = self._ends(part, at)
        return self.known[part, at]

    def _ends(self, part: _Part, at: int) -> frozenset[int]:
        if part.kind == "leaf":
            found = part.leaf.match(self.name, at)
            return frozenset((found.end(),)) if found else frozenset()
        if part.kind == "branch":
            return frozenset().union(*(self.ends(one, at) for one in part.parts))
        if part.kind == "look":
            inner = part.parts[0]
            if part.width is None:
                found = bool(self.ends(inner, at))
            else:
                found = at >= part.width and at in self.ends(inner, at - part.width)
            return frozenset((at,)) if found != part.negated else frozenset()
        here = frozenset((at,))
        if part.kind == "sequence":
            for one in part.parts:
                here = self._all(one, here)
            return here
        # Each turn moves on or stays: after as many as there are characters, one more changes nothing.
        turns = len(self.name) + 1
        for _ in range(min(part.least, turns)):
            here = self._all(part.parts[0], here)
        reached = here
        for _ in range(min(part.most - part.least, turns)):
            here = self._all(part.parts[0], here)
            if here <= reached:
                break
            reached |= here
        return reached

    def _all(self, part: _Part, starts: frozenset[int]) -> frozenset[int]:
        return frozenset().union(*(self.ends(part, start) for start in starts))
