"""Soft prompt: trainable vectors before the embedded input (Lester et al. 2021, arXiv 2104.08691).

The prompt's tokens have ids of their own, beyond the vocabulary. They are put before the input's where the model embeds
those; masks, token types and positions grow with them; after the last layer they are taken off again.
Numbers agree with PyTorch PEFT's prompt tuning; where a head pools the first position, with `pool_prompt`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jdelta.core.arguments import arguments, input_if_any, is_array
from jdelta.core.config import require_count, require_positive
from jdelta.core.edits import CallEdit
from jdelta.core.method import Method, Site
from jdelta.core.structure import ModuleInfo, Structure
from jdelta.hosts.transformers.positions import positions
from jdelta.methods.prompt_layers import EncoderStatesCut, MaskGrown, Prompted, PromptPooled, PromptTable
from jdelta.names import common_names
from jdelta.trees import addressing, dtypes, surgery
from jdelta.trees.surgery import Path

_CALL = "__call__"


@dataclasses.dataclass(frozen=True)
class SoftPromptConfig(Method):
    """Arguments of the soft prompt.

        config = jdelta.SoftPromptConfig(soft_token_num=20)
        delta = jdelta.AutoDeltaModel.from_config(config, backbone_model=model)

    Attributes:
      soft_token_num: number of trainable vectors.
      init_range: without `token_init`, they start at U(±init_range).
      token_init: start them at the first rows of the word embedding.
      pool_prompt: whether a pooler, a module that reads the first of all positions, reads the prompt's first, as in
        PyTorch PEFT, and not the input's.
    """

    delta_type = "soft_prompt"
    default_modified_modules = ("embeddings",)

    soft_token_num: int = 100
    init_range: float = 0.5
    token_init: bool = True
    pool_prompt: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_count("soft_token_num", self.soft_token_num)
        require_positive("init_range", self.init_range)

    def place(self, site: Site, patterns: Sequence[str]) -> Iterable[CallEdit]:
        structure = site.structure
        hosts, method = self._embeddings(site, patterns)
        if not hosts:
            raise TypeError(f"SoftPromptModel: the modules that {list(patterns)} mean take no token ids.")
        if len(hosts) > 1 and self.modified_modules is not None:
            names = ", ".join(host.name for host in hosts)
            raise ValueError(f"SoftPromptModel goes before one input; {list(patterns)} mean {names}. Name one.")
        host = hosts[0]
        callers = structure.callers(host)
        layers = common_names.known(structure, ["attn"])
        top, entry, exit = _extent(structure, [host, *callers], layers)
        entry = top.path if method != _CALL and entry == host.path else entry
        reading = [info for info in callers if _attends_to_encoder(info)]
        if reading and not all(_within(structure, info, reading) for info in layers):
            raise TypeError(
                f"SoftPromptModel: {host.name} takes the tokens of a decoder whose encoder takes none; a prompt before "
                "the encoder's input needs token ids there."
            )
        ids = self._ids(host, site)
        table = PromptTable(ids, host.y.shape[-1], self.init_range)
        yield CallEdit(host.path, "around", table, outermost=True, method=method)
        reads = [info for info in structure if _attends_to_encoder(info) and info not in callers]
        decoders = [info for info in reads if not _within(structure, info, [top, *reads])]
        around = Prompted(ids, entry, None if decoders or self.pool_prompt else exit, positions(top))
        yield CallEdit(top.path, "around", around, auxiliary=True)
        if self.pool_prompt:
            pooled = PromptPooled(len(ids), exit, tuple(info.path for info in self._poolers(structure, exit)))
            yield CallEdit((), "around", pooled, leaf=("pooled",), auxiliary=True)
        for info in decoders:
            yield CallEdit(info.path, "around", MaskGrown(), auxiliary=True)
        if decoders:
            yield CallEdit((), "around", EncoderStatesCut(top.path), auxiliary=True)

    def _embeddings(self, site: Site, patterns: Sequence[str]) -> tuple[list[ModuleInfo], str]:
        """The modules that patterns mean and that take token ids, and the method by which they are run."""
        try:
            return [info for info in site.find(patterns) if _takes_ids(info)], _CALL
        except ValueError:
            structure = site.structure
            names = common_names.places(structure, patterns) if set(patterns) <= set(common_names.NAMES) else set()
            names |= {name for name, _ in structure.by_method for p in patterns if addressing.matches(name, p)}
            found = {key: info for key, info in structure.by_method.items() if key[0] in names and _takes_ids(info)}
            if not found:
                raise
        for (name, method), info in found.items():
            others = [(n, m) for (n, m), other in structure.by_method.items() if n == name and _takes(other, info.x)]
            if others != [(name, method)]:
                raise TypeError(
                    f"SoftPromptModel: {name} looks token ids up in several ways, by its methods "
                    f"{', '.join(m for _, m in others)}, and a prompt has no place in all of them."
                )
        return list(found.values()), next(iter(found))[1]

    def _poolers(self, structure: Structure, exit: Path) -> list[ModuleInfo]:
        found = _poolers(structure, exit)
        if not found:
            raise TypeError(
                "SoftPromptModel: pool_prompt needs a pooler, and no module of this model makes one position of all. "
                "Leave it out."
            )
        return found

    def _ids(self, host: ModuleInfo, site: Site) -> range:
        """Ids beyond the vocabulary, and beyond other prompts'."""
        table = _table(host.params, host.y.shape[-1])
        if table is None:
            raise TypeError(f"SoftPromptModel at {host.name} ({host.type.__name__}): it is no word embedding.")
        edits = [edit for a in site.attachments for edit in a.edits if edit.host == host.path]
        taken = [edit.layer.prompt_ids.stop for edit in edits if isinstance(edit.layer, PromptTable)]
        start = max([table.shape[0], *taken])
        return range(start, start + self.soft_token_num)

    def init_from_backbone(
        self, leaves: Mapping[Path, jax.Array], params: Mapping[Path, jax.Array]
    ) -> Mapping[Path, jax.Array]:
        if not self.token_init:
            return leaves
        n = self.soft_token_num
        own = [p for p, leaf in leaves.items() if p[-1] == "embedding" and len(leaf) == n]
        rows: dict[Path, Any] = {}
        for p in own:
            table = _table({q[-1]: leaf for q, leaf in params.items() if q[:-1] == p[:-2]}, leaves[p].shape[1])
            rows |= {} if table is None else {p: table}
        for path, table in rows.items():
            if dtypes.is_fixed(table):
                raise ValueError(
                    f"SoftPromptModel starts from rows of {surgery.name_of(path[:-2])}, which holds {table.dtype}, and "
                    "they are no vectors by themselves. Pass token_init=False."
                )
        started = {p: jnp.resize(table[:n], (n, table.shape[1])).astype(jnp.float32) for p, table in rows.items()}
        return {**leaves, **started}


def _extent(
    structure: Structure, path: Sequence[ModuleInfo], attention: Sequence[ModuleInfo]
) -> tuple[ModuleInfo, Path, Path]:
    """Where a prompt is in the model: the module that calls both word embedding and layers, the module in it that takes
    the ids, and the last that has layers in it. In a model whose layers are unknown, the root is all three."""
    layers = [[info, *structure.callers(info)] for info in attention]
    inside = {info.path for stack in layers for info in stack}
    for i, top in enumerate(path):
        if top.path in inside:
            last = next(stack for stack in reversed(layers) if top in stack)
            return top, path[i - 1].path, last[last.index(top) - 1].path
    root = path[-1]
    return root, root.path, root.path


def has_pooler(structure: Structure, host: ModuleInfo) -> bool:
    """Whether a model has a module that reads the first position after its layers, for `pool_prompt`."""
    layers = common_names.known(structure, ["attn"])
    return bool(_poolers(structure, _extent(structure, [host, *structure.callers(host)], layers)[2]))


def _poolers(structure: Structure, exit: Path) -> list[ModuleInfo]:
    """The outermost modules that run after one of a path, and make `(batch, width)` of its `(batch, length, width)`."""
    infos = list(structure)
    start = [info.path for info in infos].index(exit)
    found: list[ModuleInfo] = []
    for info in infos[start + 1 :]:
        inside = info.path[: len(exit)] == exit or any(info.path[: len(f.path)] == f.path for f in found)
        if not inside and is_array(info.x) and is_array(info.y) and (len(info.x.shape), len(info.y.shape)) == (3, 2):
            found.append(info)
    return found


def _within(structure: Structure, info: ModuleInfo, others: Sequence[ModuleInfo]) -> bool:
    """Whether a module is called inside one of the others."""
    return any(caller in others for caller in structure.callers(info))


def _attends_to_encoder(info: ModuleInfo) -> bool:
    return is_array(arguments(info.type, info.args, info.kwargs).arguments.get("encoder_hidden_states"))


def _takes_ids(info: ModuleInfo) -> bool:
    x = input_if_any(info.type, info.args, info.kwargs) if info.args or info.kwargs else None
    return x is not None and jnp.issubdtype(x.dtype, jnp.integer)


def _takes(info: ModuleInfo, ids: Any) -> bool:
    """Whether ids of a shape are among the arguments of a call."""
    given = [a for a in (*info.args, *info.kwargs.values()) if is_array(a)]
    return (ids.shape, ids.dtype) in [(a.shape, a.dtype) for a in given]


def _table(params: Mapping[str, Any], width: int) -> Any:
    """The word embedding, `(vocabulary, width)`, among a module's own parameters; `None` if it is not clear which."""
    tables = {key: leaf for key, leaf in params.items() if len(leaf.shape) == 2 and leaf.shape[1] == width}
    return tables.get("embedding", next(iter(tables.values())) if len(tables) == 1 else None)
