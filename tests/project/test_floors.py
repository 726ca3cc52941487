"""Who imports whom: a module imports from its own floor or a lower one, and few third parties."""

import ast
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]


class Room(NamedTuple):
    """The floor of a module, and the third parties it may import at the top and in functions."""

    floor: float
    top: frozenset = frozenset()
    lazy: frozenset = frozenset()


NUMPY, TORCH = frozenset({"numpy"}), frozenset({"torch"})
# From the ground up. A module that is not listed belongs to its package's room, and one of
# cupycorr itself belongs on a floor first.
ROOMS = {
    "cupycorr.geometry": Room(0, NUMPY),
    "cupycorr.kernels": Room(0),
    "cupycorr.lookup": Room(1.1),
    "cupycorr.lattice": Room(0.5, NUMPY),
    "cupycorr.layer": Room(1),
    "cupycorr.cpu": Room(2, NUMPY),
    "cupycorr.cpu.threads": Room(2, NUMPY, frozenset({"threadpoolctl"})),
    # What compiles and plans without a device must not need CuPy.
    "cupycorr.cuda": Room(2),
    "cupycorr.cuda.cost": Room(2.1),
    "cupycorr.cuda.launch": Room(2.15),
    "cupycorr.cuda.plain": Room(2.17),
    "cupycorr.cuda.tiles": Room(2.2),
    "cupycorr.cuda.turning": Room(2.2),
    "cupycorr.cuda.tensor": Room(2.25),
    "cupycorr.cuda.tensor_adjoint": Room(2.27),
    "cupycorr.cuda.plan": Room(2.3),
    "cupycorr.cuda.lookup_tiles": Room(2.32),
    "cupycorr.cuda.lookup_plan": Room(2.35),
    "cupycorr.cuda.lookup_grads_plan": Room(2.37),
    "cupycorr.cuda.volume_lookup_plan": Room(2.38),
    "cupycorr.cuda.sources": Room(2.4),
    "cupycorr.cuda.engine": Room(2.5, NUMPY | {"cupy"}),
    "cupycorr.cuda.lookup": Room(2.6, NUMPY | {"cupy"}),
    "cupycorr.cuda.lookup_grads": Room(2.6, NUMPY | {"cupy"}),
    "cupycorr.cuda.volume_lookup": Room(2.6, NUMPY | {"cupy"}),
    "cupycorr.torch": Room(3, NUMPY | TORCH),
    "cupycorr.torch.memory": Room(3, NUMPY | TORCH, frozenset({"cupy"})),
    "cupycorr.api": Room(4, NUMPY, TORCH | {"cupy"}),
    "cupycorr.grouped": Room(4, NUMPY, TORCH),
    "cupycorr.sampling": Room(4.1, NUMPY, frozenset({"cupy"})),
    "cupycorr.volumes": Room(4.2, NUMPY),
    "cupycorr.onnx": Room(4, NUMPY | TORCH | {"onnxscript"}),
    # The torch module enters by the public door, where its tensors are checked.
    "cupycorr.modules": Room(5, TORCH),
    "cupycorr.verify": Room(5, NUMPY, TORCH | {"cupy", "ml_dtypes"}),
    "cupycorr.verify_lookup": Room(5.1, NUMPY, TORCH | {"cupy"}),
    # What has no torch module must not need torch.
    "cupycorr.compat": Room(6),
    **{
        f"cupycorr.compat.{module}": Room(6, TORCH)
        for module in (
            "alt_cuda_corr",
            "altcorr",
            "blocks",
            "caffe",
            "corr_sampler",
            "correlation_cuda",
            "droid",
            "gwc",
            "local_corr",
            "localcorr",
            "mmcv",
            "nvidia",
            "ptlflow",
            "raft",
            "raft_stereo",
            "sniklaus",
            "spatial_correlation_sampler",
            "spatial_correlation_sampler_backend",
            "torchvision",
        )
    },
    "cupycorr": Room(7),
    "cupycorr.__main__": Room(9),
    "cupycorr.cli": Room(
        8,
        NUMPY | {"click", "rich"},
        TORCH
        | {"PIL", "cupy", "matplotlib", "ml_dtypes", "threadpoolctl"}
        # What bench measures against.
        | {"corr", "corr_taichi", "local_corr", "localcorr", "spatial_correlation_sampler"}
        | {"taichi", "torchvision"},
    ),
}


# The constructors of Geometry for other systems' parameters are beside those systems.
UPWARD = {
    ("cupycorr.geometry", f"cupycorr.compat.{name}") for name in ("flownet", "systems", "taichi")
}


class Import(NamedTuple):
    """One import statement's module, and whether it runs when the importing module is imported."""

    module: str
    at_top: bool
    line: int


def imports(source, package, known=frozenset()):
    """Return the imports of a module's source that take place at run time.

    ``known`` are the modules that exist, so that of ``from package import name`` the name counts
    if it is a module. Imports under TYPE_CHECKING only serve type checkers and do not count.
    """
    found = []

    def visit(node, at_top):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child, at_top)
            return
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, at_top, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level]
            base = ".".join([*parents, node.module or ""]).strip(".") if node.level else node.module
            for alias in node.names:
                deeper = f"{base}.{alias.name}"
                found.append(Import(deeper if deeper in known else base, at_top, node.lineno))
        lazily = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            visit(child, at_top and not lazily)

    visit(ast.parse(source), True)
    return found


def modules():
    """Return the path of every module that ships, by name."""
    found = {}
    for folder, package in (("cupycorr", "cupycorr"), ("cli", "cupycorr.cli"),
                            ("kernels", "cupycorr.kernels")):  # fmt: skip
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    return found


MODULES = modules()


def room_of(module):
    """Return a module's room: its own, or that of the package it lies in."""
    while module not in ROOMS:
        if "." not in module or module.rpartition(".")[0] == "cupycorr":
            raise LookupError(f"{module} has no floor")
        module = module.rpartition(".")[0]
    return ROOMS[module]


def offences(module, source, package):
    """Describe the imports that a module must not make."""
    room = room_of(module)
    wrong = []
    for found in imports(source, package, set(MODULES)):
        root = found.module.partition(".")[0]
        if root == "cupycorr":
            other = room_of(found.module)
            if other.floor > room.floor and (found.at_top or (module, found.module) not in UPWARD):
                wrong.append(f"{module}:{found.line} imports {found.module} from a higher floor")
        elif root not in sys.stdlib_module_names | {"__future__"}:
            allowed = room.top if found.at_top else room.top | room.lazy
            if root not in allowed:
                when = "at the top" if found.at_top else "in a function"
                wrong.append(f"{module}:{found.line} imports {root} {when}")
    return wrong


def package_of(module, path):
    return module if path.name == "__init__.py" else module.rpartition(".")[0]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_its_floor_may(module):
    path = MODULES[module]
    assert not offences(module, path.read_text(encoding="utf-8"), package_of(module, path))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cupycorr.geometry", "import torch"),
        ("cupycorr.geometry", "def f():\n    import torch"),
        ("cupycorr.geometry", "from cupycorr import api"),
        ("cupycorr.geometry", "from cupycorr.compat import flownet"),
        ("cupycorr.geometry", "def f():\n    from cupycorr.compat import nvidia"),
        ("cupycorr.cpu.engine", "from cupycorr.api import correlation"),
        ("cupycorr.cpu.engine", "import threadpoolctl"),
        ("cupycorr.cpu.engine", "from cupycorr.torch import operators"),
        ("cupycorr.torch.operators", "import cupycorr"),
        ("cupycorr.torch.operators", "from cupycorr.api import correlation"),
        ("cupycorr.api", "import torch"),
        ("cupycorr.api", "try:\n    import torch\nexcept ImportError:\n    torch = None"),
        ("cupycorr.api", "def f():\n    import click"),
        ("cupycorr.verify", "from rich import table"),
        ("cupycorr.verify", "class A:\n    import torch"),
        ("cupycorr.compat.nvidia", "from cupycorr.cli import main"),
        ("cupycorr.cli.bench", "import torch"),
        ("cupycorr.cli.bench", "import scipy"),
    ],
)
def test_an_import_from_above_is_caught(module, source):
    assert offences(module, source, module.rpartition(".")[0])


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("cupycorr.geometry", "def f():\n    from cupycorr.compat import flownet"),
        ("cupycorr.api", "def f():\n    import torch"),
        ("cupycorr.api", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("cupycorr.api", "from cupycorr.cpu import engine"),
        ("cupycorr.cli.bench", "from .options import Sizes\nfrom . import report"),
        ("cupycorr.cli.bench", "from cupycorr import verify\nimport cupycorr"),
    ],
)
def test_a_permitted_import_passes(module, source):
    assert not offences(module, source, module.rpartition(".")[0])


def test_a_module_without_a_floor_is_caught():
    with pytest.raises(LookupError, match="attic has no floor"):
        offences("cupycorr.attic", "", "cupycorr")
