"""Selecting modules interactively, in a web page: `select_modules`, and `interactive_modify=True` of every method."""

from __future__ import annotations

import dataclasses
import json
import re
import socket
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any, cast

from jdelta.core.attaching import tried
from jdelta.core.method import Method
from jdelta.core.placement import edits_at
from jdelta.core.state import DeltaState, new_state
from jdelta.core.structure import Structure
from jdelta.display.interactive import notebook
from jdelta.display.interactive.cost import Costs, costs, format_arguments, parameter_costs
from jdelta.display.interactive.describe import describe
from jdelta.display.interactive.server import Refused, Server
from jdelta.hosts.adapting import adapt
from jdelta.hosts.nnx.adapter import DummyInputs
from jdelta.trees import addressing

Take = Callable[[list[str]], None]


def select_modules(
    backbone_model: Any,
    method: type[Any] | Method | None = None,
    *,
    host: str = "127.0.0.1",
    port: bool | int = True,
    dummy_inputs: DummyInputs | None = None,
    **arguments: Any,
) -> list[str]:
    """Shows the model as a tree in a web page, waits, and returns the modules that were selected there.

        names = jdelta.select_modules(model, jdelta.LoraModel, lora_r=4)
        delta = jdelta.LoraModel(model, names, lora_r=4)

    The printed link carries a random token, and the server refuses requests without it. It listens on the loopback
    address only, and ends with the first selection. In Jupyter and Colab the page is shown in the notebook. Ctrl-C
    stops. The model is not changed.

    Args:
      backbone_model: a Flax model of transformers, a `jdelta.Backbone`, or an nnx module.
      method: the method that the modules are for, or its configuration. The page then shows the costs of the selection,
        and which modules the method cannot be attached at, and why.
      host: the address to listen at. With any other than the loopback address, others who read the traffic can answer.
      port: the port; `True` for the first free one from 8888 on.
      dummy_inputs: of an nnx module, as in the constructor of `DeltaModel`.
      **arguments: the method's own, see its configuration; also `exclude_modules` and `unfrozen_modules`.

    Returns:
      The names, in order of execution, for `modified_modules`.

    Raises:
      KeyboardInterrupt: Ctrl-C.
      OSError: the port is in use, or the address is not this machine's.
      TypeError, ValueError: the backbone is not a supported model, the method's modules cannot be selected one by one,
        or an argument is wrong.
    """
    adapt(backbone_model, dummy_inputs)  # which remembers the inputs
    if method is None:
        structure = _without_method("select_modules", backbone_model, arguments)
        return _ask(structure, None, {"": "The whole model has no name to choose it by."}, None, host, port)
    state = _unattached(backbone_model, method, arguments)

    def take(names: list[str]) -> None:
        tried(state, edits_at(state, names))

    return choose(state, port, take, host)


def select_parameters(
    backbone_model: Any,
    method: type[Any] | Method | None = None,
    *,
    host: str = "127.0.0.1",
    port: bool | int = True,
    dummy_inputs: DummyInputs | None = None,
    **arguments: Any,
) -> list[str]:
    """Shows the model with its parameters in a web page, waits, and returns the parameters that were selected there.

        names = jdelta.select_parameters(model, jdelta.LoraModel, lora_r=4)
        delta = jdelta.LoraModel(model, modified_parameters=names, lora_r=4)

    Args:
      backbone_model, host, port, dummy_inputs, **arguments: as in `select_modules`.
      method: the method that the parameters are for, or its configuration. The page then shows what the selection
        costs, and which parameters cannot take it and why.

    Returns:
      The names, in the order of the tree, for `modified_parameters`.

    Raises:
      KeyboardInterrupt, OSError, TypeError, ValueError: as `select_modules`.
    """
    adapt(backbone_model, dummy_inputs)
    if method is None:
        structure = _without_method("select_parameters", backbone_model, arguments)
        return _ask(structure, None, {}, None, host, port, parameters=True)
    state = _unattached(backbone_model, method, arguments, "select_parameters")
    found = parameter_costs(state, state.method.exclude_modules or ())

    def take(names: list[str]) -> None:
        chosen = dataclasses.replace(state, method=dataclasses.replace(state.method, modified_parameters=tuple(names)))
        tried(chosen, edits_at(chosen, ()))

    return _ask(state.structure, state, dict(found.reasons), found, host, port, take, parameters=True)


def choose(state: DeltaState, port: bool | int, take: Take, host: str = "127.0.0.1") -> list[str]:
    """Shows the page for a delta that is not attached yet, and gives the names to `take` until that raises nothing.

    Raises:
      ValueError: the modules of this method cannot be chosen one by one.
    """
    kind = type(state.method)
    if not kind.takes_single_modules():
        raise ValueError(
            f"{state.label} finds its own places or takes pairs of modules, which cannot be chosen one by one in a "
            "page. Write modified_modules=[…] (see the class), or leave it out for the default positions; "
            "jdelta.select_modules(model) shows the names."
        )
    if not kind.has_edits():
        raise ValueError(f"{state.label} does nothing to modules of itself: there is nothing to choose.")
    found = costs(state, state.method.exclude_modules or ())
    return _ask(state.structure, state, dict(found.reasons), found, host, port, take)


def _ask(
    structure: Structure,
    state: DeltaState | None,
    reasons: dict[str, str],
    found: Costs | None,
    host: str,
    port: bool | int,
    take: Take = lambda names: None,
    parameters: bool = False,
) -> list[str]:
    noun = "parameters" if parameters else "modules"
    names = [name for name in structure.modules if name]
    if parameters:
        reasons = {**dict.fromkeys(structure.modules, "Modules are chosen by select_modules."), **reasons}
        names = [parameter.name for parameter in structure.parameters]
    page = describe(
        structure,
        reasons,
        found,
        parameters,
        model=structure[""].type.__name__,
        method=state.label if state is not None else "",
        arguments=format_arguments(state.method) if state is not None else "",
    )

    def accept(answer: Any) -> list[str]:
        chosen = patterns_of(_checked(answer, names, reasons, noun[:-1]), names)
        take(chosen)
        return chosen

    limit = 4096 + 2 * len(json.dumps(names))
    with Server(lambda nonce: document(page, nonce), host, port, limit, *notebook.trust()) as server:
        _announce(server, page["method"], noun)
        notebook.show(server)
        try:
            chosen = server.wait(accept)
        except KeyboardInterrupt:
            print("\nStopped; nothing was chosen, and the model is as it was.", flush=True)
            raise
    print(f"modified_{noun}: {chosen!r}", flush=True)
    return chosen


def document(page: dict[str, Any], nonce: str) -> str:
    """The whole page: the template with the model's description in it, in which no `<` is left as it was."""
    template = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    data = json.dumps(page, separators=(",", ":"))  # ASCII, so no U+2028 either
    for char in "<>&":
        data = data.replace(char, f"\\u{ord(char):04x}")
    before, after = template.replace("__NONCE__", nonce).split("__DATA__")
    return before + data + after


def patterns_of(chosen: Sequence[str], names: Sequence[str]) -> list[str]:
    """Patterns that mean exactly these modules: their names, or where another name ends with that, a regex."""
    endings: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        for i in range(len(parts)):
            ending = ".".join(parts[i:])
            endings[ending] = endings.get(ending, 0) + 1
    plain = [n if endings[n] == 1 and not n.startswith(addressing.REGEX_MARK) else None for n in chosen]
    return [p or f"{addressing.REGEX_MARK}^{re.escape(n)}" for p, n in zip(plain, chosen, strict=True)]


def _checked(answer: Any, names: Sequence[str], reasons: dict[str, str], noun: str = "module") -> list[str]:
    """The names that a page sent, in order of execution. Raises `Refused` for anything else."""
    sent = answer.get("modules") if isinstance(answer, dict) else None
    if not isinstance(sent, list) or not all(isinstance(name, str) for name in sent):
        raise Refused('The answer is {"modules": [names]}.')
    if not sent:
        raise Refused("Nothing is chosen. Choose at least one module.")
    known = set(names)
    for name in sent:
        if name not in known:
            raise Refused(addressing.nothing_matches(name, names, noun))
        if name in reasons:
            raise Refused(f"{name} cannot be chosen: {reasons[name]}")
    wanted = set(sent)
    return [name for name in names if name in wanted]


def _without_method(verb: str, backbone_model: Any, arguments: dict[str, Any]) -> Structure:
    """The structure of a model. Raises `TypeError` if there are arguments of a method that was not given."""
    if arguments:
        raise TypeError(f"{verb}: {', '.join(arguments)} belong to a method. Give it too: method=….")
    return adapt(backbone_model).structure()


def _unattached(
    backbone_model: Any, method: Any, arguments: dict[str, Any], verb: str = "select_modules"
) -> DeltaState:
    """A delta of this method that is on no module yet; `verb` is who asks."""
    if isinstance(method, Method):
        if arguments:
            raise TypeError(f"{verb}: a configuration has its arguments already, got also {', '.join(arguments)}.")
        config, label = method, method.described()
    elif isinstance(method, type) and issubclass(kind := getattr(method, "method_class", method), Method):
        config, label = cast(type[Method], kind).from_arguments(method.__name__, arguments), method.__name__
    else:
        raise TypeError(f"{verb}: the method is a class such as jdelta.LoraModel or a config, got {method!r}.")
    if config.modified_modules is not None or config.common_structure:
        raise ValueError(f"{verb}: the page chooses the modules; leave modified_modules and common_structure out.")
    if config.modified_parameters is not None and verb == "select_parameters":
        raise ValueError(f"{verb}: the page chooses the parameters; leave modified_parameters out.")
    return new_state(adapt(backbone_model), backbone_model, config, label, None, 0)


def _announce(server: Server, method: str, noun: str = "modules") -> None:
    port, what = server.server_port, f" of {method}" if method else ""
    remote = f"It listens at {server.host}: whoever can read the traffic on the way can answer.\n"
    if server.private:
        remote = (
            "If Python runs on another machine than your browser, forward the port first, from yours:\n"
            f"    ssh -L {port}:127.0.0.1:{port} {socket.gethostname()}\n"
        )
    print(
        f"Choose the {noun}{what} in this page:\n\n    {server.url}\n\n{remote}"
        "Waiting for the selection; Ctrl-C stops and leaves the model as it is.",
        flush=True,
    )
