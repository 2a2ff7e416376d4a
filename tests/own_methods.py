"""The methods that docs/own-methods.md writes, as a user would copy them."""

import functools
import re
from pathlib import Path
from unittest import mock

from jdelta.core.config import METHODS

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "own-methods.md").read_text()


def source(name):
    return re.search(rf"<!-- {name} -->\n```python\n(.*?)```", PAGE, flags=re.S)[1]


@functools.cache
def defined():
    """The names that the page defines for its methods, without attaching anything."""
    names = {}
    start = "import dataclasses\nimport jax\nimport jax.numpy as jnp\nimport jdelta\nfrom flax import linen as nn\n"
    dora = re.search(r"^class MyDora\(jdelta.Method\):\n(?:(?:    .*)?\n)+", PAGE, flags=re.M)[0]
    with mock.patch.dict(METHODS):
        exec(start + source("dora") + dora + source("ia3") + source("vera"), names)
    return names
