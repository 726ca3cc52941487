"""The model of what the kernels cost: its targets, and what kernels/README.md says of it."""

import random
import re
from pathlib import Path

import kernel_costs
import nvrtc
import pytest
from devices import DEVICES, LAYERS
from kernel_costs import FIGURES, PASSES, counts, floor, is_tiled, microseconds, moved

from cupycorr import Geometry
from cupycorr.cuda import plain as cuda_plain
from cupycorr.cuda import plan as cuda_plan
from cupycorr.cuda import sources as cuda_sources
from cupycorr.cuda.cost import wavefronts
from cupycorr.layer import Layer

README = Path(__file__).resolve().parents[2] / "kernels" / "README.md"
PAGE = README.read_text(encoding="utf-8")
MISSING = nvrtc.missing(nvrtc.COMPILERS[0]) or nvrtc.missing(nvrtc.DISASSEMBLER)
compiles = [
    pytest.mark.slow,
    pytest.mark.skipif(MISSING is not None, reason=str(MISSING)),
]
# FlowNetC is bound by arithmetic, the default layer by memory.
MOST = {"forward": 2.0, "gradients": 2.5}
# The level 2 of a 4090 is slow beside its arithmetic; the page tells it.
MOST_ON_4090 = {"forward": 2.1, "gradients": 2.65}
MOST_BYTES = 1.3


def random_layer(seed):
    """Return the shape of some maps, and a geometry that fits them."""
    chance = random.Random(seed)
    geometry = Geometry(
        patch_size=(chance.choice((1, 3, 5, 9, 13, 21)), chance.choice((3, 5, 9, 13, 21, 41))),
        stride=chance.choice((1, 1, 2)),
        dilation_patch=chance.choice((1, 1, 2)),
    )
    channels, height, width = (
        chance.choice(sizes)
        for sizes in ((16, 32, 64, 96, 128, 196, 256), (8, 16, 24, 48, 64), (12, 28, 48, 64, 112))
    )
    return (chance.choice((1, 2, 4, 8)), channels, height, width), geometry


def over_the_floor(layer, gpu, which):
    """Return a pass's predicted time over the floor of arithmetic."""
    return microseconds(layer, gpu, which) / floor(layer, gpu, PASSES[which]).arithmetic


class TestTargets:
    pytestmark = compiles

    @pytest.mark.parametrize("gpu", ["2070S", "A100", "4090", "H100"])
    @pytest.mark.parametrize("which", PASSES)
    def test_flownetc_takes_little_more_than_its_multiply_adds(self, gpu, which):
        most = (MOST_ON_4090 if gpu == "4090" else MOST)[which]
        assert 1 < over_the_floor("FlowNetC", gpu, which) <= most

    def test_twice_the_wavefronts_miss_the_target(self, monkeypatch):
        microseconds.cache_clear()
        right = kernel_costs.counts
        monkeypatch.setattr(
            kernel_costs,
            "counts",
            lambda *job: right(*job)._replace(wavefronts=3 * right(*job).wavefronts),
        )
        assert over_the_floor("FlowNetC", "2070S", "forward") > MOST["forward"]
        microseconds.cache_clear()


class TestChoice:
    pytestmark = compiles
    RANKS = (*range(16), 18, 20, 22, 24, 28, 32, 40, 48)

    def candidates(self, layer, gpu, result):
        """Return launches of tiles of some ranks, the chosen one first, and their channels."""
        shape, geometry = LAYERS[layer] if isinstance(layer, str) else random_layer(layer)
        plans = (
            cuda_plan.plan((result,), Layer(geometry), shape, "float32", DEVICES[gpu], rank=rank)
            for rank in self.RANKS
        )
        found = [launch for plan in plans for launch in plan.launches if is_tiled(launch)]
        return found, shape[1]

    def least(self, launch, channels, gpu):
        """Return what a launch takes at least, whatever the compiler makes of it."""
        count, tile = counts(launch, channels), kernel_costs.Tile(launch)
        copies = count.staged / max(tile.vector, getattr(tile, "upstream_vector", 1))
        fewest = (count.executed + 32 * count.loads + copies) / launch.threads
        sums = tile.positions * (tile.displacements if tile.is_product else tile.channels)
        codes = (kernel_costs.Machine(registers, 1, fewest) for registers in range(sums, 256, 8))
        return min(kernel_costs.predict(launch, count, code, gpu, 0).microseconds for code in codes)

    def compiled(self, launch, channels, gpu):
        """Return the time of a launch by what the compiler makes of it."""
        code = kernel_costs.machine(launch, channels, DEVICES[gpu].capability)
        return kernel_costs.predict(launch, counts(launch, channels), code, gpu, 0).microseconds

    @pytest.mark.parametrize(
        "case",
        [
            ("FlowNetC", "A100", "cost"),
            ("PWC-Net 3", "A100", "grad_fmap1"),
            ("PWC-Net 5", "H100", "cost"),
            ("PWC-Net 6", "2070S", "grad_fmap2"),
            ("default", "A100", "grad_fmap1"),
            ("DispNetC", "4090", "grad_fmap2"),
            (1, "2070S", "grad_fmap1"),
            (2, "H100", "grad_fmap2"),
            (4, "H100", "cost"),
            (29, "A100", "cost"),
        ],
        ids=lambda case: " ".join(map(str, case)),
    )
    def test_the_chosen_tile_is_about_the_fastest_by_what_is_compiled(self, case):
        (chosen, *others), channels = self.candidates(*case)
        gpu, time = case[1], self.compiled(chosen, channels, case[1])
        rivals = [one for one in others if 1.1 * self.least(one, channels, gpu) < time]
        assert all(time <= 1.1 * self.compiled(one, channels, gpu) for one in rivals)
        # Else any choice would do.
        assert 1.1 * time < max(self.least(one, channels, gpu) for one in others)

    def test_a_bad_choice_is_found(self):
        found, channels = self.candidates("PWC-Net 5", "H100", "cost")
        best, *_, worst = sorted(found, key=lambda one: self.least(one, channels, "H100"))
        assert self.compiled(worst, channels, "H100") > 1.1 * self.compiled(best, channels, "H100")


class TestPlain:
    pytestmark = compiles

    @pytest.mark.parametrize("gpu", ["2070S", "A100", "H100"])
    def test_the_plain_kernels_do_what_the_model_of_them_counts(self, gpu):
        shape, geometry = LAYERS["PWC-Net 4"]
        for result, registers, at_once, each in (
            ("cost", cuda_plain.REGISTERS, cuda_plain.AT_ONCE, cuda_plain.TERM),
            ("grad_fmap1", cuda_plain.GRADIENT_REGISTERS, 4, cuda_plain.GRADIENT_TAP),
            ("grad_fmap2", cuda_plain.GRADIENT_REGISTERS, 4, cuda_plain.GRADIENT_TAP),
        ):
            (launch,) = cuda_plan.plan(
                (result,), Layer(geometry), shape, "float32", DEVICES[gpu], plain=True
            ).launches
            kernel = nvrtc.compile_kernel(
                cuda_sources.source(launch), launch.kernel, DEVICES[gpu].capability
            )
            loop = nvrtc.innermost(kernel)
            assert kernel.registers <= registers
            assert loop["LDG"] == at_once * (2 if result == "cost" else 1)
            assert loop.total() / at_once == pytest.approx(each, rel=0.1)


@pytest.mark.parametrize("which", PASSES)
def test_the_default_layer_moves_little_more_than_each_tensor_once(which):
    assert moved("default", which) <= MOST_BYTES * floor("default", "H100", PASSES[which]).bytes


def table():
    """Return the page's predictions: (layer, pass) to {GPU: (microseconds, over the floor)}."""
    rows = re.findall(r"^\| (\S.*?) \| (forward|gradients) \| (.*) \|$", PAGE, re.MULTILINE)
    head = re.search(r"^\| layer \| pass \| (.*) \|$", PAGE, re.MULTILINE)[1].split(" | ")
    cells = {(layer, which): row.split(" | ") for layer, which, row in rows}
    return {
        key: {gpu: tuple(map(float, cell.rstrip("x").split(", "))) for gpu, cell in zip(
            head, row, strict=True)}
        for key, row in cells.items()
    }  # fmt: skip


def test_the_page_shows_three_layers_on_three_gpus():
    assert set(table()) == {
        (layer, which) for layer in ("FlowNetC", "PWC-Net 3", "default") for which in PASSES
    }
    assert all(set(row) == {"2070S", "A100", "H100"} for row in table().values())


class TestPage:
    pytestmark = compiles

    @pytest.mark.parametrize("key", table(), ids=" ".join)
    def test_the_page_shows_what_the_model_predicts(self, key):
        # Another version of the compiler may schedule other instructions: hence the 5 %.
        for gpu, (time, ratio) in table()[key].items():
            predicted = microseconds(key[0], gpu, key[1])
            least = floor(key[0], gpu, PASSES[key[1]])
            assert time == pytest.approx(predicted, rel=0.05)
            assert ratio == pytest.approx(predicted / max(least[:2]), rel=0.05)


def test_the_figures_of_the_page_are_those_of_the_model():
    for name, figures in FIGURES.items():
        device = DEVICES[name]
        row = [
            f"{device.capability / 10}", device.multiprocessors, figures.gigahertz,
            device.multiply_adds, device.shared_rate, figures.dram, device.level2_rate,
        ]  # fmt: skip
        line = next(
            line for line in PAGE.splitlines() if re.match(rf"\| {name} [|(].*\d \|$", line)
        )
        assert line.split(" | ")[1:] == [*map(str, row[:-1]), f"{row[-1]} |"]


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(README), "exec"), {})
    assert "product_cost" in (tmp_path / "product.cu").read_text()


@pytest.mark.parametrize(
    ("units", "wanted"),
    [
        ([*range(32)], 4),  # neighbours: each bank once per quarter
        ([0] * 32, 2),
        ([i // 2 for i in range(32)], 2),
        ([8 * i for i in range(32)], 32),  # one bank
        ([2 * i for i in range(32)], 8),  # every other one
        ([0] * 8 + [None] * 24, 1),
    ],
    ids=["neighbours", "one word", "pairs", "one bank", "every other bank", "idle lanes"],
)
def test_wavefronts_of_known_accesses(units, wanted):
    assert wavefronts(units) == wanted


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer != "stride 3"])
@pytest.mark.parametrize("which", PASSES)
def test_blocks_do_at_least_the_work_of_the_layer(layer, which):
    for gpu in FIGURES:
        for launch in filter(is_tiled, kernel_costs.launches(layer, gpu, which)):
            useful = counts(launch, LAYERS[layer][0][1]).useful * launch.blocks
            tile = kernel_costs.Tile(launch)
            present = tile.strips / (tile.strips + tile.empty) if tile.is_product else 1
            assert 1 <= useful / present / kernel_costs.products(layer) < 1.6
