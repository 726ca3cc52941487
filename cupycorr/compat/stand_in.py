"""Letting ``import`` find cupycorr where a program asks for another system's module."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from types import ModuleType

# The module that stands in for another, unless the caller names one.
_STAND_INS = {
    "spatial_correlation_sampler": "cupycorr.compat.spatial_correlation_sampler",
    "spatial_correlation_sampler_backend": "cupycorr.compat.spatial_correlation_sampler_backend",
    "correlation_cuda": "cupycorr.compat.correlation_cuda",
    "correlation_package.correlation": "cupycorr.compat.nvidia",
    "alt_cuda_corr": "cupycorr.compat.alt_cuda_corr",
    "corr_sampler": "cupycorr.compat.corr_sampler",
    "altcorr": "cupycorr.compat.altcorr",
    "local_corr": "cupycorr.compat.local_corr",
    "localcorr": "cupycorr.compat.localcorr",
}


class StandIn:
    """The modules that `stand_in_for` replaced; `withdraw`, or the end of ``with``, undoes it."""

    def __init__(self, modules: dict[str, ModuleType]) -> None:
        self._modules = modules

    def withdraw(self) -> None:
        """Let ``import`` find what it found before; what was imported meanwhile stays in use."""
        for name, module in self._modules.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        self.withdraw()


def stand_in_for(name: str, module: ModuleType | None = None) -> StandIn:
    """Let ``import name`` find cupycorr, in this process and from now on.

    For programs that cannot be edited; in others, change the import. Call it before the program
    imports the module. Whether that is installed does not matter: it is not used.

    Parameters
    ----------
    name : str
        The module that the program imports, with its packages, for instance
        "networks.correlation_package.correlation". The packages stay the program's own.
    module : module, optional
        What the program is to find, for instance `cupycorr.compat.nvidia`. There are defaults for
        "spatial_correlation_sampler", and "spatial_correlation_sampler_backend", the extension that
        copies of its Python file call; for "correlation_package.correlation", NVIDIA's module; for
        "correlation_cuda", the extension that copies of NVIDIA's module call; and for
        "alt_cuda_corr" and "corr_sampler", the extensions of RAFT and RAFT-Stereo, and "altcorr",
        "local_corr" and "localcorr".

    Returns
    -------
    StandIn
        Its ``withdraw()`` undoes this; as a context manager it does so by itself.

    Raises
    ------
    ValueError
        If the module is not given and has no default.
    RuntimeError
        If something else has been imported by that name: part of the program would go on using it.
    """
    if module is None:
        if name not in _STAND_INS:
            raise ValueError(
                f"name must be one of {', '.join(_STAND_INS)} where no module is given, got {name}"
            )
        module = import_module(_STAND_INS[name])
    present = sys.modules.get(name)
    if present is not None:
        if getattr(present.__spec__, "loader_state", None) is module:
            return StandIn({})
        raise RuntimeError(
            f"{name} must not have been imported when cupycorr is to stand in for it, got {present}"
        )
    spec = ModuleSpec(name, None, origin="cupycorr.compat", loader_state=module, is_package=True)
    facade = module_from_spec(spec)
    vars(facade).update({n: value for n, value in vars(module).items() if not n.startswith("_")})
    modules = {name: facade}
    if "." not in name:
        # A program may also import the file of the same name in the folder of that name.
        setattr(facade, name, facade)
        modules[f"{name}.{name}"] = facade
    sys.modules.update(modules)
    return StandIn(modules)
