"""Methods whose patterns PEFT reads otherwise than those of the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jdelta.saved.peft.tuners.tuner import Tuner
from jdelta.trees import addressing, regexes


@dataclasses.dataclass(frozen=True)
class Dotted(Tuner):
    """A method with a pattern that PEFT looks for after a dot, or as the whole name of a module.

    Attributes:
      pattern: the field of the patterns.
      replaces: the field whose value they replace.
    """

    pattern: str = ""
    replaces: str = ""

    def arguments(self, fields: Mapping[str, Any], hosts: Mapping[str, str]) -> dict[str, Any]:
        """The modules' own values.

        Args:
          fields: PEFT's configuration.
          hosts: PyTorch's name of each module with tensors to its pattern here.
        """
        usual = fields.get(self.replaces, getattr(self.method(), self.replaces))
        patterns = fields.get(self.pattern) or {}
        own = {pattern: _by_pattern(patterns, name, usual) for name, pattern in hosts.items()}
        return {self.pattern: {pattern: value for pattern, value in own.items() if value != usual} or None}

    def written_fields(self, config: Any, hosts: Mapping[str, str]) -> dict[str, Any]:
        """The modules' own values, by their names.

        Args:
          config: of the method.
          hosts: PyTorch's name of each module to the one here.

        Raises:
          ValueError: the name of a module ends with that of another.
        """
        usual = getattr(config, self.replaces)
        ours = getattr(config, self.pattern)
        own = {name: addressing.first_match(ours, host, usual) for name, host in hosts.items()}
        patterns = {name: value for name, value in own.items() if value != usual}
        for name, value in own.items():
            if _by_pattern(patterns, name, usual) != value:
                raise ValueError(f"{self.pattern}: PEFT would take that of another module for {name!r}.")
        return {self.pattern: patterns}


def _by_pattern(patterns: Mapping[str, int], name: str, otherwise: int) -> int:
    """What PEFT reads from a pattern for a module: a regex from the start to after a dot, or else its whole name."""
    found = (value for key, value in patterns.items() if _matches(key, name))
    return next(found, patterns.get(name, otherwise))


def _matches(key: str, name: str) -> bool:
    return regexes.Regex(rf"(?:.*\.{key}$).*", written=key).fullmatch(name)
