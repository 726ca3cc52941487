"""Planted errors: what the kernels must not do is noticed when they are run on the processor."""

import faulthandler
import os
from dataclasses import replace
from typing import NamedTuple

import definition
import host
import numpy as np
import pytest
import test_host
from host import ORDERS, SM_75, SM_80
from test_host import TILED

from cupycorr import Geometry, verify
from cupycorr.cuda import plan as cuda_plan
from cupycorr.cuda import sources as cuda_sources
from cupycorr.cuda.cost import Device
from cupycorr.layer import Layer

pytestmark = test_host.pytestmark
DEFAULTS = "spatial-correlation-sampler's defaults"
MIXED = "everything differs per axis"
SHARED = "DYNAMIC_SHARED(accumulator, shared);"


class Bug(NamedTuple):
    """A change of the sources that some check must notice."""

    old: str
    new: str
    case: str | tuple = MIXED
    device: Device = SM_75
    plain: bool = False
    check: str = "correct"
    """"correct": `verify.check`; "finite": values that are not; "tangent": of differences; or a
    dtype that is rounded to."""
    similarity: str = "product"


SEVERAL_GROUPS = ((1, 3, 9, 40), Layer(Geometry(patch_size=(3, 5), dilation_patch=(1, 2))))
ADVANCE_ROWS = ((1, 40, 30, 40), Layer(Geometry(patch_size=(9, 9), stride=2)))
MANY_ROWS = ((1, 40, 20, 16), Layer(Geometry(patch_size=9)))
MANY_CHANNELS = ((1, 64, 12, 40), Layer(Geometry(patch_size=3)))
SHARED_CHANNELS = ((1, 64, 4, 8), Layer(Geometry(patch_size=(3, 21))))
# Steps whose source rows lie in the map, and others, below it and above, whose do not.
OUTSIDE = ((1, 40, 6, 10), Layer(Geometry(patch_size=(15, 9))))

BUGS = {
    # device.cuh
    "a pixel too many is inside": Bug(
        "position && position < size", "position && position <= size"),
    "a lattice index too many": Bug("distance / step < count ?", "distance / step <= count ?"),
    "ties away from zero, bfloat16": Bug(
        "bits + 0x7fffu + (bits >> 16 & 1u)", "bits + 0x8000u", check="bfloat16"),
    "ties away from zero, half": Bug(
        "0xfffu + (magnitude >> 13 & 1u)", "0x1000u", check="float16"),
    "subnormal halves become zero": Bug(
        "__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u", "0u",
        check="float16"),
    # plain.cu
    "writes behind the last output": Bug("if (rest >= s.samples) return;", "", plain=True),
    "the second map's displacement has the wrong sign": Bug(
        "which == 1 ? y + dy : y - dy", "y + dy", plain=True),
    "pairs that no tap touches": Bug(
        "if (!compared) continue;", "", "stride", plain=True, check="finite"),
    # taps.cu
    "the wrong tap": Bug("x * stride_x;", "x * stride_x + 1;", DEFAULTS),
    "a dilation left out": Bug("i * dilation_y, stride_y", "i, stride_y", "dilated window"),
    "a column of the gradient left out": Bug("if (x >= 0) sum", "if (x > 0) sum", DEFAULTS),
    # staging.cuh
    "no wait for copies": Bug("  host_wait_for_copies();", "", device=SM_80),
    "phases and columns exchanged": Bug(
        "column % PHASES * PHASE_PITCH + column / PHASES",
        "column / PHASES * PHASE_PITCH + column % PHASES", SEVERAL_GROUPS),
    "shared memory is not cleared": Bug("i < count; i += THREADS * words", "i < 0; i += 1"),
    # product.cu
    "no barrier between stores and use": Bug(
        "land(buffer);\n    __syncthreads();", "land(buffer);"),
    "no barrier between clearing and stores": Bug(
        "buffer_words, thread);\n  __syncthreads();", "buffer_words, thread);", device=SM_80),
    "no barrier between use and results": Bug(
        "q0 += slices) {\n    __syncthreads();", "q0 += slices) {"),
    "no barrier between results and stores": Bug(
        "__syncthreads();\n#pragma unroll 1\n    for (int i", "for (int i"),
    "positions of the wrong lane": Bug(
        "+ phase) * pitch1 + group * positions", "+ group) * pitch1 + phase * positions",
        SEVERAL_GROUPS),
    "a partial last chunk left out": Bug(
        "c < s.channels; c += chunk", "c + chunk <= s.channels; c += chunk", "33 channels"),
    "results of the wrong strip": Bug(
        "trimmed ? numbers[at] : strip0 + at,", "strip0 + (at + 1) % strips,", SEVERAL_GROUPS),
    "strips of displacements that have none": Bug(
        "displaced.first(row) + p) * q_groups", "p) * q_groups", MANY_ROWS),
    "displacements that have strips left out": Bug(
        "quotient(height - y2) - before", "quotient(height - y2 - 1) - before", MANY_ROWS),
    "zeros over results": Bug("k < before ? k : k + present", "k", MANY_ROWS),
    "rows that begin with a block not zeroed": Bug("row0 + begun", "row0 + 1", MANY_ROWS),
    "results of the wrong number": Bug(
        "numbers[at] : strip0", "numbers[(at + 1) % strips] : strip0", MANY_ROWS),
    "columns advance by one": Bug("two[lead + advance_x * m + q]", "two[lead + m + q]", "stride"),
    "a result behind the row": Bug("v >= s.lattice_width", "v > s.lattice_width"),
    "products with what is outside": Bug(
        "counts ? values[m] * scale : accumulator(0)", "values[m] * scale", "odd patch",
        check="finite"),
    "sums that are not finite taken for finite": Bug(
        "not_finite += values[m]", "not_finite = values[m]", "FlowNetC", check="finite"),
    "the sums of one group of channels": Bug(
        "values[m] += more[m]", "values[m] = more[m]", SHARED_CHANNELS),
    "only some displacements stored": Bug(
        "sharers == 1 ? 0 : i / places", "0", SHARED_CHANNELS),
    "displacements stored over others": Bug(
        "next += sharers * cost_plane", "next += cost_plane", SHARED_CHANNELS, SM_80),
    "results of phases exchanged": Bug(
        "to[m * PHASES + phase] = pack", "to[m + of_phase * phase] = pack",
        ((1, 20, 9, 16), Layer(Geometry(patch_size=(3, 5), dilation_patch=(1, 2))))),
    # product_adjoint.cu
    "no barrier between stores and use of gradients": Bug(
        "__syncthreads();\n    if (ahead && next < patch_y)", "if (ahead && next < patch_y)"),
    "no barrier between use and results of gradients": Bug(
        "k0 += slices) {\n    __syncthreads();", "k0 += slices) {"),
    "the wrong row after wrapping around": Bug(
        "p = j + slot(j, r) * patch_y", "p = j + slot(j, r) * (patch_y - 1)", MANY_ROWS),
    "the last source row left out": Bug(
        "i < source_rows && (l1", "i < source_rows - 1 && (l1", MANY_ROWS),
    "rows skewed by one, not by the advance": Bug(
        "behind = advance_y * r - j;", "behind = r - j;", ADVANCE_ROWS),
    "the source row that has not wrapped around": Bug(
        "Rows::slot(j, thread.row) * source_words", "0", MANY_ROWS),
    "words of G copied where only the first exists": Bug(
        "return first || last;", "return first;", MANY_ROWS),
    "words of G beside the map": Bug(
        "ragged = ragged || first != last;", "", MANY_ROWS, check="finite"),
    "words of G beside the map, copied asynchronously": Bug(
        "ragged = ragged || first != last;", "", MANY_ROWS, SM_80, check="finite"),
    "words of G zeroed before they land": Bug(
        "if (asynchronous || upstream_asynchronous) wait_for_copies();\n    if (upstream",
        "if (upstream", MANY_ROWS, SM_80),
    "the second map's displacements counted forwards": Bug(
        "which == 1 ? q : patch_x - 1 - q", "q", "even patch"),
    "rows between the targets": Bug("below * s.width, zeros", "below * s.width, rounded", "stride"),
    "rows before the first target": Bug("above = 0; above < y", "above = 0; above < 0", DEFAULTS),
    "pixels before the first target": Bug("m0 == 0 ? 0 : first_x", "first_x", DEFAULTS),
    "channels stored over others": Bug(
        "to += sharers * plane", "to += plane", ((1, 64, 30, 60), Layer(Geometry(patch_size=9)))),
    "columns between the targets": Bug(
        "x >= first_x && (x - first_x) % step_x == 0", "x >= first_x", "stride"),
    "sums of targets off the lattice": Bug(
        "(which == 2 || columns_of.on_lattice(columns_of.v0 + column + k))", "true",
        check="finite"),
    # absolute differences
    "terms with one position outside left out": Bug(
        "l1 ? !row1 && !row2 : !row1 || !row2", "!row1 || !row2",
        plain=True, similarity="l1"),
    "columns outside left out": Bug(
        "l1 ? !exists1 && !exists2 : !exists1 || !exists2", "!exists1 || !exists2",
        plain=True, similarity="l1"),
    "gradients of terms with a row outside left out": Bug(
        "if (!l1 && !inside(other_y", "if (!inside(other_y", plain=True, similarity="l1"),
    "gradients of terms with a column outside left out": Bug(
        "if (!l1 && !exists)", "if (!exists)", plain=True, similarity="l1"),
    "what is read outside is not 0": Bug(
        "exists ? widen(map[at]) : accumulator(0)", "widen(map[at])",
        plain=True, similarity="l1"),
    "the sign of 0 is 1": Bug("own > other ? 1 : 0", "own >= other ? 1 : 0", similarity="l1"),
    "the sign of 0 is -1, in plain kernels": Bug(
        "own < other ? 1 : 0", "own <= other ? 1 : 0", plain=True, similarity="l1"),
    "the sign of NaN is 1": Bug(
        "own > other ? 1 : 0", "!(own <= other) ? 1 : 0", check="finite", similarity="l1"),
    "the second gradient of the first map's values": Bug(
        "map = (which == 1 ? fmap1 : fmap2)", "map = fmap1", similarity="l1"),
    "the second gradient of the first map's values, in plain kernels": Bug(
        "own = which == 1 ? fmap1 : fmap2", "own = fmap1", plain=True, similarity="l1"),
    "differences with a sign": Bug("magnitude(one - two)", "one - two", similarity="l1"),
    "sums with a position outside left out": Bug(
        "l1 || not_finite == 0", "not_finite == 0", check="finite", similarity="l1"),
    "a row outside is not zeroed": Bug(
        "share_source.erase(words);", "", OUTSIDE, SM_80, similarity="l1"),
    "a row outside is not zeroed, through registers": Bug(
        "share_source.erase(words);", "", OUTSIDE, similarity="l1"),
    "only some of its words are zeroed": Bug(
        "put(shared + to[i] + k * at_once * ROW_PITCH, zeros);",
        "if (k == 0) put(shared + to[i], zeros);", OUTSIDE, SM_80, similarity="l1"),
    "G left out where its source is outside": Bug(
        "(l1 || source_exists(source_of(q, k)))", "source_exists(source_of(q, k))",
        similarity="l1"),
    "rows left out whose source is outside": Bug(
        "(l1 || inside(pixel(i), s.height))", "inside(pixel(i), s.height)",
        OUTSIDE, similarity="l1"),
    "steps left out whose sources are on the lattice": Bug(
        "(which == 1 || lattice_row(i) >= 0)", "(which == 1 && lattice_row(i) >= 0)",
        "window at the border", similarity="l1"),
    "targets of the wrong channel": Bug(
        "c * channel_groups + thread.channel_group;", "thread.channel_group * channels + c;",
        MANY_CHANNELS, similarity="l1"),
    "targets of the wrong phase": Bug(
        "positions + m) + thread.phase;", "positions + m);", SEVERAL_GROUPS, similarity="l1"),
    "a tangent of the first map alone": Bug(
        "value(tangent1, one, exists1) - value(tangent2, two, exists2)",
        "value(tangent1, one, exists1)", check="tangent"),
    "a tangent with the wrong sign": Bug(
        "value(tangent1, one, exists1) - value(tangent2, two, exists2)",
        "value(tangent2, two, exists2) - value(tangent1, one, exists1)", check="tangent"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _compiled_ahead(request):
    """Compile in the background what the selected tests will need."""
    requests = []
    for item in request.session.items:
        name = item.callspec.params.get("bug") if hasattr(item, "callspec") else None
        if item.module is request.module and name is not None:
            bug, patch = BUGS[name], (BUGS[name].old, BUGS[name].new)
            mode = "trace" if "race" in item.originalname else "run"
            requests += [(launch, mode, patch) for launch in launches(bug)]
    with host.compiling_ahead(requests):
        yield


def case(bug):
    shape, layer = TILED[bug.case] if isinstance(bug.case, str) else bug.case
    return shape, replace(layer, similarity="l1" if bug.check == "tangent" else bug.similarity)


def launches(bug):
    shape, layer = case(bug)
    if bug.check == "tangent":
        plan = cuda_plan.plan(("cost",), layer, shape, "float32", bug.device, tangent=True)
        return plan.launches
    return host.launches(shape, layer, "float32", bug.device, plain=bug.plain)


def is_caught(bug):
    """Whether a check fails, or the run itself, in some order of the threads.

    In a process of its own, since a write far outside may bring it down: that is caught too.
    """
    for launch in launches(bug):
        host.compiled(launch, patch=(bug.old, bug.new))
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        host._ahead.clear()  # what compiles ahead is a thread of the parent
        missed = True
        try:
            missed = not fails(bug)
        finally:
            os._exit(missed)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 1


def fails(bug):
    shape, layer = case(bug)
    for order in ORDERS:
        engine = host.host_engine(
            bug.device,
            order=order,
            plain=bug.plain,
            patch=(bug.old, bug.new),
        )
        try:
            if bug.check == "correct":
                if test_host.errors(engine, shape, layer):
                    return True
            elif bug.check == "finite":
                for special, oracle in test_host.SPECIAL:
                    for seed in range(5):
                        options = {"special": special * 3, "seed": seed}
                        got = test_host.results(engine, shape, layer, **options)
                        want = test_host.results(oracle(), shape, layer, **options)
                        if any(test_host.differences(got, want)):
                            return True
            elif bug.check == "tangent":
                rng = np.random.default_rng(0)
                arrays = rng.integers(-2, 3, (4, *shape)).astype(np.float64)
                options = {"order": order, "patch": (bug.old, bug.new)}
                got = host.tangent(bug.device, *arrays, layer, "float32", **options)
                want = definition.differences_tangent(*arrays, layer.geometry)
                if verify.difference(got, want):
                    return True
            elif test_host.rounding(engine, bug.check):
                return True
        except host.HostError:
            return True
    return False


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug):
    planted = BUGS[bug]
    assert any(planted.old in cuda_sources.source(launch) for launch in launches(planted))
    assert is_caught(planted)


@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug.startswith("no barrier")])
def test_a_missing_barrier_is_a_race_in_any_order(bug):
    planted = BUGS[bug]
    engine = host.host_engine(planted.device, mode="trace", patch=(planted.old, planted.new))
    with pytest.raises(host.HostError, match="data race"):
        test_host.results(engine, *case(planted))


# ---- what hostcuda.h promises to notice, each by a kernel that does it

MISTAKES = {
    "threads wait at different barriers": (
        SHARED, SHARED + " if (threadIdx.x) __syncthreads(); else\n __syncthreads();"),
    "a thread ended, others wait": (SHARED, SHARED + " if (threadIdx.x == 3) return;"),
    "copies that it never waited for": ("  host_wait_for_copies();", ""),
    "which is not aligned": ("host_copy_async(to,", "host_copy_async(to + 1,"),
    "of shared memory": ("host_copy_async(to,", "host_copy_async(to + (1 << 20),"),
    "which is in no array": ("host_copy_async(to, from", "host_copy_async(to, to"),
    "where a copy is on its way": (
        "host_copy_async(to, from, BYTES);", "host_copy_async(to, from, BYTES); *to = 0;"),
    "an access that is not aligned": (
        SHARED, SHARED + " accumulator four[4]; load_words(four, shared + 1);"),
    "a write behind shared memory": (SHARED, SHARED + " shared[shared_words] = 0;"),
    "a write before fmap1": (SHARED, "const_cast<element*>(fmap1)[-1] = 0; " + SHARED),
    "a write behind cost": (
        SHARED, "cost[441 * s.lattice_height * s.lattice_width / 9] = 0; " + SHARED),
    "a write to fmap2, which is only read": (
        SHARED, "const_cast<element*>(fmap2)[5] = 77; " + SHARED),
}  # fmt: skip
VICTIM = TILED["FlowNetC"]


def forward(engine):
    shape, layer = VICTIM
    one, two = np.random.default_rng(0).standard_normal((2, *shape))
    return engine.cost(one, two, layer, "float32")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(mistake):
    with pytest.raises(host.HostError, match=mistake):
        forward(host.host_engine(SM_80, patch=MISTAKES[mistake]))


def test_a_trace_notices_a_read_beside_an_array():
    patch = (SHARED, f"{SHARED} if (fmap1[-1] > 0) shared[0] = 0;")
    with pytest.raises(host.HostError, match="an access beside array 0"):
        forward(host.host_engine(SM_80, mode="trace", patch=patch))


def test_a_kernel_that_does_not_compile_is_no_bug_that_was_caught():
    with pytest.raises(RuntimeError, match="not_declared"):
        forward(host.host_engine(SM_80, patch=(SHARED, "not_declared;")))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("threads, of a kernel for up to", lambda launch: {"threads": launch.threads + 1}),
        ("bytes instead of", lambda launch: {"sizes": launch.sizes[:-1]}),
        ("arguments, of a kernel", lambda launch: {"arrays": launch.arrays[:-1]}),
    ],
    ids=["too many threads", "a field too few", "an argument too few"],
)
def test_a_launch_that_does_not_fit_its_kernel_is_noticed(message, change):
    def planned(plan):
        launches = (launch._replace(**change(launch)) for launch in plan.launches)
        return plan._replace(launches=tuple(launches))

    with pytest.raises(host.HostError, match=message):
        forward(host.host_engine(SM_80, planned=planned))


@pytest.mark.parametrize(
    ("message", "statement"),
    [
        ("heap-buffer-overflow", "shared[shared_words] = 0;"),
        ("an index out of bounds", "accumulator two[2]; two[threadIdx.x + 1] = shared[0];"),
        ("overflow of a sum", "int most = 2147483647; most += threadIdx.x ? s.width : s.height;"),
    ],
    ids=["an address", "an index", "an overflow"],
)
def test_sanitizers_notice_a_mistake(message, statement):
    patch = (SHARED, f"{SHARED} {statement}")
    for launch in host.launches(*VICTIM, "float32", SM_80)[:1]:
        host.compiled(launch, "sanitize", patch)
    script = (
        "import host, test_host_bugs as t\n"
        f"t.forward(host.host_engine(host.SM_80, mode='sanitize', patch={patch!r}))"
    )
    code, said = test_host.run_under_sanitizers(script)
    assert code
    assert message in said


def test_the_definition_of_tests_agrees_with_the_oracle_on_what_is_not_finite():
    # Both decide what is caught above.
    shape, layer = TILED["odd patch"]
    got, want = (
        test_host.results(engine, shape, layer, special=(np.nan,))
        for engine in (definition.engine(), verify.numpy_engine())
    )
    assert not any(test_host.differences(got, want))
