"""README.md: every example runs and prints what the page says; the page and CI agree."""

import inspect
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
from command import invoke

from cupycorr import Geometry

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CI = ROOT / ".ci" / "run"
SET_UP = "python -m pip install -e '.[test]' && "


class Block(NamedTuple):
    """A fenced block: the section that it stands in, its first line's number, and its text."""

    section: str
    line: int
    language: str
    text: str


def blocks():
    found, section, opened = [], "", None
    lines = README.splitlines()
    for number, line in enumerate(lines, 1):
        if line.lstrip().startswith("```"):
            if opened is None:
                opened = number, line.strip("` ")
            else:
                text = "\n".join(lines[opened[0] : number - 1])
                found.append(Block(section, opened[0] + 1, opened[1], text))
                opened = None
        elif opened is None and line.startswith("## "):
            section = line.removeprefix("## ")
    assert opened is None, f"the block of line {opened[0]} is not closed"
    return found


BLOCKS = blocks()
LINES = [line for block in BLOCKS if block.language == "bash" for line in block.text.splitlines()]
SET_UP_LINES = [line for line in LINES if line.startswith(SET_UP)]
COMMANDS = [line for line in LINES if line.startswith("cupycorr ")]
TEST_RUNS = [line for line in LINES if line.startswith("python -m pytest ")]
SECTIONS = list(dict.fromkeys(b.section for b in BLOCKS if b.language == "python"))


def on_its_device(value):
    """Return a parameter that runs where its device is: a section, or a command."""
    gpu = value == "CuPy arrays" or re.match(r"cupycorr (warmup|\w+ cuda)\b", value)
    return pytest.param(value, marks=pytest.mark.gpu) if gpu else value


def test_every_block_is_of_a_kind_that_a_test_executes():
    assert {block.language for block in BLOCKS} == {"python", "bash"}
    assert sorted(LINES) == sorted(SET_UP_LINES + COMMANDS + TEST_RUNS)
    assert all([SECTIONS, COMMANDS, TEST_RUNS])


@pytest.mark.parametrize("section", [on_its_device(section) for section in SECTIONS])
def test_python_examples_print_what_the_page_says(section, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    examples = [b for b in BLOCKS if b.section == section and b.language == "python"]
    if any("import torch" in example.text for example in examples):
        pytest.importorskip("torch")
    namespace = {"__name__": "readme"}
    for example in examples:
        expected = re.findall(r"# -> (.*)", example.text)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # What torch warns of while it compiles or exports is not about this package.
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")
            # Tracebacks show the lines of the page.
            source = "\n" * (example.line - 1) + example.text
            exec(compile(source, str(ROOT / "README.md"), "exec"), namespace)
        assert capsys.readouterr().out.splitlines() == expected


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Change to a folder with the two images that commands of the page read."""
    skimage = pytest.importorskip("skimage")
    for side in ("left", "right"):
        shutil.copy(Path(skimage.data_dir, f"motorcycle_{side}.png"), tmp_path / f"{side}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", [on_its_device(command) for command in COMMANDS])
def test_commands_of_the_page_succeed(command, folder):
    if " cpu " in command:
        pytest.importorskip("torch")
    outcome = invoke(*shlex.split(command)[1:])
    assert outcome.exit_code == 0, outcome.output
    assert outcome.stdout


@pytest.mark.parametrize("command", TEST_RUNS)
def test_parts_of_the_tests_exist(command):
    words = [sys.executable, *shlex.split(command)[1:], "--collect-only", "-p", "no:cacheprovider"]
    outcome = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


class TestSetUp:
    def test_one_command_runs_the_main_job_and_one_the_tests(self):
        jobs = [line.removeprefix(SET_UP) for line in SET_UP_LINES]
        assert jobs[0].startswith("cupycorr bench cpu ")
        assert jobs[1:] == ["python -m pytest"]

    @pytest.mark.skipif(not CI.exists(), reason="an sdist has no .ci")
    def test_they_are_what_ci_runs(self):
        outcome = subprocess.run(["bash", CI, "--commands"], capture_output=True, check=True)
        assert outcome.stdout.decode().splitlines() == SET_UP_LINES

    def test_the_main_job_succeeds(self):
        command, runs, _ = SET_UP_LINES[0].removeprefix(SET_UP).rpartition(" --runs ")
        assert runs
        outcome = invoke(*shlex.split(command)[1:], "--engine", "numpy", "--runs", 1)
        assert outcome.exit_code == 0, outcome.output


def test_the_parameters_of_the_page_are_those_of_the_geometry():
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", README, re.MULTILINE)
    parameters = inspect.signature(Geometry).parameters.values()
    assert rows == [
        (p.name, "centred" if p.default is None else str(p.default)) for p in parameters
    ]


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)]+)\)", README))
def test_links_inside_the_checkout_lead_somewhere(target):
    if target.startswith("#"):
        assert target[1:] in {heading.lower() for heading in re.findall(r"^## (.*)", README, re.M)}
    elif not target.startswith("https://"):
        assert (ROOT / target).is_file()


def test_the_picture_is_what_its_script_draws(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("skimage")
    script, shown = ROOT / "docs" / "readme_figure.py", ROOT / "docs" / "cost_volume.png"
    subprocess.run([sys.executable, script, tmp_path / "drawn.png"], check=True)
    with image.open(tmp_path / "drawn.png") as drawn, image.open(shown) as picture:
        assert drawn.size == picture.size
    assert f"](docs/{shown.name})" in README
    assert shown.stat().st_size < 200_000
