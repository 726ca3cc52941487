"""Every kernel compiles for every GPU, keeps its values in registers, and can be launched.

The NVRTC of CUDA 12 and that of 13 compile them, as far as they are installed, and nvcc compiles
the files. None needs a GPU. Nothing here says that a kernel computes what it must: the other tests
do.
"""

import multiprocessing
import re
import shutil
import subprocess
from concurrent.futures import ProcessPoolExecutor
from importlib import resources
from typing import NamedTuple

import nvrtc
import pytest
from devices import DEVICES, LAYERS

from cupycorr import Geometry
from cupycorr.cuda import plan as cuda_plan
from cupycorr.cuda import sources as cuda_sources
from cupycorr.cuda import tensor, tensor_adjoint, turning
from cupycorr.cuda.launch import pair, targets
from cupycorr.layer import Layer

REASON = nvrtc.missing(*nvrtc.COMPILERS)
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")

REGISTERS = 65536  # of a multiprocessor, on every GPU; a warp gets them by eight per thread
MOST = 255  # registers of a thread
# What a thread may use: in all, or beside its tile, which it must hold while it multiplies.
IN_ALL = {"plain.cu": 96, "taps.cu": 32, "transpose.cu": 40}
BESIDE_RUNS = 24  # addresses of contiguous maps, and which of their loads exist
BESIDE_TILE = {
    "product.cu": 72, "product_adjoint.cu": 104, "tensor.cu": 48, "tensor_adjoint.cu": 68
}  # fmt: skip

DTYPES = ("float32", "float16", "float64", "bfloat16")
SOME = ("FlowNetC", "PWC-Net 6", "default", "stride 3")  # together they reach every kernel
disassembles = pytest.mark.skipif(
    nvrtc.missing(nvrtc.DISASSEMBLER) is not None, reason=str(nvrtc.missing(nvrtc.DISASSEMBLER))
)
# The newest compiler's turn comes with the slow tests.
every_compiler = pytest.mark.parametrize(
    "compiler",
    [
        pytest.param(wheel, marks=[pytest.mark.slow] if number else [])
        for number, wheel in enumerate(nvrtc.compilers())
    ],
)
# Every dtype and layer on one GPU; on the others what differs from GPU to GPU.
CASES = [
    *(("A100", "float32", layer) for layer in LAYERS),
    *(("A100", dtype, layer) for dtype in DTYPES[1:] for layer in (*SOME, "DispNetC")),
    *((name, "float32", layer) for name in DEVICES for layer in SOME[::2] if name != "A100"),
    *((name, "float16", "PWC-Net 6") for name in DEVICES if name != "A100"),
    *((name, "float32", "FlowNetC", "l1") for name in ("2070S", "A100", "H100")),
    ("2070S", "float16", "default", "l1"),
    *(("A100", dtype, "FlowNetC", "l1") for dtype in DTYPES[1:]),
    ("A100", "float32", "stride 3", "l1"),
    ("A100", "float32", "DispNetC", "l1"),
]


class Case(NamedTuple):
    """A launch, and the compute capability of the GPU that it was planned for."""

    launch: cuda_plan.Launch
    capability: int


def launches(device, dtype, name, similarity="product"):
    """Return the launches of a layer, forward and backward, tiled and plain, and the tangent."""
    shape, geometry = LAYERS[name]
    layer = Layer(geometry, similarity)
    plans = [
        cuda_plan.plan(results, layer, shape, dtype, DEVICES[device], plain=plain)
        for results in (("cost",), ("grad_fmap1", "grad_fmap2"))
        for plain in ((False, True) if name == "stride 3" else (False,))
    ]
    if similarity == "l1" and name == "stride 3":
        plans.append(cuda_plan.plan(("cost",), layer, shape, dtype, DEVICES[device], tangent=True))
    return [launch for plan in plans for launch in plan.launches]


def compiled(case, compiler=None):
    return nvrtc.compile_kernel(
        cuda_sources.source(case.launch), case.launch.kernel, case.capability, compiler
    )


@pytest.fixture(scope="module")
def kernels(request):
    """Compile in two processes, ahead of the tests, all that the selected ones ask for."""
    wanted = [
        (item.callspec.params["case"], item.callspec.params["compiler"])
        for item in request.session.items
        if item.function is test_kernels_keep_to_their_registers
    ]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        futures = {
            (case, compiler): [
                (launch, pool.submit(compiled, Case(launch, DEVICES[case[0]].capability), compiler))
                for launch in launches(*case)
            ]
            for case, compiler in wanted
            if DEVICES[case[0]].capability in nvrtc.capabilities(compiler)
        }
        yield futures
        pool.shutdown(cancel_futures=True)


def budget(launch):
    """Return how many registers a thread of a launch may use."""
    tile = dict(launch.constants)
    if launch.source in IN_ALL:
        return IN_ALL[launch.source]
    if launch.source == "tensor.cu":
        span = tile["advance_x"] * 16 // tile["tile_rows"]  # columns from tile to tile
        tiles = -(-(span - tile["advance_x"] + tile["displacements"]) // 8)  # of columns
        operands = 4 * tile["x_tiles"] + 4 * ((tile["x_tiles"] - 1) * span // 8 + tiles)
        sums = 4 * tile["warp_rows"] * tile["x_tiles"] * tiles
        return min(MOST, sums + operands + on_the_way(launch) + BESIDE_TILE["tensor.cu"])
    if launch.source == "tensor_adjoint.cu":
        values = 4 * tile["row_tiles"] * tile["channel_tiles"] + 2 * tile["channel_tiles"]
        values += 4 * parts(tile)
        return min(MOST, values + on_the_way(launch) + BESIDE_TILE[launch.source])
    if not tile["asynchronous"]:
        return MOST  # it also holds what is on its way from global to shared memory
    positions = tile["positions"]
    displacements = min(tile["displacements"], tile["patch_x"])
    columns = tile.get("lead", 0) + tile["advance_x"] * (positions - 1) + displacements
    others = positions if launch.source == "product.cu" else positions * tile["channels"]
    if tile["l1"]:
        if launch.source == "product.cu":  # all that its launch bounds leave
            return min(MOST, REGISTERS // (tile["resident"] * launch.threads))
        others *= 2  # the targets beside their sums
    values = positions * displacements + others + columns
    words = 2 if tile["accumulator"] == "double" else 1
    return min(MOST, values * words + BESIDE_TILE[launch.source])


def parts(tile):
    """Return in how many parts a gradient's upstream values are multiplied."""
    if tile["element"] == tile["upstream"]:
        return 1
    return {"Half": 2, "Bfloat16": 3}[tile["element"]]


def on_the_way(launch):
    """Return the registers of contiguous maps that are loaded while others are multiplied."""
    tile = dict(launch.constants)
    if tile["channels_last"]:
        return 0
    element_bytes = 4 if tile["element"] == "float" else 2
    columns = tile["x_groups"] * tile.get("x_tiles", 1) * 16 // tile["tile_rows"]
    met = tile["advance_x"] * (columns - 1) + tile.get("displacements", tile["patch_x"])
    channels, rows = tile.get("chunk"), [tile["row_tiles"] * tile["tile_rows"], 1]
    if launch.source == "tensor.cu":
        rows[1] = tile["advance_y"] * (rows[0] - tile["tile_rows"])
        meeting = tile["patch_y"] + tile["advance_y"] * (tile["tile_rows"] - 1)
        rows[1] += -(-meeting // -(-meeting // (tile["row_groups"] * tile["warp_rows"])))
        spacing = tile["spacing_x"]
        maps = [(rows[0], columns, spacing * tile["advance_x"], tile["lead1"]),
                (rows[1], met, spacing, tile["lead2"])]  # fmt: skip
    else:
        channels = 8 * tile["channel_tiles"] * tile["channel_groups"]
        maps = [(1, met, tile["spacing_x"], tile["source_lead"])]
    how = channels, tile["step_x"], tile["phases"], tile["vector"], element_bytes
    found = [turning.staged(*of, *how) for of in maps]
    runs = [-(-one.lanes // launch.threads) for one in found]
    at_once = -(-sum(runs) // tile.get("pieces", 1))
    return 2 * sum(runs) + at_once * max(one.registers for one in found) + BESIDE_RUNS


def complaints(launch, kernel, most):
    """Return what is wrong with a compiled launch."""
    found = []
    if kernel.stack_bytes or kernel.spilled_bytes:
        found.append(
            f"{launch.kernel} must keep its values in registers, got {kernel.stack_bytes} bytes "
            f"of local memory per thread, {kernel.spilled_bytes} bytes spilled"
        )
    if kernel.registers > most:
        found.append(f"{launch.kernel} must use at most {most} registers, got {kernel.registers}")
    of_block = launch.threads * -(-kernel.registers // 8) * 8
    if of_block > REGISTERS:
        found.append(
            f"{launch.kernel} must fit into {REGISTERS} registers, got {of_block} of a block of "
            f"{launch.threads} threads"
        )
    return found


@every_compiler
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_kernels_keep_to_their_registers(case, compiler, kernels):
    device, *_ = case
    if (case, compiler) not in kernels:
        pytest.skip(f"{compiler} does not know sm_{DEVICES[device].capability}")
    found = [
        complaint
        for launch, kernel in kernels[case, compiler]
        for complaint in complaints(launch, kernel.result(), budget(launch))
    ]
    assert not found, "\n".join(found)


# Tensor cores, on each GPU that has those of 8.0; "odd" layers have channels that are moved one by
# one, and are wider than a block.
TENSOR_LAYERS = LAYERS | {
    "odd": ((1, 67, 20, 70), Geometry(patch_size=(3, 200))),
    "seven phases": ((1, 64, 20, 70), Geometry(patch_size=5, dilation_patch=7)),
}
TENSOR_CASES = [
    *(("A100", "float16", layer) for layer in TENSOR_LAYERS),
    *(("H100", "bfloat16", layer) for layer in ("FlowNetC", "PWC-Net 2", "DispNetC", "default")),
    *((gpu, dtype, layer) for gpu in ("3090", "4090") for dtype, layer in
      (("float16", "FlowNetC"), ("bfloat16", "PWC-Net 4"))),
    *((gpu, "bfloat16", "FlowNetC") for gpu in ("B200", "5090")),
]  # fmt: skip


def multiplied(gpu, dtype, name, tf32=False):
    """Return the launch and the compiled kernel that multiplies maps with channels last."""
    shape, geometry = TENSOR_LAYERS[name]
    plan = cuda_plan.plan(
        ("cost",), Layer(geometry), shape, dtype, DEVICES[gpu], channels_last=True, tf32=tf32
    )
    launch = next(launch for launch in plan.launches if launch.kernel.endswith("_cost"))
    return launch, compiled(Case(launch, DEVICES[gpu].capability))


def differentiated(gpu, dtype, name, compiler=None):
    """Return the launches and the compiled kernels of the gradients of maps with channels last."""
    shape, geometry = TENSOR_LAYERS[name]
    plan = cuda_plan.plan(
        ("grad_fmap1", "grad_fmap2"), Layer(geometry), shape, dtype, DEVICES[gpu],
        channels_last=True, tf32=True,
    )  # fmt: skip
    found = [launch for launch in plan.launches if launch.kernel == "tensor_gradient"]
    return [(one, compiled(Case(one, DEVICES[gpu].capability), compiler)) for one in found]


@pytest.mark.parametrize(
    "case",
    [*((gpu, "FlowNetC") for gpu in ("A100", "4090", "H100")), ("A100", "odd")],
    ids=" ".join,
)
def test_tf32_keeps_to_its_registers(case):
    gpu, layer = case
    launch, kernel = multiplied(gpu, "float32", layer, tf32=True)
    assert launch.kernel == "tensor_cost"
    assert not complaints(launch, kernel, budget(launch))


@every_compiler
@pytest.mark.parametrize(
    "case",
    [
        *TENSOR_CASES,
        *(("A100", "float32", layer) for layer in ("FlowNetC", "PWC-Net 6", "default", "odd")),
        ("H100", "float32", "FlowNetC"),
    ],
    ids=" ".join,
)
def test_gradients_on_tensor_cores_keep_to_their_registers(case, compiler):
    if DEVICES[case[0]].capability not in nvrtc.capabilities(compiler):
        pytest.skip(f"{compiler} does not know {case[0]}")
    found = differentiated(*case, compiler)
    assert found
    for launch, kernel in found:
        assert not complaints(launch, kernel, budget(launch))


@disassembles
@pytest.mark.parametrize("gpu", ["A100", "H100"])
@pytest.mark.parametrize(
    ("dtype", "layer"),
    [
        *(("bfloat16", layer) for layer in ("FlowNetC", "PWC-Net 3", "DispNetC", "default")),
        ("float16", "default"),
        *(("float32", layer) for layer in ("PWC-Net 3", "default")),
    ],
)
def test_gradients_multiply_no_matrix_twice(gpu, dtype, layer):
    launches = differentiated(gpu, dtype, layer)
    assert launches
    for launch, kernel in launches:
        tile, found = dict(launch.constants), nvrtc.instructions(kernel)
        columns = tile["advance_x"] * (16 // tile["tile_rows"] - 1) + tile["patch_x"]
        tiles = tile["row_tiles"] * tile["channel_tiles"] * parts(tile)
        depth = 8 if dtype == "float32" else 16
        assert found["HMMA"] == tiles * -(-columns // depth)


@disassembles
@pytest.mark.parametrize("gpu", ["A100", "H100"])
def test_gradients_in_tf32_move_16_bytes_at_a_time(gpu):
    for launch, kernel in differentiated(gpu, "float32", "FlowNetC"):
        tile = dict(launch.constants)
        assert (tile["vector"], tile["unit"], tile["result_vector"]) == (4, 4, 4)
        assert nvrtc.widths(kernel, "LDGSTS") == nvrtc.widths(kernel, "STG") == {16}
        # Pixels by four channels, of the band single values.
        found = nvrtc.loops(kernel, lambda loop: loop["HMMA"])[0]
        steps = found["HMMA"] // (tile["row_tiles"] * tile["channel_tiles"])
        assert found["LDS.128"] == steps * 2 * tile["channel_tiles"] // 4


@pytest.mark.parametrize("case", TENSOR_CASES, ids=" ".join)
def test_kernels_for_tensor_cores_keep_to_their_registers(case):
    if DEVICES[case[0]].capability not in nvrtc.capabilities():
        pytest.skip(f"NVRTC {nvrtc.version()} does not know {case[0]}")
    launch, kernel = multiplied(*case)
    assert launch.kernel == "tensor_cost"
    assert not complaints(launch, kernel, budget(launch))


# Contiguous maps, whose channels are turned on the way. A width decides how much a load takes.
NATIVE_LAYERS = TENSOR_LAYERS | {
    "8 bytes": ((8, 128, 16, 28), Geometry(patch_size=9)),
    "4 bytes": ((8, 196, 8, 14), Geometry(patch_size=9)),
    "2 bytes": ((8, 64, 24, 41), Geometry(patch_size=9)),
    "padding": ((8, 64, 32, 64), Geometry(patch_size=9, dilation_patch=2, padding=3)),
    "four phases": ((4, 64, 32, 64), Geometry(patch_size=5, dilation_patch=4)),
}
NATIVE_CASES = [
    *(("A100", "float16", layer) for layer in NATIVE_LAYERS),
    *(("H100", "bfloat16", layer) for layer in ("FlowNetC", "PWC-Net 2", "DispNetC", "default")),
    *((gpu, "float16", "FlowNetC") for gpu in ("3090", "4090", "B200", "5090")),
    *((gpu, "float32", layer) for gpu in ("A100", "H100") for layer in ("FlowNetC", "2 bytes")),
]


def native(gpu, dtype, name, compiler=None):
    """Return the launches on tensor cores, and their kernels, that read contiguous maps."""
    shape, geometry = NATIVE_LAYERS[name]
    layer, device = Layer(geometry), DEVICES[gpu]
    planned = [tensor.cost(layer, shape, dtype, device, turn=False, tf32=True)]
    for which in (1, 2):
        axes = zip((geometry.y, geometry.x), shape[2:], strict=True)
        found = pair(targets(axis, size, which) for axis, size in axes)
        planned.append(
            tensor_adjoint.gradient(
                layer, shape, dtype, device, which, found, turn=False, tf32=True
            )
        )
    return [
        (launch, compiled(Case(launch, device.capability), compiler))
        for launch in planned
        if launch is not None
    ]


@every_compiler
@pytest.mark.parametrize("case", NATIVE_CASES, ids=" ".join)
def test_kernels_that_turn_channels_on_the_way_keep_to_their_registers(case, compiler):
    if DEVICES[case[0]].capability not in nvrtc.capabilities(compiler):
        pytest.skip(f"{compiler} does not know {case[0]}")
    for launch, kernel in native(*case, compiler):
        assert not complaints(launch, kernel, budget(launch))


@disassembles
@pytest.mark.parametrize(
    "layer", ["PWC-Net 3", "FlowNetC", "DispNetC", "padding", "8 bytes", "4 bytes", "2 bytes"]
)
def test_the_model_counts_the_instructions_that_turn_channels(layer):
    launch, kernel = native("A100", "float16", layer)[0]
    tile, (found, _) = dict(launch.constants), nvrtc.loops(kernel, lambda loop: loop["HMMA"])
    one = turning.staged(1, 8, tile["spacing_x"], 0, 16, tile["step_x"], tile["phases"],
                        tile["vector"], 2)  # fmt: skip
    pixels = 8 * (tile["phases"] if tile["vector"] == 1 else tile["spacing_x"])
    runs = found["LDG"] / (2 * pixels / tile["vector"])
    counted = tensor.MULTIPLY * found["HMMA"] + runs * one.instructions / one.lanes
    assert counted == pytest.approx(found.total(), rel=0.2)


@disassembles
@pytest.mark.parametrize(
    ("layer", "most"), [("PWC-Net 3", 16), ("8 bytes", 8), ("4 bytes", 4), ("2 bytes", 2)]
)
def test_one_instruction_loads_as_many_pixels_as_the_plan_says(layer, most):
    for launch, kernel in native("A100", "float16", layer):
        tile = dict(launch.constants)
        assert 2 * tile["vector"] == most
        widths = nvrtc.widths(kernel, "LDG")
        # Gradients also read the upstream gradient, and single terms of what is not finite.
        assert widths == {most} if launch.kernel == "tensor_cost" else widths <= {most, 2}
        assert max(nvrtc.widths(kernel, "STG")) == 2 * tile["result_vector"]


@disassembles
@pytest.mark.parametrize("gpu", ["A100", "H100"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tensor_cores_multiply_halves_and_nothing_else(gpu, dtype):
    launch, kernel = multiplied(gpu, dtype, "PWC-Net 3")
    found, tile = nvrtc.instructions(kernel), dict(launch.constants)
    if dtype in ("float32", "float64"):
        assert not found["HMMA"]
        return
    columns = tile["advance_x"] * (16 // tile["tile_rows"] - 1) + tile["displacements"]
    assert found["HMMA"] == tile["warp_rows"] * tile["x_tiles"] * -(-columns // 8)


# ---- accesses to memory: as wide as the plan says

ACCESS_LAYER = ((2, 32, 24, 32), Geometry(patch_size=3))
ACCESS_CASES = [
    *((gpu, dtype, True) for gpu in ("2070S", "H100") for dtype in DTYPES),
    *(("A100", dtype, False) for dtype in DTYPES),
    *(pytest.param((gpu, dtype, True), marks=pytest.mark.slow)
      for gpu in ("A100", "3090", "4090") for dtype in DTYPES),
]  # fmt: skip


def untensored(gpu, dtype, aligned=True):
    """Return the launches of a cost volume and of a gradient without tensor cores."""
    shape, geometry = ACCESS_LAYER
    for results in (("cost",), ("grad_fmap1",)):
        plan = cuda_plan.plan(
            results, Layer(geometry), shape, dtype, DEVICES[gpu], aligned=aligned, rank=1
        )
        yield plan.launches[0]


def narrow(launch, kernel):
    """Return, by name, the widths of accesses that a tiled kernel should not have."""
    tile = dict(launch.constants)
    bytes_of = {"float": 4, "double": 8, "Half": 2, "Bfloat16": 2}
    element = bytes_of[tile["element"]]
    copies = {"LDG": set(), "LDGSTS": set()}
    copies["LDGSTS" if tile["asynchronous"] else "LDG"].add(element * tile["vector"])
    if launch.source == "product_adjoint.cu":
        upstream = bytes_of[tile["upstream"]] * tile["upstream_vector"]
        copies["LDGSTS" if tile["upstream_asynchronous"] else "LDG"].add(upstream)
        result = element
    else:
        result = bytes_of[tile["result"]]
    copies["STG"] = {result * tile["result_vector"]}
    return {
        name: found
        for name, wanted in copies.items()
        if (found := nvrtc.widths(kernel, name)) != wanted
    }


@disassembles
@every_compiler
@pytest.mark.parametrize("case", ACCESS_CASES, ids=lambda case: " ".join(map(str, case)))
def test_one_instruction_moves_what_lies_side_by_side(case, compiler):
    *_, aligned = case
    for launch in untensored(*case):
        kernel = compiled(Case(launch, DEVICES[case[0]].capability), compiler)
        assert (dict(launch.constants)["result_vector"] > 1) == aligned
        assert not narrow(launch, kernel), launch.kernel


@disassembles
def test_a_store_that_is_torn_apart_is_found():
    launch = next(untensored("A100", "float32"))
    source, wide = cuda_sources.source(launch), "store_neighbours(target, rounded);"
    assert wide in source
    torn = source.replace(wide, "for (int k = 0; k < result_vector; ++k) target[k] = rounded[k];")
    assert narrow(launch, nvrtc.compile_kernel(torn, launch.kernel, 80)) == {"STG": {4}}


def test_the_chosen_layers_reach_every_kernel():
    planned = {
        launch.kernel
        for similarity in ("product", "l1")
        for layer in SOME
        for launch in launches("A100", "float32", layer, similarity)
    }
    folder = resources.files("cupycorr.kernels")
    text = "".join(
        file.read_text()
        for file in folder.iterdir()
        if file.name.endswith(".cu") and "lookup" not in file.name
    )
    written = set(re.findall(r"__launch_bounds__\([^)]*\)\s+(\w+)\(", text))
    assert written
    assert (
        planned | {launch.kernel for launch in launches("A100", "float16", "FlowNetC")} == written
    )


# ---- planted errors


@pytest.fixture(scope="module")
def flownetc():
    return launches("A100", "float32", "FlowNetC")[0]


@pytest.mark.parametrize(
    ("text", "planted"),
    [
        ("#pragma unroll\n", "#pragma unroll 1\n"),  # sums are indexed at run time
        (
            "__launch_bounds__(threads, resident)",
            "__launch_bounds__(threads, 8)",
        ),  # too few registers
    ],
    ids=["loops that stay loops", "eight blocks at once"],
)
def test_local_memory_is_found(text, planted, flownetc):
    source = cuda_sources.source(flownetc)
    assert text in source
    kernel = nvrtc.compile_kernel(source.replace(text, planted), flownetc.kernel, 80)
    (complaint,) = complaints(flownetc, kernel, MOST)
    assert "of local memory per thread" in complaint


def test_too_many_registers_are_found(flownetc):
    kernel = nvrtc.Kernel(flownetc.kernel, 168, 0, 0, b"")
    assert not complaints(flownetc._replace(threads=384), kernel, 168)
    assert complaints(flownetc._replace(threads=384), kernel, 160)
    assert complaints(flownetc._replace(threads=416), kernel, 168)


@pytest.mark.parametrize(
    "name",
    ["device.cuh", "staging.cuh", "matrices.cuh", "product.cu", "product_adjoint.cu", "plain.cu",
     "taps.cu", "tensor.cu", "tensor_adjoint.cu", "transpose.cu"],
)  # fmt: skip
def test_an_error_is_reported_with_its_file_and_line(name, monkeypatch):
    launch = next(
        launch
        for launch in launches("A100", "float32", "default")
        + launches("A100", "float32", "stride 3")
        + launches("A100", "float16", "FlowNetC")
        if f'#line 1 "{name}"' in cuda_sources.source(launch)
    )
    lines = cuda_sources._read(name).split("\n")
    last_empty = max(number for number, line in enumerate(lines[:-1], start=1) if not line)
    lines[last_empty - 1] = "#error planted"
    read = cuda_sources._read
    monkeypatch.setattr(
        cuda_sources, "_read", lambda file: "\n".join(lines) if file == name else read(file)
    )
    with pytest.raises(nvrtc.CompileError, match=rf"{re.escape(name)}\({last_empty}\): .*planted"):
        nvrtc.compile_kernel(cuda_sources.source(launch), launch.kernel, 80)


FILES = {
    "product.cu": "product_cost",
    "product_adjoint.cu": "product_gradient",
    "plain.cu": "plain_cost",
    "taps.cu": "taps_sum",
    "tensor.cu": "tensor_cost",
    "tensor_adjoint.cu": "tensor_gradient",
    "lookup_pack.cu": "lookup_pack",
    "lookup_plain.cu": "lookup_plain",
    "lookup_tiled.cu": "lookup_tiled",
    "lookup_grad.cu": "lookup_grad_levels",
    "lookup_grad_plain.cu": "plain_grad_levels",
    "lookup_grad_lists.cu": "bound_tiles",
    "lookup_grad_pool.cu": "pool_adjoint",
    "transpose.cu": "transpose",
    "volume_lookup.cu": "volume_cost",
    "volume_lookup_grad.cu": "volume_gradients",
}


@every_compiler
@pytest.mark.parametrize("file", FILES)
def test_a_file_stands_alone_with_its_defaults(file, compiler):
    source = cuda_sources._paste(file, set())
    assert nvrtc.compile_kernel(source, FILES[file], 80, compiler).registers <= MOST


# Functions of glibc's headers, which nvcc includes by itself. (NVRTC has those of math.h.)
LIBC = "".join(
    f'extern "C" __device__ int {name}();\n'
    for name in ("index", "rindex", "select", "random", "rand", "div", "ldiv", "system", "exit")
)


@pytest.mark.parametrize("file", FILES)
def test_no_name_of_a_file_is_a_function_of_libc(file):
    nvrtc.compile_kernel(LIBC + cuda_sources._paste(file, set()), FILES[file], 80)


def test_a_name_of_libc_is_found():
    source = cuda_sources._paste("taps.cu", set()).replace("offset", "index")
    with pytest.raises(nvrtc.CompileError, match="index"):
        nvrtc.compile_kernel(LIBC + source, FILES["taps.cu"], 80)


@pytest.mark.parametrize("file", FILES)
def test_nvcc_compiles_a_file_as_it_is(file, tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("needs nvcc")
    with resources.as_file(resources.files("cupycorr.kernels")) as folder:
        done = subprocess.run(
            [nvcc, "-arch=sm_80", "-std=c++17", "-cubin", "-o", tmp_path / "cubin", folder / file],
            capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
