"""The tables of kernels/README.md are those that the plans give."""

import re

import kernel_tables
import pytest
from devices import DEVICES, LAYERS
from kernel_costs import FIGURES, counts, products, wavefronts
from kernel_tables import COMPILED, PASSES, PLAIN, README, TABLED, table, text

PAGE = README.read_text(encoding="utf-8")
NEWER = "plans changed: run python tests/support/kernel_tables.py"


@pytest.mark.parametrize("name", PLAIN)
def test_the_page_shows_what_the_plans_give(name):
    assert table(PAGE, name)[0] == text(PLAIN[name]()), NEWER


@pytest.mark.parametrize("name", [name for name in COMPILED if name.startswith("code")])
def test_the_page_shows_every_layer_and_gpu_compiled(name):
    rows = [row.split(" | ")[:2] for row in table(PAGE, name)[0].splitlines()[2:]]
    assert rows == [[f"| {layer}", gpu] for layer in TABLED for gpu in FIGURES]


def test_the_page_shows_differences_on_every_gpu_compiled():
    rows = [row.split(" | ")[:2] for row in table(PAGE, "l1")[0].splitlines()[2:]]
    assert rows == [[f"| {gpu}", which] for gpu in FIGURES for which in PASSES]


def test_the_page_shows_the_tiles_that_are_planned_for_differences():
    for row in table(PAGE, "l1")[0].splitlines()[2:]:
        gpu, which, *tile = row.removeprefix("| ").split(" | ")[:4]
        planned = kernel_tables.launches("FlowNetC", gpu, which, "l1")[0]
        assert tile == list(kernel_tables._tile_text(planned)[:2]), NEWER


def test_the_figures_of_the_page_are_those_of_the_model():
    for name, figures in FIGURES.items():
        device = DEVICES[name]
        row = [
            f"{device.capability / 10}", device.multiprocessors, figures.gigahertz,
            device.multiply_adds, device.shared_rate, figures.dram, figures.level2,
        ]  # fmt: skip
        line = next(
            line for line in PAGE.splitlines() if re.match(rf"\| {name} [|(].*\d \|$", line)
        )
        assert line.split(" | ")[1:] == [*map(str, row[:-1]), f"{row[-1]} |"]


def test_a_table_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="must hold the markers"):
        table(PAGE.replace("<!-- bytes -->", ""), "bytes")


def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(README), "exec"), {})
    assert "product_cost" in (tmp_path / "product.cu").read_text()


@pytest.mark.parametrize(
    ("addresses", "strict", "merged"),
    [
        ([4 * i for i in range(32)], 4, 4),  # neighbours: each bank once per quarter
        ([0] * 32, 4, 2),
        ([4 * (i // 2) for i in range(32)], 4, 2),
        ([32 * i for i in range(32)], 32, 32),  # one bank
        ([8 * i for i in range(32)], 8, 8),  # every other one
        ([0] * 8 + [None] * 24, 1, 1),
    ],
    ids=["neighbours", "one word", "pairs", "one bank", "every other bank", "idle lanes"],
)
def test_wavefronts_of_known_accesses(addresses, strict, merged):
    assert wavefronts(addresses) == (strict, merged)


@pytest.mark.parametrize("layer", TABLED)
@pytest.mark.parametrize("which", ["forward", "gradients"])
def test_blocks_do_at_least_the_work_of_the_layer(layer, which):
    for gpu in FIGURES:
        for launch in filter(kernel_tables._is_tiled, kernel_tables.launches(layer, gpu, which)):
            work = counts(launch, LAYERS[layer][0][1]).useful * launch.blocks / products(layer)
            assert 1 <= work < 1.6
