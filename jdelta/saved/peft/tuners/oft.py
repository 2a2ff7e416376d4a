"""OFT in PEFT's files, whose meaning depends on the version that trained them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from jdelta.saved.peft.tuners.untransposed import Untransposed

_SINCE = (0, 18)  # the version from which on files say which it is, and the terms are as they are now


@dataclasses.dataclass(frozen=True)
class OFTTuner(Untransposed):
    """OFT: PEFT before 0.18 computed the Cayley–Neumann rotation otherwise."""

    def arguments(self, fields: Mapping[str, Any], hosts: Mapping[str, str]) -> dict[str, Any]:
        """None besides those that both have.

        Raises:
          ValueError: the file was trained with another formula.
        """
        found = re.match(r"(\d+)\.(\d+)", str(fields.get("peft_version") or ""))
        version = tuple(map(int, found.groups())) if found else (0, 0)
        if fields.get("use_cayley_neumann", True) and version < _SINCE:
            raise ValueError(
                f"with use_cayley_neumann, PEFT before 0.18 computed other rotations; this file has "
                f"peft_version={fields.get('peft_version')!r}."
            )
        return {}

    def written_fields(self, config: Any, hosts: Mapping[str, str]) -> dict[str, Any]:
        """The version, without which PEFT warns of another formula."""
        return {"peft_version": ".".join(map(str, (*_SINCE, 0)))}
