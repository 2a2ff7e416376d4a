"""Configurations and deltas by the name of their method, as OpenDelta's `AutoDeltaConfig` and `AutoDeltaModel`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jdelta.config import DeltaConfig, did_you_mean
from jdelta.delta import METHODS, DeltaModel


class AutoDeltaConfig:
    """Makes the configuration of any method; `delta_type` says of which.

        config = jdelta.AutoDeltaConfig.from_dict({"delta_type": "lora", "lora_r": 4})

    Known are jdelta's methods, and every `DeltaModel` of your own that defines a `delta_type`.
    """

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DeltaConfig:
        """The configuration that a dict describes, as `DeltaConfig.to_dict` gives it.

        Args:
          values: the `delta_type`, and arguments of that method; what is left out has its default.

        Raises:
          TypeError: no mapping, an unknown key or a value of a wrong type.
          ValueError: `delta_type` is missing or unknown, or a value is beyond its limits.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"AutoDeltaConfig takes a dict with a 'delta_type', got {values!r}.")
        if "delta_type" not in values:
            raise ValueError(f"the configuration has no 'delta_type'. There are: {', '.join(sorted(METHODS))}.")
        return _method(values["delta_type"]).config_class.from_dict(values)

    @classmethod
    def from_json_string(cls, text: str) -> DeltaConfig:
        """The inverse of `DeltaConfig.to_json_string`; errors as `from_dict`."""
        return cls.from_dict(json.loads(text))

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> DeltaConfig:
        """The inverse of `DeltaConfig.to_json_file`; errors as `from_dict`."""
        return cls.from_json_string(Path(path).read_text("utf-8"))


class AutoDeltaModel:
    """Attaches the delta of any method.

        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    What it returns is the method's own: a `LoraModel` for a `LoraConfig`.
    """

    @classmethod
    def from_config(
        cls, config: DeltaConfig, backbone_model: Any, name: str | None = None, rng: int | jax.Array = 0
    ) -> DeltaModel:
        """Attaches the delta that a configuration describes.

        Args:
          config: the configuration of any method.
          backbone_model, name, rng: as in the constructor of `DeltaModel`.

        Raises:
          TypeError: `config` is no configuration.
          ValueError: it is that of no method.
          TypeError, ValueError: as the constructor.
        """
        if not isinstance(config, DeltaConfig):
            raise TypeError(
                f"AutoDeltaModel.from_config takes a configuration such as LoraConfig(lora_r=4), got {config!r}. "
                "AutoDeltaConfig.from_dict makes one from a dict."
            )
        return _method(config.delta_type).from_config(config, backbone_model, name=name, rng=rng)


def _method(delta_type: Any) -> type[DeltaModel]:
    if not isinstance(delta_type, str) or delta_type not in METHODS:
        near = did_you_mean(str(delta_type), METHODS)
        raise ValueError(f"no method has delta_type {delta_type!r}.{near} There are: {', '.join(sorted(METHODS))}.")
    return METHODS[delta_type]
