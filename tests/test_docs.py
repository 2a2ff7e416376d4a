"""Every code block of the README and of the pages in docs/ runs; each page alone, from top to bottom."""

import contextlib
import importlib
import pkgutil
import re
import subprocess
import threading
import urllib.request
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
import transformers
from conftest import weights
from tiers import breadth

import jdelta
from jdelta.core.config import METHODS
from jdelta.display import interactive
from jdelta.hosts import call_edits
from jdelta.methods import bitfit
from jdelta.names import common_names

ROOT = Path(__file__).resolve().parents[1]
PATHS = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
PAGES = {name: path.read_text() for name, path in PATHS.items()}
README = PAGES["README.md"]
CHECKED = {"README.md", "modules.md"}  # by tests of their own
COMPILE_MOST = {"many-deltas.md", "nnx.md"}


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.S)


def choose_a_query(server, method, noun):
    """Stands for the user in front of the selection page."""
    url, _, token = server.url.partition("?token=")
    headers = {"Content-Type": "application/json", "Origin": url.rstrip("/"), "X-Jdelta-Token": token}
    body = b'{"modules": ["bert.encoder.layer.0.attention.self.query"]}'
    request = urllib.request.Request(f"{url}submit", body, headers)
    threading.Thread(target=urllib.request.urlopen, args=[request]).start()


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a page in an empty folder; returns the names that it defined, and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(interactive, "_announce", choose_a_query)
    # transformers draws random weights by one operation after the other, and compiles each; NumPy compiles nothing.
    cls = transformers.FlaxBertForSequenceClassification
    drawn = cls.init_weights
    monkeypatch.setattr(
        cls, "init_weights", lambda self, rng, shape: weights(jax.eval_shape(lambda: drawn(self, rng, shape)))
    )

    def run(page):
        names = {}
        with mock.patch.dict(common_names.TABLE), mock.patch.dict(METHODS):  # some register
            for number, block in enumerate(blocks(PAGES[page], "python")):
                exec(compile(block, f"{page}, block {number + 1}", "exec"), names)
        printed = capsys.readouterr().out
        for said in re.findall(r"^print\(.*\)  # (.+)$", PAGES[page], flags=re.M):
            assert said in printed
        return names, printed

    return run


def test_the_first_example_trains_what_it_says_and_nothing_else(run):
    names, printed = run("README.md")
    assert "trainable" in printed
    delta, before, after = names["delta"], names["model"].params, names["params"]
    moved = jax.tree.map(lambda a, b: np.asarray(a).tobytes() != np.asarray(b).tobytes(), before, after)
    assert not any(jax.tree.leaves(delta.partition(moved)[1]))
    assert moved["classifier"] == {"bias": True, "kernel": True}
    assert moved["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]["lora"] == {"a": True, "b": True}


def test_the_page_on_modules_attaches_where_it_says(run):
    names, printed = run("modules.md")
    assert names["names"] == names["delta"].targets == ["bert.encoder.layer.0.attention.self.query"]
    assert printed.count("modified_modules: ['bert.encoder.layer.0.attention.self.query']") == 2


RUN = sorted({page for page in PAGES if blocks(PAGES[page], "python")} - CHECKED)


@pytest.mark.parametrize("page", breadth(RUN, *(page for page in RUN if page not in COMPILE_MOST)))
def test_a_page_runs_alone_from_top_to_bottom_and_prints_what_it_says(page, run):
    run(page)


def test_the_readme_is_short_and_links_every_page():
    assert len(README.splitlines()) <= 150
    for page in PAGES.keys() - {"README.md"}:
        assert f"](docs/{page})" in README


def test_links_between_pages_and_to_programs_lead_somewhere():
    for page, text in PAGES.items():
        folder = PATHS[page].parent
        for link in re.findall(r"""\]\(([^)]+)\)|src="([^"]+)""", text):
            target, _, heading = "".join(link).partition("#")
            assert target.startswith("http") or (folder / target).exists(), f"{page}: {target}"
            if heading and not target.startswith("http"):
                words = re.findall(r"^#+ (.*)$", (folder / target).read_text(), flags=re.M)
                assert heading in {re.sub(r"[^\w\- ]", "", line).lower().replace(" ", "-") for line in words}, page
        for program in re.findall(r"(?:examples|benchmarks|docs)/\w+\.py", text):
            assert (ROOT / program).exists(), f"{page}: {program}"


INSTANCES = {
    "Host": call_edits.Host(None, None, []),  # has attributes of its own
    "layer": bitfit.Bias,  # has all that a layer may have
}


def exists(name):
    """Whether a file, or a name such as `jdelta.core.edits`, `DeltaModel.merge()` or `Host.path`, is there."""
    if "/" in name:
        return (ROOT / name).exists()
    name = re.match(r"[\w.]+", name)[0]
    owner, _, attribute = name.partition(".")
    if owner == "jdelta":
        with contextlib.suppress(ImportError, AttributeError):
            return pkgutil.resolve_name(name) is not None
        return False
    owner = INSTANCES.get(owner) or getattr(jdelta, owner)
    return not attribute or attribute in dir(owner)


ROWS = [row for row in re.findall(r"^\| (.*) \| (.*) \|$", PAGES["names.md"], flags=re.M) if row != ("old", "new")]


def test_names_are_where_the_table_says_and_old_ones_are_gone():
    page = PAGES["names.md"]
    assert len(ROWS) == page.count("\n|") - 2 * page.count("|---|")  # less the heads of the tables
    for old, new in ROWS:
        assert "`" in new, new
        for name in re.findall("`(.+?)`", new):
            assert exists(name), name
        for name in re.findall("`(.+?)`", old):
            assert not exists(name), name


@pytest.mark.browser
def test_the_pictures_are_those_that_the_program_draws(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    screenshots = importlib.import_module("screenshots")
    screenshots.draw_tree(tmp_path)
    assert (tmp_path / "tree.svg").read_text() == (ROOT / "docs" / "tree.svg").read_text()
    screenshots.draw_page(tmp_path)
    for name in screenshots.PICTURES:  # fonts differ between machines
        assert (tmp_path / name).read_bytes()[16:24] == (ROOT / "docs" / name).read_bytes()[16:24], "width, height"


def test_the_bash_blocks_are_the_two_commands():
    commands = blocks(README, "bash")
    assert len(commands) == 2
    assert not any(blocks(PAGES[page], "bash") for page in PAGES.keys() - {"README.md"})
    for command in commands:
        assert len(command.strip().splitlines()) == 1
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_ci_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text()
    assert "<!-- test -->" in script
    assert "<!-- test -->" in README
