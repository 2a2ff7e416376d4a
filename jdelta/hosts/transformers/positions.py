"""The positions that a model of transformers has, as its configuration says it."""

from __future__ import annotations

from typing import Any

from jdelta.core.structure import ModuleInfo


def positions(info: ModuleInfo) -> range | None:
    """The positions that a module's configuration says that it has; `None` if it says nothing."""
    config: Any = info.fields.get("config")
    limit = getattr(config, "max_position_embeddings", None)
    first = config.pad_token_id + 1 if "roberta" in getattr(config, "model_type", "") else 0
    return None if limit is None else range(first, limit)
