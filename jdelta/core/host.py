"""What jdelta asks of a backbone, whatever module system it is written in."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import chex
import jax

from jdelta.core.edits import Attachment, Edit
from jdelta.core.structure import Structure
from jdelta.trees.surgery import Tree


class HostAdapter(Protocol):
    """A model as the rest of jdelta sees it: its parameters, its structure, and the deltas that it carries.

    Attributes:
      params: the tree of parameters; `None` where the user holds it elsewhere.
    """

    params: Tree | None

    @property
    def class_name(self) -> str:
        """The name of the model's class."""
        ...

    @property
    def source_repo(self) -> str:
        """Where it was loaded from, a folder or a repository of the Hub; `""` if nobody knows."""
        ...

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        """What it carries, in the order of attaching, active or not."""
        ...

    def install(self, attachments: Sequence[Attachment]) -> None:
        """Makes the model carry exactly these, and run those that are active."""
        ...

    def uninstall(self) -> None:
        """Gives the model back as it was before anything was installed: nothing of jdelta is left on it."""
        ...

    def snapshot(self) -> Callable[[], None]:
        """A function that gives the model back what it carries now, and the parameters that it has now."""
        ...

    def structure(self) -> Structure:
        """The modules of the backbone alone, without the deltas, from one abstract run."""
        ...

    def tree(self) -> Tree:
        """The parameters with those of the active deltas; their shapes, where the user holds the values."""
        ...

    def held_tree(self) -> Tree:
        """The tree as the model's user holds it: `tree`, or the state of an nnx module, with its other variables."""
        ...

    def variant(
        self, attachments: Sequence[Attachment]
    ) -> contextlib.AbstractContextManager[Callable[[Tree], tuple[Any, Callable[..., Any]]]]:
        """The model with these attachments in place of its own, while this lasts.

        It gives a function of a tree of parameters: to what a loss takes, which is the tree, or an nnx module that
        holds it; and to the model's call with it.
        """
        ...

    def init(self, attachments: Sequence[Attachment], rng: chex.PRNGKey, trial: Trial | None = None) -> Tree:
        """Fresh parameters of the backbone with these attachments, laid out as `params`: it is run on its pseudo input.

        Args:
          attachments: what it runs, in place of what it carries.
          rng: the key.
          trial: where to note what is seen; the model is then run once more after it was initialised.
        """
        ...

    def remember_tree(self, tree: Tree) -> None:
        """Notes the shapes that `tree` gives, so that they need not be traced again."""
        ...


@dataclasses.dataclass
class Trial:
    """A run of a model with deltas, to see what it does.

    Attributes:
      probes: name of a rewritten leaf to a number that is added to it.
      ran: the edits that were run.
      outputs: what the model returned.
    """

    probes: Mapping[str, jax.Array] = dataclasses.field(default_factory=dict)
    ran: set[Edit] = dataclasses.field(default_factory=set)
    outputs: list[Any] = dataclasses.field(default_factory=list)


class Cache(dict[str, tuple[Any, Any]]):
    """What the newest traces found, by what it is, and of which module. A copy or a pickle is empty."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Cache, ()

    def find(self, what: str, of: Any, make: Callable[[], Any]) -> Any:
        """What was found of this module; it is made if that was another one."""
        known, found = self.get(what, (None, None))
        if known is not of:
            found = make()
            self[what] = (of, found)
        return found


@contextlib.contextmanager
def unchanged_on_error(host: HostAdapter) -> Iterator[None]:
    """Whatever is raised inside, the backbone carries what it carried, and has the parameters that it had."""
    restore = host.snapshot()
    try:
        yield
    except BaseException:
        restore()
        raise
