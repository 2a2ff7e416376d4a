"""Where the Flax models of transformers look up their activations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from jdelta.hosts.patches import globals_of


def tables(module_type: type[nn.Module]) -> list[dict[str, Callable]]:
    """The dicts from an activation's name to its function in which a module of this class may look; each once.

    The models' files take `ACT2FN` from one file of transformers, in which a file that is imported later finds it too.
    """
    library: Any = sys.modules.get("transformers.modeling_flax_utils", object)
    found = (file.get("ACT2FN") for file in (*globals_of(module_type), vars(library)))
    return list({id(table): table for table in found if isinstance(table, dict)}.values())
