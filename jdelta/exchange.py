"""From PEFT: an adapter that PyTorch PEFT saved is attached to a Flax model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from jdelta.auto import AutoDeltaModel
from jdelta.core.config import as_type
from jdelta.core.host import HostAdapter, unchanged_on_error
from jdelta.core.warn import warn
from jdelta.delta import DeltaModel
from jdelta.hosts.adapting import adapt
from jdelta.hosts.nnx.adapter import DummyInputs
from jdelta.saved import hub
from jdelta.saved.finetuned import Finetuned, listing
from jdelta.saved.peft.limits import known_fields
from jdelta.saved.peft.names import CONFIG, TENSORS, Names, Tensors, fitted, shapes_of
from jdelta.saved.peft.reading import READERS, PeftAdapter, checksum, patterns_of, read
from jdelta.trees import dtypes, freezing, processes, regexes, surgery
from jdelta.trees.surgery import Tree


def from_peft(
    source: str | os.PathLike[str],
    backbone_model: Any,
    name: str | None = None,
    revision: str | None = None,
    keep_dtype: bool = False,
    dummy_inputs: DummyInputs | None = None,
) -> DeltaModel:
    """Attaches an adapter that PyTorch PEFT saved, with its values and with what else was trained with it.

        delta = jdelta.from_peft("out/", backbone_model=model)

    LoRA (of any rank pattern, on dense layers, convolutions and embeddings), the other methods of PEFT's that
    `docs/peft.md` lists, prefix tuning and prompt tuning become deltas that compute what PEFT does in the same call: a
    prefix shifts positions (`shift_positions`), and a pooler reads the prompt (`pool_prompt`). `modules_to_save` and
    trained biases become values of the backbone's leaves, and train further with the delta. Keys may contain the
    adapter's name, and the prefixes of torch.compile and of data parallelism. Two things differ: PEFT returns a
    prompt's positions among the outputs, and in its `generate`, padding before the input counts as positions after a
    prompt.

    Args:
      source: a folder, or `"user/name"` on the Hub.
      backbone_model: the Flax model of the same class; with or without its head.
      name: the delta's name in the tree; by default that of its method.
      revision: branch, tag or commit of the repository.
      keep_dtype: whether the delta's own leaves have the dtype of the file. By default they become float32, as PEFT
        loads them: in less, most steps of an optimizer are rounded away. The backbone's own leaves always keep the
        dtype that they have in the model, as in PEFT; if that rounds what is in the file, a warning says so.
      dummy_inputs: of an nnx module, as in the constructor of `DeltaModel`.

    Raises:
      FileNotFoundError: the folder or repository does not exist, or lacks one of the two files.
      PermissionError, ConnectionError: of the Hub.
      TypeError: the backbone is not a supported model, or the source is not a path.
      ValueError: a file is damaged, has an unsupported option (the message names the field), or does not fit the
        model. The model is then as it was.
    """
    as_type("keep_dtype", keep_dtype, bool)
    host_adapter = adapt(backbone_model, dummy_inputs)
    if host_adapter.params is None:
        raise ValueError("the model holds no parameters that the values could go into. Give it some: model.params = ….")
    names = Names.of(host_adapter.structure(), getattr(backbone_model, "base_model_prefix", ""))

    def found() -> tuple[Path, dict[str, Any], Tensors]:
        path = hub.fetch(source, revision, (CONFIG, TENSORS))
        return path, *read(path, names)

    path, fields, tensors = processes.together(found, checksum) if processes.spread(host_adapter.params) else found()
    try:
        fields = known_fields(fields)
        for field in ("rank_pattern", "alpha_pattern", "modules_to_save"):
            if len(fields.get(field) or ()) > len(names.modules) + len(tensors) + 100:
                raise ValueError(
                    f"{field} has {len(fields[field]):,} patterns, and the file has {len(tensors)} tensors."
                )
        with unchanged_on_error(host_adapter), regexes.limited():
            adapter = READERS[fields["peft_type"]](fields, tensors, names)
            return _attached(adapter, names, host_adapter, backbone_model, name, keep_dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _attached(
    adapter: PeftAdapter, names: Names, host: HostAdapter, backbone_model: Any, name: str | None, keep_dtype: bool
) -> DeltaModel:
    own = {**adapter.leaves, **{("", leaf): value for leaf, value in adapter.shared.items()}}
    for (module, leaf), value in own.items():
        if not jnp.issubdtype(value.dtype, jnp.floating) and not adapter.config.frozen((leaf,)):
            raise ValueError(f"{leaf!r} of the adapter at {module or 'the model'!r} is {value.dtype}, and no float.")
    delta = AutoDeltaModel.from_config(adapter.config, backbone_model, name=name)
    shapes, values = shapes_of(delta.shapes()), {}
    for (module, leaf), value in adapter.leaves.items():
        key = f"{module or delta.targets[0]}.{delta.name}.{leaf}"
        values[key] = fitted(value, shapes.get(key, value.shape))
    values |= {f"{delta.name}.{leaf}": value for leaf, value in adapter.shared.items()}
    for path, leaf in surgery.flatten(surgery.parameters(host.params)).items():
        if path in delta.paths and adapter.config.frozen(path):  # PEFT makes these anew from the weights
            values.setdefault(surgery.name_of(path), processes.to_host(meta.unbox(leaf)))
    wide = {
        key: value.astype(np.float32) if jnp.issubdtype(value.dtype, jnp.floating) else value
        for key, value in values.items()
    }
    saved = _news(adapter, names, host.params)
    delta.load_finetuned(Finetuned(delta.name, adapter.config, wide | saved, delta.targets), check_hash=False)
    if keep_dtype:
        params = host.params
        paths = {surgery.name_of(path): (*surgery.root(params), *path) for path in delta.paths}
        host.params = surgery.replaced(params, {paths[key]: value for key, value in values.items()})
    own_paths = {surgery.name_of(path) for path in delta.filter.paths}
    if others := saved.keys() - own_paths:
        delta.freeze_module(
            [freezing.DELTAS, *patterns_of(others, adapter.modules_to_save, shapes_of(delta.structure.params))]
        )
    return delta


def _news(adapter: PeftAdapter, names: Names, params: Tree) -> dict[str, np.ndarray]:
    """The backbone's leaves that train, or that the file has other values of; PEFT saves some that are as they were.

    In the dtype that they have in the model.
    """
    leaves = surgery.flatten(surgery.parameters(params))
    have = {surgery.name_of(path): meta.unbox(leaf) for path, leaf in leaves.items() if path}
    news, rounded = {}, []
    for name, tensor in adapter.saved.items():
        value, old = names.in_flax(name, tensor), have[name]
        if dtypes.takes_steps(value.dtype) and not dtypes.is_fixed(old):
            value, given = value.astype(old.dtype), value
            if not np.array_equal(value.astype(given.dtype), given):
                rounded.append(f"{name} ({given.dtype} to {value.dtype})")
        known = not isinstance(old, jax.ShapeDtypeStruct) and np.array_equal(value, processes.to_host(old))
        if name in adapter.trains or not known:
            news[name] = value
    if rounded:
        warn(
            f"from_peft: the model's dtype rounds what is saved of {listing(rounded)}, as in PEFT. To keep it, cast "
            "the model before."
        )
    return news
