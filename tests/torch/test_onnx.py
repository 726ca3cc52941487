"""Models exported to ONNX compute in onnxruntime what the engine computes."""

import io
import re
import subprocess
import sys

import numpy as np
import pytest
from cases import GEOMETRIES
from lookup_cases import CASES, arguments, volume_arguments

import cupycorr
from cupycorr import Geometry, Lookup, verify

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from cupycorr import SpatialCorrelationSampler  # noqa: E402
from cupycorr import onnx as onnx_export  # noqa: E402
from cupycorr.compat import raft  # noqa: E402

# What torch warns of while it exports is not about this package.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
    "ignore::UserWarning",
    "ignore::torch.jit.TracerWarning",
)

AUTO = torch.export.Dim.AUTO
OPEN = {0: AUTO, 2: AUTO, 3: AUTO}
# One for each way in which sizes that are left open enter.
OPEN_CASES = (
    "even patch, dilated",
    "lattice of gcd 2",
    "mixed padding",
    "one-sided displacements",
    "stride 6, dilation_patch 4",
)


class Costs(torch.nn.Module):
    """The cost volumes of many pairs of maps, so that all cases take one export."""

    def __init__(self, geometries, normalize=False):
        super().__init__()
        self.geometries = geometries
        self.normalize = normalize

    def forward(self, *maps):
        pairs = zip(maps[::2], maps[1::2], self.geometries, strict=True)
        return tuple(cupycorr.correlation(*p, normalize=self.normalize) for p in pairs)


def export(model, maps, optimize=True, **options):
    """Return a model's ONNX program."""
    return torch.onnx.export(
        model.eval(),
        tuple(map(torch.from_numpy, maps)),
        dynamo=True,
        custom_translation_table=onnx_export.translation_table(),
        verbose=False,
        # torch's optimizer takes most of the time, and onnxruntime has its own.
        optimize=optimize,
        **options,
    )


def run(program, maps):
    """Return what onnxruntime computes from a file with a program."""
    file = io.BytesIO()
    program.save(file)
    return run_file(file, maps)


def run_file(file, maps):
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip([i.name for i in session.get_inputs()], maps, strict=True)))


def integers(shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(dtype)


def pair(shape, dtype="float32"):
    return integers(shape, 0, dtype), integers(shape, 1, dtype)


def difference(got, maps, geometry):
    """Compare a cost volume of integers with the engine's, to the bit; None if they agree."""
    want = cupycorr.correlation(*(m.astype(np.float64) for m in maps), geometry)
    return verify.difference(got.astype(np.float64), verify.round_to(want, got.dtype.name))


@pytest.fixture(scope="module")
def costs():
    """Return the cost volumes of all cases, of maps of integers."""
    model = Costs([geometry for _, geometry in GEOMETRIES.values()])
    maps = [m for shape, _ in GEOMETRIES.values() for m in pair(shape)]
    return dict(zip(GEOMETRIES, run(export(model, maps, optimize=False), maps), strict=True))


@pytest.fixture(scope="module")
def open_costs():
    """Return the cost volumes of some cases, exported with maps of other sizes."""
    geometries = [GEOMETRIES[name][1] for name in OPEN_CASES]
    shapes = [GEOMETRIES[name][0] for name in OPEN_CASES]
    others = [m for n, c, h, w in shapes for m in pair((n + 2, c, h + 3, w + 4))]
    maps = [m for shape in shapes for m in pair(shape)]
    sizes = {"maps": tuple(OPEN for _ in maps)}
    program = export(Costs(geometries), others, optimize=False, dynamic_shapes=sizes)
    return dict(zip(OPEN_CASES, run(program, maps), strict=True))


class TestEveryGeometry:
    @pytest.mark.parametrize("case", GEOMETRIES)
    def test_it_is_exact_on_integers(self, case, costs):
        shape, geometry = GEOMETRIES[case]
        assert not difference(costs[case], pair(shape), geometry)

    @pytest.mark.parametrize("case", OPEN_CASES)
    def test_it_is_exact_on_maps_of_other_sizes(self, case, open_costs):
        shape, geometry = GEOMETRIES[case]
        assert not difference(open_costs[case], pair(shape), geometry)

    def test_an_error_in_it_is_caught(self, monkeypatch):
        def centred(*fields):
            return Geometry(*fields[:-1])

        monkeypatch.setattr(onnx_export, "Geometry", centred)
        shape, geometry = GEOMETRIES["off-centre patch"]
        (got,) = run(export(Costs([geometry]), pair(shape), optimize=False), pair(shape))
        assert difference(got, pair(shape), geometry)

    def test_an_error_in_a_tile_is_caught(self, monkeypatch):
        whole = onnx_export._inside
        monkeypatch.setattr(onnx_export, "_inside", lambda at, size: whole(at, size - 1))
        shape, geometry = GEOMETRIES["odd patch"]
        (got,) = run(export(Costs([geometry]), pair(shape), optimize=False), pair(shape))
        assert difference(got, pair(shape), geometry)


SHAPE, GEOMETRY = (2, 5, 9, 13), Geometry(3, (3, 4), (1, 2), 1, 2, 2)


class TestNumbers:
    @pytest.mark.parametrize("normalize", [False, True])
    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
    def test_it_rounds_as_little_as_the_engine(self, dtype, normalize):
        rng = np.random.default_rng(0)
        maps = [rng.standard_normal(SHAPE).astype(dtype) for _ in range(2)]
        (got,) = run(export(Costs([GEOMETRY], normalize), maps), maps)
        assert got.dtype == dtype
        wide = [m.astype(np.float64) for m in maps]
        want = cupycorr.correlation(*wide, GEOMETRY, normalize=normalize)
        most = cupycorr.correlation(*map(np.abs, wide), GEOMETRY, normalize=normalize)
        terms = SHAPE[1] * GEOMETRY.taps
        assert not verify.excess(got.astype(np.float64), want, most, terms, dtype)

    def test_bfloat16_inside_a_model_is_exact_on_integers(self):
        class Narrow(Costs):
            def forward(self, *maps):
                (cost,) = super().forward(*(m.bfloat16() for m in maps))
                return (cost.float(),)

        (got,) = run(export(Narrow([GEOMETRY]), pair(SHAPE)), pair(SHAPE))
        want = cupycorr.correlation(*pair(SHAPE, "float64"), GEOMETRY)
        assert not verify.difference(got.astype(np.float64), verify.round_to(want, "bfloat16"))

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_nothing_outside_the_maps_counts(self, value):
        maps = pair(SHAPE)
        maps[0][0, 1, 0, 0] = maps[1][1, 2, -1, -1] = value
        (got,) = run(export(Costs([GEOMETRY]), maps), maps)
        assert not difference(got, maps, GEOMETRY)

    def test_no_samples_of_doubles_make_no_costs(self):
        shape = (0, 3, 5, 6)
        program = export(Costs([GEOMETRY]), pair(shape, "float64"), optimize=False)
        (got,) = run(program, pair(shape, "float64"))
        assert got.shape == GEOMETRY.cost_shape(shape)


class Network(torch.nn.Module):
    """A small FlowNetC with weights that are small integers, so that all it computes is exact."""

    def __init__(self):
        super().__init__()
        self.features = torch.nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.match = SpatialCorrelationSampler(patch_size=5, dilation_patch=2)
        self.flow = torch.nn.Conv2d(25 + 6, 2, 3, padding=1)
        for seed, values in enumerate(self.parameters()):
            values.data = torch.from_numpy(integers(values.shape, seed))

    def forward(self, image1, image2):
        one, two = self.features(image1).relu(), self.features(image2).relu()
        return self.flow(torch.cat([self.match(one, two).flatten(1, 2), one], 1))


class TestNetworks:
    @pytest.mark.parametrize("sizes", [{}, {0: torch.export.Dim.AUTO}, OPEN],
                             ids=["fixed", "any batch", "any size"])  # fmt: skip
    def test_a_network_computes_the_same(self, sizes):
        network = Network()
        images = pair((2, 3, 16, 20))
        program = export(network, images, dynamic_shapes=(sizes, sizes) if sizes else None)
        shape = tuple(size + 4 * (dim in sizes) for dim, size in enumerate(images[0].shape))
        (got,) = run(program, pair(shape))
        with torch.no_grad():
            want = network(*map(torch.from_numpy, pair(shape))).double().numpy()
        assert not verify.difference(got.astype(np.float64), want)

    def test_any_patch_takes_few_nodes(self):
        counts = [
            len(export(Costs([Geometry(patch_size=patch)]), pair((1, 4, 24, 32))).model.graph)
            for patch in (9, 21)
        ]
        assert max(counts) <= 20


SCALE = 0.25
# One for each way in which sizes that are left open enter.
OPEN_LOOKUPS = ("RAFT", "stereo", "edges of patches", "tokens", "dilated")


class Lookups(torch.nn.Module):
    """The costs of many lookups, of maps that are pooled inside, so that all take one export."""

    def __init__(self, names, look_up=None):
        super().__init__()
        self.names, self.counts = names, [len(looked_up(name)) for name in names]
        self.look_up = look_up or cupycorr.correlation_lookup

    def forward(self, *arrays):
        costs, last = [], 0
        for name, count in zip(self.names, self.counts, strict=True):
            first, last, lookup = last, last + count, CASES[name].lookup
            one, two, coords, *indices = arrays[first:last]
            named = dict(zip(("index1", "index2"), indices, strict=False))
            costs.append(self.look_up(one, two, coords, lookup, scale=SCALE, **named))
        return tuple(costs)


def looked_up(name, dtype="float32"):
    """Return a lookup's maps, coordinates and indices: none NaN or out of range."""
    one, levels, coords, indices = arguments(name)
    wide = "float64" if dtype == "float64" else "float32"
    coords = np.nan_to_num(coords, nan=np.inf, posinf=np.inf, neginf=-np.inf)
    indices = (
        index % count for index, count in zip(indices.values(), CASES[name].maps, strict=False)
    )
    return [one.astype(dtype), levels[0].astype(dtype), coords.astype(wide), *indices]


def costs_of(name, arrays):
    """Return the costs that the engine computes in float64."""
    model = Lookups([name])
    (want,) = model(*(a.astype(np.float64) if a.dtype.kind == "f" else a for a in arrays))
    return want


def difference_of(name, got, arrays):
    want = verify.round_to(costs_of(name, arrays), got.dtype.name)
    return verify.difference(got.astype(np.float64), want)


class TestLookups:
    @pytest.fixture(scope="class")
    def found(self):
        arrays = [array for name in CASES for array in looked_up(name)]
        program = export(Lookups(tuple(CASES)), arrays, optimize=False)
        return dict(zip(CASES, run(program, arrays), strict=True))

    @pytest.fixture(scope="class")
    def found_of_open_sizes(self):
        """Return costs of a model that was exported with more of all, and fewer positions."""
        arrays = [looked_up(name) for name in OPEN_LOOKUPS]
        others, sizes = [], []
        for one, two, coords, *indices in arrays:
            fewer = (slice(None), slice(None), slice(2))
            larger = np.pad(two, ((0, 0), (0, 0), (0, 9), (0, 6)))
            more = one[fewer], larger, coords[fewer], *indices
            others += [np.concatenate([array, array]) for array in more]
            sizes += [{0: AUTO, 2: AUTO}, {0: AUTO, 2: AUTO, 3: AUTO}, {0: AUTO, 2: AUTO}]
            sizes += [{0: AUTO}] * len(indices)
        program = export(
            Lookups(OPEN_LOOKUPS), others, optimize=False, dynamic_shapes={"arrays": tuple(sizes)}
        )
        flat = [array for case in arrays for array in case]
        return dict(zip(OPEN_LOOKUPS, run(program, flat), strict=True))

    @pytest.mark.parametrize("name", CASES)
    def test_it_is_exact_on_integers(self, name, found):
        assert not difference_of(name, found[name], looked_up(name))

    @pytest.mark.parametrize("name", OPEN_LOOKUPS)
    def test_it_is_exact_on_arrays_of_other_sizes(self, name, found_of_open_sizes):
        assert not difference_of(name, found_of_open_sizes[name], looked_up(name))

    @pytest.mark.parametrize("dtype", ["float16", "float64"])
    def test_it_accumulates_and_rounds_as_the_engine(self, dtype):
        arrays = looked_up("RAFT", dtype)
        (got,) = run(export(Lookups(["RAFT"]), arrays, optimize=False), arrays)
        assert got.dtype == dtype
        assert not difference_of("RAFT", got, arrays)

    def test_infinities_reach_only_who_reads_them(self):
        one, two, coords = looked_up("integers")
        two[0, 1, 3, 4] = np.inf
        arrays = [np.abs(one) + 1, np.abs(two), coords]
        (got,) = run(export(Lookups(["integers"]), arrays, optimize=False), arrays)
        assert np.isinf(got).any()
        assert not difference_of("integers", got, arrays)

    @pytest.mark.parametrize(
        ("name", "broken"),
        [
            ("_inside", lambda at, size: (at >= 0) & (at < size - 1)),
            ("Lookup", lambda radius, dilation_patch: Lookup(radius)),
        ],
    )
    def test_an_error_in_it_is_caught(self, name, broken, monkeypatch):
        monkeypatch.setattr(onnx_export, name, broken)
        arrays = looked_up("dilated")
        (got,) = run(export(Lookups(["dilated"]), arrays, optimize=False), arrays)
        assert difference_of("dilated", got, arrays)


class Samples(torch.nn.Module):
    """The samples of many volumes, whose levels are pooled inside unless they are given."""

    def __init__(self, names, counts):
        super().__init__()
        self.names, self.counts = names, counts

    def forward(self, *arrays):
        samples, last = [], 0
        for name, count in zip(self.names, self.counts, strict=True):
            first, last = last, last + count
            *levels, coords = arrays[first:last]
            volume = levels[0] if len(levels) == 1 else levels
            samples.append(cupycorr.volume_lookup(volume, coords, CASES[name].lookup))
        return tuple(samples)


def sampled(name, dtype="float32"):
    """Return a volume and coordinates, none NaN."""
    _, levels, coords = volume_arguments(name)
    wide = "float64" if dtype == "float64" else "float32"
    coords = np.nan_to_num(coords, nan=np.inf, posinf=np.inf, neginf=-np.inf)
    return [levels[0].astype(dtype), coords.astype(wide)]


def difference_of_samples(name, got, arrays):
    wide = [array.astype(np.float64) for array in arrays]
    (want,) = Samples([name], [len(arrays)])(*wide)
    want = verify.round_to(want, got.dtype.name)
    return verify.difference(got.astype(np.float64), want)


class TestVolumeLookups:
    @pytest.fixture(scope="class")
    def found(self):
        arrays = [array for name in CASES for array in sampled(name)]
        program = export(Samples(tuple(CASES), [2] * len(CASES)), arrays, optimize=False)
        return dict(zip(CASES, run(program, arrays), strict=True))

    @pytest.fixture(scope="class")
    def found_of_open_sizes(self):
        """Return samples of a model that was exported with more of all."""
        arrays = [sampled(name) for name in OPEN_LOOKUPS]
        others, sizes = [], []
        for volume, coords in arrays:
            axes = range(2, coords.ndim)
            more = [(0, 2), *((0, 1) for _ in axes)]
            others.append(np.pad(volume, [*more, (0, 9), (0, 6)]))
            others.append(np.pad(coords, [more[0], (0, 0), *more[1:]]))
            sizes += [
                dict.fromkeys(range(volume.ndim), AUTO),
                {0: AUTO} | dict.fromkeys(axes, AUTO),
            ]
        program = export(
            Samples(OPEN_LOOKUPS, [2] * len(arrays)), others, optimize=False,
            dynamic_shapes={"arrays": tuple(sizes)},
        )  # fmt: skip
        flat = [array for case in arrays for array in case]
        return dict(zip(OPEN_LOOKUPS, run(program, flat), strict=True))

    @pytest.mark.parametrize("name", CASES)
    def test_it_is_exact_on_integers(self, name, found):
        assert not difference_of_samples(name, found[name], sampled(name))

    @pytest.mark.parametrize("name", OPEN_LOOKUPS)
    def test_it_is_exact_on_arrays_of_other_sizes(self, name, found_of_open_sizes):
        assert not difference_of_samples(name, found_of_open_sizes[name], sampled(name))

    @pytest.mark.parametrize("dtype", ["float16", "float64"])
    def test_given_levels_of_other_dtypes_are_sampled_and_rounded_as_by_the_engine(self, dtype):
        volume, coords = sampled("RAFT", dtype)
        # Samples are multiples of 1 / 64, and have more bits than float16.
        arrays = [*cupycorr.volume_pyramid(volume * 111, CASES["RAFT"].lookup), coords]
        (got,) = run(export(Samples(["RAFT"], [len(arrays)]), arrays, optimize=False), arrays)
        assert got.dtype == dtype
        assert not difference_of_samples("RAFT", got, arrays)

    def test_infinities_reach_only_who_reads_them(self):
        volume, coords = sampled("integers")
        volume[:] = np.abs(volume)
        volume[0, ..., 3, 4] = np.inf
        (got,) = run(export(Samples(["integers"], [2]), [volume, coords]), [volume, coords])
        assert np.isinf(got).any()
        assert not difference_of_samples("integers", got, [volume, coords])

    @pytest.mark.parametrize(
        ("name", "broken"),
        [
            ("_inside", lambda at, size: (at >= 0) & (at < size - 1)),
            ("Lookup", lambda radius, dilation_patch: Lookup(radius)),
        ],
    )
    def test_an_error_in_it_is_caught(self, name, broken, monkeypatch):
        monkeypatch.setattr(onnx_export, name, broken)
        arrays = sampled("dilated")
        (got,) = run(export(Samples(["dilated"], [2]), arrays, optimize=False), arrays)
        assert difference_of_samples("dilated", got, arrays)


class Loop(torch.nn.Module):
    """A small RAFT with weights that are small integers, so that all it computes is exact."""

    def __init__(self):
        super().__init__()
        self.features = torch.nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.update = torch.nn.Conv2d(2 * 25, 2, 3, padding=1)
        for seed, values in enumerate(self.parameters()):
            values.data = torch.from_numpy(integers(values.shape, seed))

    def forward(self, image1, image2):
        one, two = self.features(image1), self.features(image2)
        look_up = raft.CorrBlock(one, two, num_levels=2, radius=2)
        rows, columns = (torch.arange(n, dtype=one.dtype) for n in one.shape[2:])
        start = torch.stack(
            [columns.expand(one.shape[2], -1), rows[:, None].expand(-1, one.shape[3])]
        )
        coords = start.expand(one.shape[0], -1, -1, -1)
        for _ in range(2):
            # Eighths, from -4 to 4.
            coords = coords + self.update(look_up(coords)).div(8).round().remainder(64).sub(32) / 8
        return coords - start


@pytest.mark.parametrize("sizes", [{}, OPEN], ids=["fixed", "any size"])
def test_a_network_that_looks_up_in_a_loop_computes_the_same(sizes):
    network, images = Loop(), pair((2, 3, 16, 20))
    program = export(network, images, dynamic_shapes=(sizes, sizes) if sizes else None)
    shape = tuple(size + 4 * (dim in sizes) for dim, size in enumerate(images[0].shape))
    (got,) = run(program, pair(shape))
    with torch.no_grad():
        want = network(*map(torch.from_numpy, pair(shape))).numpy()
    assert np.ptp(want) > 4
    assert not verify.difference(got.astype(np.float64), want.astype(np.float64))


FORGETFUL = """
import io, sys, warnings
import torch
from cupycorr import SpatialCorrelationSampler

maps = torch.ones(1, 2, 4, 5), torch.ones(1, 2, 4, 5)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        torch.onnx.export(SpatialCorrelationSampler(), maps, io.BytesIO(), dynamo=True)
    except Exception as error:
        print(type(error).__name__)
print(*(warning.message for warning in caught))
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="2.6 hides that it exports")
def test_who_forgets_the_translation_is_told():
    # In a process of its own: this one has imported the translation.
    done = subprocess.run(
        [sys.executable, "-c", FORGETFUL], capture_output=True, text=True, check=True
    )
    assert re.search(r"^\w+Error$", done.stdout, re.MULTILINE)
    assert "custom_translation_table=cupycorr.onnx.translation_table()" in done.stdout


def test_importing_the_operators_does_not_import_onnx():
    code = "import sys, cupycorr.torch.operators; print({'onnx', 'onnxscript'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
