"""What is built from the checkout, and what importing it loads."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"cupycorr": "cupycorr", "cli": "cupycorr/cli", "kernels": "cupycorr/kernels"}
NOT_COPIED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")


def run(*command, cwd=None):
    outcome = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, f"{command}: {outcome.stdout}\n{outcome.stderr}"
    return outcome.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return a copy of the checkout with CUDA sources, so that building leaves no trace in it."""
    copy = tmp_path_factory.mktemp("source") / "cupycorr"
    shutil.copytree(ROOT, copy, ignore=NOT_COPIED)
    for name in ("probe.cu", "probe.cuh"):
        (copy / "kernels" / name).write_text("// probe\n")
    return copy


@pytest.fixture(scope="module")
def built(source, tmp_path_factory):
    """Return the folder with wheel and sdist; the wheel is built from the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Return the scripts' folder of a fresh environment with the wheel and this one's libraries."""
    return environment(tmp_path_factory.mktemp("wheel"), next(built.glob("*.whl")))


def environment(folder, *what):
    """Install into a fresh environment, without network; other libraries are this one's."""
    venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    paths = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
    scripts = Path(paths["scripts"])
    # Before Python 3.12 an environment brings a setuptools that is too old to build this.
    run(scripts / "python", "-m", "pip", "uninstall", "-q", "-y", "setuptools", cwd=folder)
    # Listed in a .pth file, folders come after the environment's own, and their .pth files, of
    # which one may point to this checkout, are not read.
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    Path(paths["purelib"], "others.pth").write_text("\n".join(others) + "\n")
    run(scripts / "python", "-m", "pip", "install", "-q", "--ignore-installed",
        "--no-index", "--no-deps", "--no-build-isolation", *what, cwd=folder)  # fmt: skip
    return scripts


def sources(root):
    """Return the path in the wheel of every file that belongs there."""
    return {
        f"{inside}/{path.relative_to(root / outside).as_posix()}"
        for outside, inside in PACKAGES.items()
        for path in (root / outside).rglob("*")
        if path.suffix in (".py", ".cu", ".cuh") or path.name == "py.typed"
    }


def test_the_wheel_holds_every_source_and_nothing_else(source, built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == sources(source)


def test_the_sdist_holds_the_sources_the_tests_and_the_papers(source, built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    expected = {"README.md", "CHANGELOG.md", "LICENSE", "setup.cfg", "pyproject.toml"}
    for folder in (*PACKAGES, "tests"):
        expected |= {
            path.relative_to(source).as_posix()
            for path in (source / folder).rglob("*")
            if path.suffix in (".py", ".cu", ".cuh") or path.name == "py.typed"
        }
    assert expected <= names


def test_the_installed_wheel_imports_itself_and_its_command(installed, tmp_path):
    names = "cupycorr", "cupycorr.cli", "cupycorr.kernels"
    code = f"import {', '.join(names)}; print({'.__file__, '.join(names)}.__file__)"
    files = run(installed / "python", "-c", code, cwd=tmp_path).split()
    assert len(files) == len(names)
    assert all(file.startswith(str(installed.parent)) for file in files)


def test_the_installed_command_prints_the_version(installed, tmp_path):
    import cupycorr

    assert cupycorr.__version__ in run(installed / "cupycorr", "--version", cwd=tmp_path)


def test_the_installed_command_checks_gradients(installed, tmp_path):
    out = run(installed / "cupycorr", "gradcheck", "cpu", "--engine", "numpy", cwd=tmp_path)
    assert out.splitlines()[-1].endswith("passed, 0 failed")


def test_an_editable_install_finds_every_package(source, tmp_path):
    scripts = environment(tmp_path / "editable", "--editable", source)
    code = "import cupycorr, cupycorr.cli, cupycorr.kernels; print(cupycorr.cli.__file__)"
    # Python finds the clone first in the folder above it, and must not take it for the package.
    for folder in (tmp_path, source, source.parent):
        file = run(scripts / "python", "-c", code, cwd=folder).strip()
        assert Path(file) == source / "cli" / "__init__.py"
    kernels = "import importlib.resources as r; print(r.files('cupycorr.kernels') / 'probe.cu')"
    assert Path(run(scripts / "python", "-c", kernels, cwd=tmp_path).strip()).is_file()


def test_importing_loads_numpy_and_nothing_heavier():
    code = "import sys, cupycorr; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(run(sys.executable, "-c", code, cwd=ROOT).split())
    assert "numpy" in loaded
    assert not loaded & {"torch", "cupy", "click", "rich", "threadpoolctl", "ml_dtypes", "PIL"}


def test_help_does_not_load_torch():
    code = (
        "import sys\n"
        "from cupycorr.cli import main\n"
        "main(['bench', '--help'], standalone_mode=False)\n"
        "print('torch' in sys.modules)"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT).splitlines()[-1] == "False"
