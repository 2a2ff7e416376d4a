"""Configurations and deltas by the name of their method, as OpenDelta's `AutoDeltaConfig` and `AutoDeltaModel`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, Literal

import chex

from jdelta.core import parsing
from jdelta.core.config import as_path, config_from_dict, require_known, shown
from jdelta.core.host import HostAdapter, unchanged_on_error
from jdelta.core.method import Method
from jdelta.core.state import DeltaState, taken
from jdelta.delta import DeltaModel, model_class
from jdelta.hosts.adapting import adapt
from jdelta.hosts.nnx.adapter import DummyInputs
from jdelta.saved.finetuned import Finetuned, listing
from jdelta.saved.loading import read_delta
from jdelta.trees import regexes


class AutoDeltaConfig:
    """Makes the configuration of any method, which `delta_type` names.

        config = jdelta.AutoDeltaConfig.from_dict({"delta_type": "lora", "lora_r": 4})

    It knows jdelta's methods, and every `Method` of your own that defines a `delta_type`.
    """

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Method:
        """Returns the configuration that a dict describes, as `Method.to_dict` returns it.

            config = jdelta.AutoDeltaConfig.from_dict({"delta_type": "lora", "lora_r": 4})

        Args:
          values: the `delta_type`, and arguments of that method; an argument that is not given has its default.

        Raises:
          TypeError: no mapping, an unknown key or a value of a wrong type.
          ValueError: `delta_type` is missing or unknown, or a value is beyond its limits.
        """
        return config_from_dict(values)

    @classmethod
    def from_json_string(cls, text: str) -> Method:
        """Returns the configuration that `Method.to_json_string` wrote.

            config = jdelta.AutoDeltaConfig.from_json_string('{"delta_type": "lora", "lora_r": 4}')

        Args:
          text: the JSON.

        Raises:
          TypeError, ValueError: as `from_dict`; also `TypeError` if `text` is not a string, `ValueError` if not JSON.
        """
        if not isinstance(text, str | bytes):
            raise TypeError(f"from_json_string takes a string, got {shown(text)}.")
        try:
            return cls.from_dict(parsing.parsed(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"from_json_string: {shown(text)} is no JSON: {error}.") from error

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> Method:
        """Reads the configuration that `Method.to_json_file` wrote.

            jdelta.LoraConfig(lora_r=4).to_json_file("lora.json")
            config = jdelta.AutoDeltaConfig.from_json_file("lora.json")

        Args:
          path: the file.

        Raises:
          OSError: the file does not exist or cannot be read.
          TypeError, ValueError: as `from_dict`; `ValueError` also if the file does not hold a JSON object.
        """
        return cls.from_dict(parsing.json_object(as_path("from_json_file", path)))


class AutoDeltaModel:
    """Attaches the delta of any method.

        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    What it returns is the method's own: a `LoraModel` for a `LoraConfig`.
    """

    @classmethod
    def from_config(
        cls,
        config: Method,
        backbone_model: Any,
        name: str | None = None,
        rng: int | chex.PRNGKey = 0,
        dummy_inputs: DummyInputs | None = None,
    ) -> DeltaModel:
        """Attaches the delta that a configuration describes.

            config = jdelta.LoraConfig(modified_modules=["query"], lora_r=4)
            delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

        Args:
          config: the configuration of any method.
          backbone_model, name, rng, dummy_inputs: as in the constructor of `DeltaModel`.

        Raises:
          TypeError: `config` is no configuration.
          ValueError: it is that of no method.
          TypeError, ValueError: as the constructor.
        """
        if not isinstance(config, Method):
            raise TypeError(
                f"AutoDeltaModel.from_config takes a configuration such as LoraConfig(lora_r=4), got {config!r}. "
                "AutoDeltaConfig.from_dict makes one from a dict."
            )
        require_known(config.delta_type)
        return model_class(config).from_config(config, backbone_model, name, rng, dummy_inputs)

    @classmethod
    def from_finetuned(
        cls,
        source: str | os.PathLike[str] | Finetuned,
        backbone_model: Any,
        name: str | None = None,
        check_hash: bool | Literal["warn"] = "warn",
        revision: str | None = None,
        dummy_inputs: DummyInputs | None = None,
    ) -> DeltaModel:
        """Attaches a saved delta, with its values, the classifier head that trained with it, and what trains.

            delta = jdelta.AutoDeltaModel.from_finetuned("out/", backbone_model=model)

        The values have the bits and the dtype that were saved, the backbone's own too, whatever the model has; where
        that is narrower, a warning says so, as by `load_finetuned`. Where `model.params` holds shapes, they stand among
        these; with a model made with `_do_init=False`, call `delta.load_finetuned(source, params)` on your own tree.

        The folder may be a stranger's: it holds no code, its patterns have two seconds to be matched, all together, and
        its leaves are compared with the model's before any is made.

        Args:
          source: a folder that `save_finetuned` wrote, `"user/name"` on the Hub, or what `finetuned` gave.
          backbone_model, dummy_inputs: as in the constructor of `DeltaModel`.
          name: the delta's name in the tree; by default that which it had, or if it is taken, a numbered one.
          check_hash, revision: as in `DeltaModel.load_finetuned`.

        Raises:
          FileNotFoundError, PermissionError: no such folder or repository, or it is not open to this token.
          ConnectionError: no such folder, and the Hub cannot be reached.
          TypeError, ValueError: as `DeltaModel.load_finetuned`. The model is then as it was.
        """
        adapter = adapt(backbone_model, dummy_inputs)
        found = source if isinstance(source, Finetuned) else read_delta(source, revision, adapter.params)
        if found.inserted:
            raise ValueError(
                f"delta {found.name!r} has layers that were put in by hand, at {listing(found.inserted)}. Put them "
                "into this model in the same way, and call load_finetuned on that delta."
            )
        _require_few_patterns(found, len(adapter.structure().modules) + len(found.values))
        name = _free_name(found, adapter, backbone_model) if name is None else name
        with unchanged_on_error(adapter), regexes.limited():
            delta = model_class(found.config)._of(found.config, adapter, backbone_model, name, saved=found)
            delta.load_finetuned(found, check_hash=check_hash)
            if found.exclude is not None:
                delta.freeze_module(found.exclude)
        return delta


def _require_few_patterns(found: Finetuned, most: int) -> None:
    """Raises `ValueError` if somewhere there are more patterns or names than they can mean parts of the model."""
    fields = ("modified_modules", "exclude_modules", "unfrozen_modules", *found.config.pattern_fields)
    patterns = {field: getattr(found.config, field) for field in fields}
    patterns |= {"exclude": found.exclude, "targets": found.targets}
    for field, some in patterns.items():
        if len(some or ()) > most + 100:
            raise ValueError(f"{field} of the saved delta has {len(some):,} entries. This model has {most:,} parts.")


def _free_name(found: Finetuned, host: HostAdapter, backbone_model: Any) -> str | None:
    """The name of a saved delta, if the model can have another of it; else `None`."""
    if taken(found.name, DeltaState(host, backbone_model, found.config, "")) is not None:
        return None
    named_like_a_leaf = any(leaf.split(".").count(found.name) > 1 for leaf in found.values if found.is_own(leaf))
    return None if named_like_a_leaf else found.name  # earlier versions allowed it
