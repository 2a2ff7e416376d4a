"""The docstrings of the public interface: an example of each name, and every argument."""

import ast
import inspect
import re
import textwrap

import pytest

import jdelta

NAMES = [name for name in jdelta.__all__ if name != "__version__"]
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):$", flags=re.M)


def example(documented):
    """The indented lines before the first section, as code."""
    text = SECTION.split(inspect.getdoc(documented) or "")[0]
    return textwrap.dedent("\n".join(line for line in text.splitlines() if line.startswith("    ")))


def listed(documented):
    """The arguments in a docstring's sections."""
    parts = SECTION.split(inspect.getdoc(documented) or "")[1:]
    text = "\n".join(
        text for title, text in zip(parts[::2], parts[1::2], strict=True) if title in ("Args", "Attributes")
    )
    entries = re.findall(r"^  ([*\w, ]+):", text, flags=re.M)
    return {name.strip(" *") for entry in entries for name in entry.split(",")}


def documenting(public):
    """A public name, and where it says that its other arguments are documented."""
    if not inspect.isclass(public):
        return [public]
    found = [public, *public.__mro__, *getattr(public, "method_class", type).__mro__]
    return [cls for cls in found if cls.__module__.startswith("jdelta")]


@pytest.mark.parametrize("name", NAMES)
def test_each_public_name_has_an_example_that_is_python_and_names_what_exists(name):
    code = example(getattr(jdelta, name))
    assert code
    used = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)]
    for node in used:
        if isinstance(node.value, ast.Name) and node.value.id == "jdelta":
            assert node.attr in jdelta.__all__


@pytest.mark.parametrize("name", NAMES)
def test_each_argument_of_a_public_name_is_documented(name):
    public = getattr(jdelta, name)
    found = set().union(*map(listed, documenting(public)))
    assert set(inspect.signature(public).parameters) <= found


def methods():
    """The public methods of the public classes. Those of jdelta's own methods are documented at `Method`."""
    for name in NAMES:
        if inspect.isclass(cls := getattr(jdelta, name)) and jdelta.Method not in cls.__mro__[1:]:
            for key, value in vars(cls).items():
                function = getattr(value, "__func__", value)
                if inspect.isfunction(function) and not key.startswith("_"):
                    yield pytest.param(function, id=f"{name}.{key}")


@pytest.mark.parametrize("method", methods())
def test_each_argument_of_a_public_method_is_documented(method):
    assert set(inspect.signature(method).parameters) - {"self", "cls"} <= listed(method)


@pytest.mark.parametrize(
    "verb", [key for key, value in vars(jdelta.DeltaModel).items() if inspect.isfunction(value) and key[0] != "_"]
)
def test_each_verb_of_a_delta_has_an_example_that_uses_it(verb):
    code = example(getattr(jdelta.DeltaModel, verb))
    assert verb in {node.attr for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)}
