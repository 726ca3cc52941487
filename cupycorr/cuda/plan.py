"""Plan the CUDA launches of a cost volume: which kernels, their constants, and their grids.

Pure arithmetic: nothing here needs a device, CuPy or a compiler. What a layer owns becomes a
constant of the kernel, what an image owns an argument; the sources in ``kernels/`` say what each
means. Every launch is checked against the limits of the device that it is planned for.
"""

from __future__ import annotations

from math import inf, prod

from cupycorr.cuda import plain as cuda_plain
from cupycorr.cuda import tensor, tensor_adjoint
from cupycorr.cuda import tiles as cuda_tiles
from cupycorr.cuda.cost import (
    LATENCY,
    Constants,
    Device,
    elements_per_load,
    least_displacements,
    multiprocessor_bytes,
    size_class,
)
from cupycorr.cuda.launch import (
    GRADIENTS,
    MAPS,
    Launch,
    Plan,
    Shape,
    Targets,
    Workspace,
    pair,
    pairs,
    targets,
    types,
    volume_shape,
)
from cupycorr.cuda.plain import THREADS
from cupycorr.cuda.turning import turn
from cupycorr.geometry import Geometry
from cupycorr.layer import DTYPES, Layer

MOST_ELEMENTS = 2**31 - 1  # within reach of a 32-bit offset
DIGITS = 4  # of an image's size that tiles depend on
WORKSPACE_BYTES = 256 << 20  # of the product volume, unless one sample needs more; of turned maps


def samples_at_once(geometry: Geometry, shape: Shape, dtype: str) -> int:
    """Return how many samples to plan for at a time, so that the workspace stays bounded."""
    if geometry.taps == 1 or not _tiles_apply(geometry, shape):
        return shape[0]
    word_bytes = DTYPES[DTYPES[dtype].accumulator].itemsize
    bytes_per_sample = prod(volume_shape(geometry, shape)[1:]) * word_bytes
    return max(1, min(shape[0], WORKSPACE_BYTES // bytes_per_sample))


def plan(
    results: tuple[str, ...],
    layer: Layer,
    shape: Shape,
    dtype: str,
    device: Device,
    *,
    tangent: bool = False,
    aligned: bool = True,
    plain: bool | None = None,
    rank: int = 0,
    channels_last: bool = False,
    tf32: bool = False,
) -> Plan:
    """Plan the launches of a layer's results.

    Parameters
    ----------
    results : tuple of "cost", or of "grad_fmap1" and "grad_fmap2"
        The arrays to compute.
    layer : Layer
        What is computed.
    shape : (N, C, H, W)
        Shape of the maps "fmap1" and "fmap2"; not empty.
    dtype : {"float16", "bfloat16", "float32", "float64"}
        The dtype of all arrays.
    device : Device
        Where the plan will run.
    tangent : bool, default False
        Whether "cost" is the change of sums of absolute differences with "tangent1" and "tangent2".
        (That of products is a sum of two cost volumes.)
    aligned : bool, default True
        Whether all arrays begin at multiples of 16 bytes.
    plain : bool, optional
        Use the plain kernels only, or only where no tiles apply; by default also where the model
        finds them faster, as for a few outputs of few channels.
    rank : int, default 0
        Take the tiles that the model finds faster than all but so many; the plain kernels where no
        more fit. To measure how good the model's choice is.
    channels_last : bool, default False
        Whether the maps, and the tangents, lie in memory as (N, H, W, C). Gradients with respect to
        them then do, too.
    tf32 : bool, default False
        Whether float32 maps and upstream gradients may be rounded to TF32 for the tensor cores.

    Raises
    ------
    RuntimeError
        If the device cannot launch the plan.
    """
    launches: list[Launch] = []
    tiled = not plain and not tangent and _tiles_apply(layer.geometry, shape)
    for result in results:
        launch = None
        if tiled and result == "cost":
            launch = _cost(layer, shape, dtype, device, aligned, channels_last, tf32, rank)
        elif tiled:
            launch = _gradient(
                layer, shape, dtype, device, aligned, channels_last, tf32, int(result[-1]), rank,
                turned=2 * len(results),
            )  # fmt: skip
        if launch is None or (plain is None and rank == 0):
            kernel = "plain_tangent" if tangent else f"plain_{result}"
            upstream = () if result == "cost" else ("grad_cost",)
            tangents = ("tangent1", "tangent2") if tangent else ()
            arrays = (*upstream, "fmap1", "fmap2", *tangents, result)
            other = _plain(kernel, layer, shape, dtype, device, arrays)
            behind = _taps_cycles(layer.geometry, shape, dtype, device) / len(results)
            if launch is None or _cycles(other) < _cycles(launch) + behind:
                launch = other
        launches.append(launch)
    launches, workspaces = _turned(launches, shape, dtype, aligned, channels_last)
    if any("volume" in launch.arrays for launch in launches):
        volume = volume_shape(layer.geometry, shape)
        workspaces.append(Workspace("volume", volume, DTYPES[dtype].accumulator))
        if results == ("cost",):
            launches.append(_taps("taps_sum", layer.geometry, shape, dtype, ("volume", "cost")))
        else:
            spread = _taps("taps_spread", layer.geometry, shape, dtype, ("grad_cost", "volume"))
            launches.insert(0, spread._replace(scaled=False))
    return _checked(Plan(tuple(launches), tuple(workspaces)), device)


def _turned(
    launches: list[Launch], shape: Shape, dtype: str, aligned: bool, channels_last: bool
) -> tuple[list[Launch], list[Workspace]]:
    """Turn maps first, and gradients last, where a launch has them in the other order of axes."""
    first: dict[str, Launch] = {}
    found: list[Launch] = []
    last: list[Launch] = []
    for launch in launches:
        if dict(launch.constants).get("channels_last", False) != channels_last:
            names = {name: f"{name}_turned" for name in _of_maps(launch)}
            for name, turned in sorted(names.items()):
                to = turned if name in MAPS else name
                turned_by = turn(
                    shape, dtype, name if name in MAPS else turned, to, aligned=aligned,
                    back=channels_last == (name in MAPS),
                )  # fmt: skip
                if name in MAPS:
                    first.setdefault(name, turned_by)
                else:
                    last.append(turned_by)
            launch = launch._replace(arrays=tuple(names.get(name, name) for name in launch.arrays))
        found.append(launch)
    workspaces = [first[name].arrays[1] for name in sorted(first)] + [one.arrays[0] for one in last]
    return (
        [*(first[name] for name in sorted(first)), *found, *last],
        [Workspace(name, shape, dtype) for name in workspaces],
    )


def _of_maps(launch: Launch) -> set[str]:
    """Return the names of a launch's maps and gradients, but for a map that it does not read."""
    result = launch.arrays[-1]
    # A gradient of products does not depend on its own map.
    own = "" if dict(launch.constants).get("l1") else result.removeprefix("grad_")
    return set((MAPS | GRADIENTS).intersection(launch.arrays) - {own})


def _tiles_apply(geometry: Geometry, shape: Shape) -> bool:
    """Whether one dense lattice holds all taps, and 32-bit offsets reach all of a sample."""
    outputs = geometry.output_size(*shape[2:])
    axes = (geometry.y, geometry.x)
    if any(axis.is_sparse(count) for axis, count in zip(axes, outputs, strict=True)):
        return False
    most = max(prod(shape[1:]), prod(volume_shape(geometry, shape)[1:]))
    reach = max(
        size + abs(first) + patch * step + extent
        for size, first, patch, step, extent in zip(
            shape[2:],
            geometry.first_displacement,
            geometry.patch_size,
            geometry.dilation_patch,
            geometry.taps_extent,
            strict=True,
        )
    )
    return most + reach * shape[3] < MOST_ELEMENTS // 2


def _offset(elements: int) -> Constants:
    # The last block may compute offsets beyond the end before it finds out.
    return (("offset", "int" if elements < MOST_ELEMENTS - 2 * THREADS else "long long"),)


def _plain(
    kernel: str,
    layer: Layer,
    shape: Shape,
    dtype: str,
    device: Device,
    arrays: tuple[str, ...],
) -> Launch:
    geometry = layer.geometry
    cost_shape = geometry.cost_shape(shape)
    outputs = prod(cost_shape if arrays[-1] == "cost" else shape)
    return Launch(
        "plain.cu",
        kernel,
        (
            *types(dtype),
            *_offset(max(prod(shape), prod(cost_shape))),
            ("l1", layer.l1),
            ("threads", THREADS),
        ),
        -(-outputs // THREADS),
        THREADS,
        0,
        arrays,
        (
            *zip(("samples", "channels", "height", "width"), shape, strict=True),
            *zip(("cost_height", "cost_width"), cost_shape[3:], strict=True),
            *pairs(
                kernel=geometry.kernel_size,
                patch=geometry.patch_size,
                stride=geometry.stride,
                padding=geometry.padding,
                dilation=geometry.dilation,
                spacing=geometry.dilation_patch,
                first=geometry.first_displacement,
            ),
        ),
        cycles=cuda_plain.cycles(layer, shape, dtype, device, arrays[-1]),
    )


def _taps(
    kernel: str, geometry: Geometry, shape: Shape, dtype: str, arrays: tuple[str, ...]
) -> Launch:
    """Plan the sum over taps, or its adjoint."""
    cost_shape, volume = geometry.cost_shape(shape), volume_shape(geometry, shape)
    axes = geometry.y, geometry.x
    constants = pairs(
        kernel=geometry.kernel_size,
        stride=pair(axis.stride // axis.lattice_step for axis in axes),
        dilation=pair(axis.dilation // axis.lattice_step for axis in axes),
    )
    output = volume if arrays[-1] == "volume" else cost_shape
    samples, patch_y, patch_x, *cost_size = cost_shape
    return Launch(
        "taps.cu",
        kernel,
        (
            *types(dtype),
            *_offset(max(prod(cost_shape), prod(volume))),
            ("threads", THREADS),
            *constants,
        ),
        -(-prod(output) // THREADS),
        THREADS,
        0,
        arrays,
        (
            ("samples", samples),
            ("displacements", patch_y * patch_x),
            *zip(("cost_height", "cost_width"), cost_size, strict=True),
            *zip(("lattice_height", "lattice_width"), volume[3:], strict=True),
        ),
    )


def _taps_cycles(geometry: Geometry, shape: Shape, dtype: str, device: Device) -> float:
    """Return the cycles of a launch over taps: of its bytes, each once; 0 if there is one tap."""
    if geometry.taps == 1:
        return 0
    elements = prod(geometry.cost_shape(shape)) + prod(volume_shape(geometry, shape))
    word_bytes = DTYPES[DTYPES[dtype].accumulator].itemsize
    return LATENCY + elements * word_bytes / multiprocessor_bytes(device)


def _cost(
    layer: Layer,
    shape: Shape,
    dtype: str,
    device: Device,
    aligned: bool,
    channels_last: bool,
    tf32: bool,
    rank: int,
) -> Launch | None:
    """Plan the tiled product volume, by whichever kernel is faster; None where no tile fits."""
    scalar = _product(layer, shape, dtype, device, aligned, rank)
    if rank > 0:
        return scalar
    matrices = tensor.cost(
        layer, shape, dtype, device,
        aligned=aligned, channels_last=channels_last, tf32=tf32,
        turn=2 * prod(shape) * DTYPES[dtype].itemsize <= WORKSPACE_BYTES,
        scalar_cycles=_cycles(scalar),
    )  # fmt: skip
    return matrices or scalar


def _cycles(launch: Launch | None) -> float:
    return inf if launch is None or launch.cycles is None else launch.cycles


def _product(
    layer: Layer, shape: Shape, dtype: str, device: Device, aligned: bool, rank: int
) -> Launch | None:
    """Plan the tiled product volume; None where no tile fits the device."""
    geometry = layer.geometry
    samples, channels, _, width = shape
    lattice_height, lattice_width = volume_shape(geometry, shape)[3:]
    axes = geometry.y, geometry.x
    # Inside a phase a position advances by as many columns as displacements have phases.
    (phases_y, advance_y), (phases_x, advance_x) = (axis.phases for axis in axes)
    result = dtype if geometry.taps == 1 else DTYPES[dtype].accumulator
    origin = pair(-axis.padding for axis in axes)
    first = geometry.first_displacement

    # Loads of several elements need neighbouring columns and aligned rows.
    widest = elements_per_load(dtype)
    asynchronous = device.copies_asynchronously and dtype == DTYPES[dtype].accumulator
    vector = lead = 0
    if aligned and width % widest == 0 and origin[1] % widest == 0 and geometry.x.lattice_step == 1:
        if phases_x == 1:
            vector, lead = widest, first[1] % widest
        elif not asynchronous and widest % phases_x == 0 and first[1] % widest == 0:
            vector = widest
    result_vector = widest if aligned and lattice_width % widest == 0 else 1
    present = 1.0 if layer.l1 else _present(geometry, shape)
    found = cuda_tiles.product_tile(
        cuda_tiles.Product(
            samples=size_class(samples * phases_y, DIGITS),
            channels=channels,
            rows=size_class(-(-lattice_height // phases_y), DIGITS),
            columns=size_class(-(-lattice_width // phases_x), DIGITS),
            patch=geometry.patch_size,
            present=present,
            step_x=geometry.x.lattice_step,
            phases_x=phases_x,
            advance=(advance_y, advance_x),
            accumulator=DTYPES[dtype].accumulator,
            element_bytes=DTYPES[dtype].itemsize,
            result_bytes=DTYPES[result].itemsize,
            vector=max(1, vector),
            lead=lead,
            result_vector=result_vector,
            asynchronous=asynchronous,
            l1=layer.l1,
        ),
        device,
        rank,
    )
    if found is None:
        return None
    cycles, tile = found
    blocks_x = -(-lattice_width // (phases_x * tile.groups * tile.positions))
    strips = tile.q_groups * max(
        sum(end - first for first, end in rows) for rows in _displaced(geometry, shape, tile.least)
    )
    blocks_y = -(-strips // tile.strips)
    return Launch(
        "product.cu",
        "product_cost",
        (
            *types(dtype, result=result),
            ("l1", layer.l1),
            *pairs(
                patch=geometry.patch_size,
                step=pair(axis.lattice_step for axis in axes),
                spacing=geometry.dilation_patch,
                phases=(phases_y, phases_x),
                advance=(advance_y, advance_x),
            ),
            *tile.constants,
            ("result_vector", result_vector),
        ),
        samples * phases_y * blocks_y * blocks_x,
        tile.threads,
        tile.shared_bytes,
        ("fmap1", "fmap2", "cost" if geometry.taps == 1 else "volume"),
        (
            *zip(("channels", "height", "width"), shape[1:], strict=True),
            *(("lattice_height", lattice_height), ("lattice_width", lattice_width)),
            *pairs(origin=origin, first=first, blocks=(blocks_y, blocks_x)),
        ),
        scaled=geometry.taps == 1,
        cycles=cycles,
    )


def _present(geometry: Geometry, shape: Shape) -> float:
    """Return the share of strips whose row of the second map exists; 1 where all are computed.

    Where product.cu leaves strips out, it stages as many rows as are enough if each row meets the
    second map at half of its displacements, and so at no fewer than it has strips for. The share is
    that of images of about this size.
    """
    samples, channels, height, width = shape
    patch, size = geometry.patch_size[0], size_class(height, DIGITS)
    least = least_displacements(patch)
    if _displaced(geometry, shape, least) != _displaced(geometry, shape, 1):
        return 1
    found = _displaced(geometry, (samples, channels, size, width), least)
    return sum(end - first for rows in found for first, end in rows) / (
        patch * sum(map(len, found))
    )


def _displaced(geometry: Geometry, shape: Shape, least: int) -> list[list[tuple[int, int]]]:
    """Return the vertical displacements of each row of each row phase that have strips.

    From the first to the end, as product.cu finds them.
    """
    axis, height, patch = geometry.y, shape[2], geometry.patch_size[0]
    phases, advance = axis.phases
    number = volume_shape(geometry, shape)[3]
    found = []
    for phase in range(phases):
        y2 = phase * axis.lattice_step - axis.padding + axis.first_displacement
        before = -(y2 // axis.dilation_patch)
        extent = max(least, -((y2 - height) // axis.dilation_patch) - before)
        rows = range(-(-(number - phase) // phases))
        found.append(
            [
                (
                    min(max(before - advance * row, 0), patch - least),
                    min(max(before - advance * row + extent, least), patch),
                )
                for row in rows
            ]
        )
    return found


def _gradient(
    layer: Layer,
    shape: Shape,
    dtype: str,
    device: Device,
    aligned: bool,
    channels_last: bool,
    tf32: bool,
    which: int,
    rank: int,
    *,
    turned: int,
) -> Launch | None:
    """Plan the tiled gradient with respect to one map, by whichever kernel is faster.

    Where maps are turned for tensor cores, all gradients need ``turned`` turned arrays. None where
    no tile applies.
    """
    y, x = (
        targets(axis, size, which)
        for axis, size in zip((layer.geometry.y, layer.geometry.x), shape[2:], strict=True)
    )
    if which == 2 and x.step != layer.geometry.x.lattice_step:
        return None  # sources would lie between the lattice's columns
    scalar = _product_gradient(layer, shape, dtype, device, aligned, which, rank, y, x)
    if rank > 0:
        return scalar
    matrices = tensor_adjoint.gradient(
        layer, shape, dtype, device, which, (y, x),
        aligned=aligned, channels_last=channels_last, tf32=tf32,
        turn=turned * prod(shape) * DTYPES[dtype].itemsize <= WORKSPACE_BYTES,
        scalar_cycles=_cycles(scalar),
    )  # fmt: skip
    return matrices or scalar


def _product_gradient(
    layer: Layer,
    shape: Shape,
    dtype: str,
    device: Device,
    aligned: bool,
    which: int,
    rank: int,
    y: Targets,
    x: Targets,
) -> Launch | None:
    """Plan the tiled gradient with respect to one map; None where no tile fits the device."""
    geometry = layer.geometry
    samples, channels, _, width = shape
    lattice = volume_shape(geometry, shape)[3:]
    upstream = dtype if geometry.taps == 1 else DTYPES[dtype].accumulator

    widest = elements_per_load(dtype)
    asynchronous = device.copies_asynchronously and dtype == DTYPES[dtype].accumulator
    upstream_asynchronous = device.copies_asynchronously and upstream == DTYPES[dtype].accumulator
    neighbours = aligned and width % widest == 0 and x.step == 1 and x.advance == 1
    whole = which == 1 or (x.shift % widest == 0 and lattice[1] % widest == 0)
    vector = 1
    if neighbours and whole and (x.target + x.first) % widest == 0:
        vector = widest if x.phases == 1 or (not asynchronous and widest % x.phases == 0) else 1
    upstream_vector = 1
    if aligned and which == 1 and x.phases == 1 and (x.shift | lattice[1]) % widest == 0:
        upstream_vector = widest
    result_vector = widest if neighbours and x.target == 0 else 1
    found = cuda_tiles.gradient_tile(
        cuda_tiles.Gradient(
            which=which,
            samples=size_class(samples * y.phases, DIGITS),
            channels=channels,
            rows=size_class(-(-y.number // y.phases), DIGITS),
            columns=size_class(-(-x.number // x.phases), DIGITS),
            patch=geometry.patch_size,
            step=(y.step, x.step),
            phases_x=x.phases,
            advance=(y.advance, x.advance),
            accumulator=DTYPES[dtype].accumulator,
            element_bytes=DTYPES[dtype].itemsize,
            upstream_bytes=DTYPES[upstream].itemsize,
            vector=vector,
            upstream_vector=upstream_vector,
            result_vector=result_vector,
            asynchronous=asynchronous,
            upstream_asynchronous=upstream_asynchronous,
            l1=layer.l1,
        ),
        device,
        rank,
    )
    if found is None:
        return None
    cycles, tile = found
    blocks_c = -(-channels // (tile.channel_groups * tile.channels))
    blocks_x = -(-x.number // (x.phases * tile.groups * tile.positions))
    blocks_y = -(-y.number // (y.phases * tile.rows))
    return Launch(
        "product_adjoint.cu",
        "product_gradient",
        (
            *types(dtype, upstream=upstream),
            ("l1", layer.l1),
            ("which", which),
            *pairs(
                patch=geometry.patch_size,
                step=(y.step, x.step),
                lattice=(geometry.y.lattice_step, geometry.x.lattice_step),
                spacing=geometry.dilation_patch,
                phases=(y.phases, x.phases),
                advance=(y.advance, x.advance),
            ),
            *tile.constants,
            ("result_vector", result_vector),
        ),
        samples * y.phases * blocks_y * blocks_x * blocks_c,
        tile.threads,
        tile.shared_bytes,
        ("grad_cost" if geometry.taps == 1 else "volume", "fmap1", "fmap2", f"grad_fmap{which}"),
        (
            *zip(("channels", "height", "width"), shape[1:], strict=True),
            *zip(("lattice_height", "lattice_width"), lattice, strict=True),
            *pairs(
                origin=pair(-axis.padding for axis in (geometry.y, geometry.x)),
                target=(y.target, x.target),
                targets=(y.number, x.number),
                shift=(y.shift, x.shift),
                first=(y.first, x.first),
                blocks=(blocks_y, blocks_x),
            ),
            ("blocks_c", blocks_c),
        ),
        cycles=cycles,
    )


def _checked(plan: Plan, device: Device) -> Plan:
    """Refuse what the device cannot launch."""
    for launch in plan.launches:
        limits = (
            ("blocks", launch.blocks, 2**31 - 1),
            ("threads per block", launch.threads, 1024),
            ("bytes of shared memory per block", launch.shared_bytes, device.shared_bytes),
        )
        for what, wanted, most in limits:
            if wanted > most:
                raise RuntimeError(
                    f"{launch.kernel} must have at most {most} {what} on this device, got {wanted}"
                )
    return plan
