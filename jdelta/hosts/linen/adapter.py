"""What all hosts made of a linen module have in common."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import chex
import jax
from flax import linen as nn

from jdelta.core.edits import Attachment
from jdelta.core.host import Cache, Trial
from jdelta.core.structure import Structure
from jdelta.hosts.linen.instrument import attachments_of, bare, instrument
from jdelta.hosts.linen.trace import trace
from jdelta.trees.surgery import Tree


class LinenAdapter:
    """A `jdelta.core.host.HostAdapter` on a linen module: a subclass says where module and parameters are."""

    module: nn.Module
    params: Tree | None

    @property
    def cache(self) -> Cache:
        """What the newest traces found."""
        return vars(self).setdefault("_cache", Cache())

    def run_init(self, module: nn.Module, rng: chex.PRNGKey) -> Tree:
        """Initialises `module`, a variant of this backbone's, on the pseudo input."""
        raise NotImplementedError

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        """See `HostAdapter`."""
        return attachments_of(self.module)

    def install(self, attachments: Sequence[Attachment]) -> None:
        """See `HostAdapter`."""
        self.module = instrument(self.module, attachments)

    def uninstall(self) -> None:
        """See `HostAdapter`."""
        self.install(())

    def snapshot(self) -> Callable[[], None]:
        """See `HostAdapter`."""
        module, params = self.module, self.params

        def restore() -> None:
            self.module = module
            if params is not None:
                self.params = params

        return restore

    def structure(self) -> Structure:
        """See `HostAdapter`."""
        module = bare(self.module)
        run: Callable[[], Tree] = lambda: self.run_init(module, jax.random.key(0))  # noqa: E731
        return self.cache.find("structure", module, lambda: trace(run, type(module)))

    def held_tree(self) -> Tree:
        """See `HostAdapter`."""
        return self.tree()

    def tree(self) -> Tree:
        """See `HostAdapter`."""
        if self.params is not None:
            return self.params
        module = self.module
        run: Callable[[], Tree] = lambda: self.run_init(module, jax.random.key(0))  # noqa: E731
        return self.cache.find("tree", module, lambda: jax.eval_shape(run))

    def remember_tree(self, tree: Tree) -> None:
        """See `HostAdapter`."""
        self.cache["tree"] = (self.module, tree)

    def run_call(self, *args: Any, params: Tree, **kwargs: Any) -> Any:
        """Calls the model with these parameters."""
        raise NotImplementedError

    @contextlib.contextmanager
    def variant(self, attachments: Sequence[Attachment]) -> Iterator[Callable[[Tree], tuple[Any, Callable[..., Any]]]]:
        """See `HostAdapter`."""
        restore = self.snapshot()
        try:
            self.install(attachments)
            yield lambda params: (params, functools.partial(self.run_call, params=params))
        finally:
            restore()

    def init(self, attachments: Sequence[Attachment], rng: chex.PRNGKey, trial: Trial | None = None) -> Tree:
        """See `HostAdapter`."""
        return self.run_init(instrument(self.module, attachments, trial), rng)
