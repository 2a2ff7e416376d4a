"""The tiers of tests: what the plain command leaves out, what each needs, and the command that runs it.

A tier's name is its marker; `addopts` in pyproject.toml deselects them. The last lines of a run tell what it left out.
"""

import importlib.util
import shlex
import shutil
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest


class Tier(NamedTuple):
    """What a tier needs beside the extra `test`: packages, by the extra that brings them, and a browser."""

    holds: str
    packages: tuple[str, ...] = ()
    extra: str = ""
    browser: bool = False

    @property
    def needs(self) -> str:
        """What to install, "" if nothing."""
        extra = f"pip install -e '.[{self.extra}]'" if self.extra else ""
        return extra + (" and Chromium (Debian: apt-get install chromium)" if self.browser else "")

    def missing(self) -> list[str]:
        """What it needs and this machine does not have."""
        found = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return found + ["Chromium"] * (self.browser and chromium() is None)


TIERS = {
    "slow": Tier("all classes and families, the examples, meshes of devices"),
    "browser": Tier("the selection page", ("playwright", "axe_playwright_python"), "browser", browser=True),
    "parity": Tier("comparisons with PyTorch PEFT", ("torch", "peft"), "parity"),
    "tunix": Tier("the models of tunix", ("tunix", "qwix"), "tunix"),
}
DEFAULT = " and ".join(f"not {name}" for name in TIERS)  # as in pyproject.toml
_counts = pytest.StashKey[Counter[str]]()


def chromium() -> str | None:
    """The path of Chromium, if it is installed."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def breadth(cases: Iterable[Any], *quick: Any) -> list[Any]:
    """The cases of a parametrised test, of which the plain command runs only the quick ones: the others are `slow`.

    Raises:
        ValueError: if a quick one is none of the cases.
    """
    cases = list(cases)
    if strangers := [case for case in quick if case not in cases]:
        raise ValueError(f"{strangers} are none of the cases {cases}")
    return [pytest.param(case, id=_named(case), marks=() if case in quick else pytest.mark.slow) for case in cases]


def _named(case: Any) -> str | None:
    """What `-k` finds a case of several parts by; pytest would number them."""
    return "-".join(map(str, case)) if isinstance(case, tuple) else None


def tiers_of(item: pytest.Item) -> Iterator[str]:
    """The tiers of a test, usually none or one."""
    return (name for name in TIERS if item.get_closest_marker(name))


def told(counts: Counter[str], arguments: Sequence[str] = ()) -> list[str]:
    """A line for each tier that has tests which did not run, with the command of these arguments that runs them."""
    lines, command = [], shlex.join(["python", "-m", "pytest", *arguments])
    for name, tier in TIERS.items():
        if counts[name]:
            needs = f"; needs {tier.needs}" if tier.needs else ""
            lines.append(f"not run: {counts[name]} {name} tests ({tier.holds}{needs}): {command} -m {name}")
    return lines


def pytest_configure(config: pytest.Config) -> None:
    """Refuses a tier that was asked for by name and cannot run here."""
    config.stash[_counts] = Counter()
    tier = TIERS.get(config.option.markexpr)
    if tier and (missing := tier.missing()):
        raise pytest.UsageError(f"-m {config.option.markexpr}: no {', no '.join(missing)} here. Needs {tier.needs}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what a wider selection, such as `-m ""`, takes in and this machine cannot run."""
    for name in tiers_of(item):
        if missing := TIERS[name].missing():
            pytest.skip(f"no {', no '.join(missing)}; needs {TIERS[name].needs}")


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Generator[None, None, None]:
    """Leaves the tiers out after all other selection, `-k` for one, so that only what was asked for is counted."""
    if config.option.markexpr != DEFAULT:
        return (yield)
    config.option.markexpr = ""
    try:
        result = yield
    finally:
        config.option.markexpr = DEFAULT
    left_out = [item for item in items if any(tiers_of(item))]
    if left_out:
        items[:] = [item for item in items if not any(tiers_of(item))]
        config.stash[_counts].update(name for item in left_out for name in tiers_of(item))
        config.hook.pytest_deselected(items=left_out)
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist tells its counts to the process that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tiers"] = dict(session.config.stash[_counts])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error) -> None:  # type: ignore[no-untyped-def]
    """Takes a worker's counts, which are the same in each of them; one that crashed has none."""
    if "tiers" in getattr(node, "workeroutput", {}):
        node.config.stash[_counts] = Counter(node.workeroutput["tiers"])


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Tells which tiers did not run, and how to run them."""
    for line in told(config.stash[_counts], config.invocation_params.args):
        terminalreporter.write_line(line)
