"""Leaves that one module of a delta generates for many hosts, once a run: they are not in the tree themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jdelta.core.edits import Attachment
from jdelta.trees import surgery


def with_generated(variables: Any, attachments: Sequence[Attachment]) -> Any:
    """The variables with the leaves that the generators make."""
    for attachment in attachments:
        if attachment.active and attachment.generator is not None and attachment.name in variables.get("params", {}):
            own = surgery.unflatten(surgery.flatten(variables["params"][attachment.name]))
            made: Any = attachment.generator.apply({"params": own})
            params = surgery.unflatten({**surgery.flatten(variables["params"]), **made})
            variables = {**variables, "params": params}
    return variables


def without_generated(variables: Any, attachments: Sequence[Attachment], rngs: Any) -> Any:
    """Fresh variables with the generators' parameters in place of what they make."""
    rng = rngs["params"] if isinstance(rngs, Mapping) else rngs
    for attachment in attachments:
        if attachment.active and attachment.generator is not None and "params" in variables:
            own = attachment.generator.init(rng)["params"]
            leaves = surgery.flatten(variables["params"])
            kept = {path: leaf for path, leaf in leaves.items() if path not in attachment.generated}
            params = surgery.graft(surgery.unflatten(kept), {attachment.name: own})
            variables = {**variables, "params": params}
    return variables
