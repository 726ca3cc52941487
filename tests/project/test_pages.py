"""README.md and docs/: every example runs and prints what its page says; pages and CI agree."""

import codeop
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import operator_figures
import pytest
import speed_tables
from command import invoke

import cupycorr
from cupycorr import Geometry

ROOT = Path(__file__).resolve().parents[2]
CI = ROOT / ".ci" / "run"
SET_UP = ("python -m pip install -e . && ", "python -m pip install -e '.[test]' && ")
ADDRESSES = (
    "https://raw.githubusercontent.com/cupycorr/cupycorr/main/",
    "https://github.com/cupycorr/cupycorr/blob/main/",
)
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))
}
PICTURES = {"cost_volume.png": "cost_volume_figure.py", "match.png": "match_figure.py"}


class Block(NamedTuple):
    """A fenced block: its page and section, its first line's number, its language and text."""

    page: str
    section: str
    line: int
    language: str
    text: str


def blocks(page, text):
    found, section, opened = [], "", None
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        if line.lstrip().startswith("```"):
            if opened is None:
                opened = number, line.strip("` ")
            else:
                inside = "\n".join(lines[opened[0] : number - 1])
                found.append(Block(page, section, opened[0] + 1, opened[1], inside))
                opened = None
        elif opened is None and line.startswith("## "):
            section = line.removeprefix("## ")
    assert opened is None, f"the block of {page}, line {opened[0]} is not closed"
    return found


BLOCKS = [block for page, text in PAGES.items() for block in blocks(page, text)]
LINES = [line for block in BLOCKS if block.language == "bash" for line in block.text.splitlines()]
SET_UP_LINES = [line for line in LINES if line.startswith(SET_UP)]
COMMANDS = [line for line in LINES if line.startswith("cupycorr ")]
TEST_RUNS = [line for line in LINES if line.startswith("python -m pytest ")]
GPU_RUNS = [line for line in LINES if line.startswith(".ci/gpu ")]


def examples():
    """Return what runs as one: a Python block of README, or all those of another page."""
    found = {}
    for block in BLOCKS:
        if block.language == "python":
            part = f"{block.section}, {block.line}" if block.page == "README.md" else ""
            found.setdefault((block.page, part), []).append(block)
    return found


def on_its_device(value, is_gpu):
    return pytest.param(value, marks=pytest.mark.gpu) if is_gpu else value


def needs_gpu(command):
    return re.match(r"cupycorr (warmup|\w+ cuda)\b", command) is not None


def test_every_block_is_of_a_kind_that_a_test_executes():
    # What is in braces, Sphinx executes.
    assert {block.language for block in BLOCKS} == {"python", "bash", "{eval-rst}"}
    assert sorted(LINES) == sorted(SET_UP_LINES + COMMANDS + TEST_RUNS + GPU_RUNS)
    assert all([examples(), COMMANDS, TEST_RUNS, GPU_RUNS])


def test_the_pages_have_the_version_and_its_date():
    version, date = re.search(
        r"^## \[(.+)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
    ).groups()
    assert version == cupycorr.__version__
    citation = (ROOT / "CITATION.cff").read_text().splitlines()
    assert {f"version: {version}", f"date-released: {date}"} <= {*citation}
    assert f"version {version.rpartition('.')[0]}," in PAGES["README.md"]


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 220


@pytest.mark.parametrize(
    "part", [on_its_device(part, "CuPy arrays" in part[1]) for part in examples()], ids=str
)
def test_python_examples_print_what_the_page_says(part, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    run = examples()[part]
    if any("import torch" in example.text for example in run):
        pytest.importorskip("torch")
    namespace = {"__name__": "page"}
    for example in run:
        expected = re.findall(r"# -> (.*)", example.text)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # What torch warns of while it compiles or exports is not about this package.
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")
            # Tracebacks show the lines of the page.
            source = "\n" * (example.line - 1) + example.text
            exec(compile(source, str(ROOT / example.page), "exec"), namespace)
        assert capsys.readouterr().out.splitlines() == expected


@pytest.mark.parametrize(
    "block", [b for b in BLOCKS if b.language == "python"], ids=lambda b: f"{b.page}:{b.line}"
)
def test_python_examples_can_be_pasted_into_a_console(block):
    # A console ends a statement of several lines at an empty line, and nowhere else.
    waiting = []
    for line in [*block.text.splitlines(), ""]:
        waiting.append(line)
        if codeop.compile_command("\n".join(waiting), symbol="single") is not None:
            waiting = []
    assert not waiting


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Change to a folder with the two images that commands of the pages read."""
    skimage = pytest.importorskip("skimage")
    for side in ("left", "right"):
        shutil.copy(Path(skimage.data_dir, f"motorcycle_{side}.png"), tmp_path / f"{side}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "command", [on_its_device(command, needs_gpu(command)) for command in dict.fromkeys(COMMANDS)]
)
def test_commands_of_the_pages_succeed(command, folder):
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


@pytest.mark.skipif(not CI.exists(), reason="an sdist has no .ci")
@pytest.mark.parametrize("command", GPU_RUNS)
def test_stages_on_a_gpu_exist(command, tmp_path):
    program, _, *stages = command.split()
    outcome = subprocess.run(
        [ROOT / program, tmp_path, *stages], env=os.environ | {"PYTHON": "false"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    assert "no GPU can be used" in outcome.stdout
    assert "no such stage" not in outcome.stdout


class TestSetUp:
    def test_one_command_runs_the_main_job_and_one_the_tests(self):
        main, tests = SET_UP_LINES
        assert main.startswith(f"{SET_UP[0]}cupycorr bench cpu ")
        assert tests == f"{SET_UP[1]}python -m pytest"

    @pytest.mark.skipif(not CI.exists(), reason="an sdist has no .ci")
    def test_they_are_what_ci_runs(self):
        outcome = subprocess.run(["bash", CI, "--commands"], capture_output=True, check=True)
        assert outcome.stdout.decode().splitlines() == SET_UP_LINES

    def test_the_main_job_succeeds(self):
        command, runs, _ = SET_UP_LINES[0].removeprefix(SET_UP[0]).rpartition(" --runs ")
        assert runs
        outcome = invoke(*shlex.split(command)[1:], "--engine", "numpy", "--runs", 1)
        assert outcome.exit_code == 0, outcome.output


def test_the_parameters_of_readme_are_those_of_the_geometry():
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|", PAGES["README.md"], re.MULTILINE)
    parameters = inspect.signature(Geometry).parameters.values()
    assert rows == [
        (p.name, "centred" if p.default is None else str(p.default)) for p in parameters
    ]


@pytest.mark.parametrize(
    ("page", "target"),
    [
        (page, target)
        for page, text in PAGES.items()
        for target in re.findall(r"\]\(([^)]+)\)", text)
    ],
)
def test_links_inside_the_checkout_lead_somewhere(page, target):
    if target.startswith("https://") and not target.startswith(ADDRESSES):
        return
    for address in ADDRESSES:
        target = target.replace(address, "" if page == "README.md" else "../")
    path, _, heading = target.partition("#")
    there = (ROOT / page).parent / path if path else ROOT / page
    assert there.exists()
    if heading:
        text = there.read_text(encoding="utf-8")
        titles = re.findall(r"^## (.*)", text, re.MULTILINE)
        assert heading in {title.lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "statement",
    re.findall(r"`(from cupycorr[\w.]* import \w+[^`.]*)`", PAGES["docs/migrating.md"]),
)
def test_imports_of_the_migration_table_find_something(statement):
    pytest.importorskip("torch")
    exec(statement)


@pytest.mark.parametrize("name", operator_figures.PICTURES)
def test_a_diagram_is_what_its_script_draws(name, tmp_path):
    operator_figures.main(tmp_path)
    drawn, shown = (Path(folder, f"{name}.svg").read_text() for folder in (tmp_path, ROOT / "docs"))
    assert drawn == shown
    assert any(f"({name}.svg)" in text for text in PAGES.values())


def test_the_tables_of_speed_are_what_their_documents_say(tmp_path):
    speed_tables.main(tmp_path / "speed.md")
    written = (tmp_path / "speed.md").read_text(encoding="utf-8")
    assert written == PAGES["docs/speed.md"]
    names = {name for _, name in speed_tables.TABLE.findall(written)}
    assert names == {f"measured/{path.name}" for path in ROOT.glob("docs/measured/*.json")}
    assert all(f"| {step} |" in written for step in ("forward", "backward", "12 lookups"))


@pytest.mark.slow
@pytest.mark.parametrize("picture", PICTURES)
def test_a_picture_is_what_its_script_draws(picture, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("skimage")
    script, shown = ROOT / "docs" / PICTURES[picture], ROOT / "docs" / picture
    subprocess.run([sys.executable, script, tmp_path / "drawn.png"], check=True)
    with image.open(tmp_path / "drawn.png") as drawn, image.open(shown) as drawn_before:
        assert drawn.size == drawn_before.size
    assert any(f"{picture})" in text for text in PAGES.values())
    assert shown.stat().st_size < 200_000
