"""The closing lines of a run say what it left out, and the command that runs it does."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiers

HERE = Path(__file__).parent
INI = f"""[pytest]
addopts = -q -p tiers -m {tiers.DEFAULT!r}
markers =
    slow: x
    browser: x
    parity: x
    tunix: x
"""
TESTS = """import pytest
def test_one(): pass
@pytest.mark.slow
def test_two(): pass
@pytest.mark.slow
@pytest.mark.parametrize("x", [1, 2])
def test_three(x): pass
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A project of two files with one plain and three slow tests each."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "pytest.ini").write_text(INI)
    for name in ("test_a.py", "test_b.py"):
        (folder / name).write_text(TESTS)
    return folder


def run(project: Path, *arguments: str) -> list[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    path = os.pathsep.join([str(HERE), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", *arguments]
    done = subprocess.run(command, cwd=project, env=env | {"PYTHONPATH": path}, capture_output=True, text=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "ran", "left_out"),
    [
        (["-n2"], 2, 6),
        (["-n0", "test_a.py"], 1, 3),
        (["-n0", "-k", "one or three"], 2, 4),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (["-n0"], 2, 6),
                (["-n2", "test_b.py", "-k", "two or one"], 1, 1),
                (["-n0", "-k", "one"], 2, 0),
                (["-n0", "-m", ""], 8, 0),
            ]
        ),
    ],
)
def test_the_closing_lines_count_what_was_asked_for_and_left_out(project, arguments, ran, left_out):
    lines = run(project, *arguments)
    assert any(line.startswith(f"{ran} passed") for line in lines), lines
    said = [line for line in lines if line.startswith("not run: ")]
    assert [line.split(" tests")[0] for line in said] == ([f"not run: {left_out} slow"] if left_out else [])
    if "-n0" in arguments and left_out:  # and the command that is named runs just these
        again = shlex.split(said[0].rsplit(": ", 1)[1])
        assert again[:3] == ["python", "-m", "pytest"]
        assert any(line.startswith(f"{left_out} passed") for line in run(project, *again[3:]))


def test_the_default_selection_is_that_of_pyproject():
    assert f"-m '{tiers.DEFAULT}'" in (HERE.parent / "pyproject.toml").read_text()


def test_a_tier_that_cannot_run_is_refused_by_name_and_skipped_by_a_wider_selection(project, monkeypatch):
    folder = project / "parity"
    folder.mkdir()
    (folder / "test_c.py").write_text("import pytest\n@pytest.mark.parity\ndef test_one(): pass\n")
    monkeypatch.setitem(tiers.TIERS, "parity", tiers.Tier("x", ("no_such_package",), "parity"))
    assert tiers.TIERS["parity"].missing() == ["no_such_package"]
    (project / "without.py").write_text(
        "import tiers\ntiers.TIERS['parity'] = tiers.Tier('x', ('no_such_package',), 'parity')\n"
    )
    assert any(line.startswith("1 skipped") for line in run(project, "-p", "without", "-m", "", "parity"))
    assert not any("passed" in line for line in run(project, "-p", "without", "-m", "parity", "parity"))


def test_only_the_named_cases_are_quick():
    first, second = tiers.breadth(["a", "b"], "b")
    assert (second.values, [*second.marks]) == (("b",), [])
    assert [mark.name for mark in first.marks] == ["slow"]
    with pytest.raises(ValueError, match=r"\['c'\] are none of the cases \['a', 'b'\]"):
        tiers.breadth(["a", "b"], "c")


def test_ci_takes_the_first_python_that_runs(tmp_path):
    """A shim that does not run counts as absent, and pyenv's own folders are looked at too."""
    bash, ci = shutil.which("bash"), HERE.parent / ".ci" / "run"
    own = tmp_path / "versions" / "3.12.1" / "bin" / "python3"

    def second(version: str) -> str:
        env = {"PATH": str(tmp_path), "PYENV_ROOT": str(tmp_path), "HOME": str(tmp_path)}
        command = [bash, "-c", f"source {shlex.quote(str(ci))}; second_python {version}"]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()

    def program(path: Path, status: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!{bash}\nexit {status}\n")
        path.chmod(0o755)

    assert second("3.11") == second("3.13") == ""
    program(tmp_path / "python3.13", 127)
    program(own, 0)
    assert second("3.11") == f"3.12 {own}"
    program(tmp_path / "python3.13", 0)
    assert second("3.11") == f"3.13 {tmp_path / 'python3.13'}"
    assert second("3.12") == ""
    program(tmp_path / "python3.11", 0)
    assert second("3.12") == second("3.13") == f"3.11 {tmp_path / 'python3.11'}"
