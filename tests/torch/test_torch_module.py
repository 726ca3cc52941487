"""The torch module, and torch's threads and processes."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
from cases import GEOMETRIES
from tensors import difference, integers, pair

import cupycorr
from cupycorr import Geometry, SpatialCorrelationSampler

torch = pytest.importorskip("torch")

from cupycorr.modules import PARAMETERS  # noqa: E402

# Large enough for the engine to use its threads.
LARGE, LARGE_GEOMETRY = (1, 32, 40, 50), Geometry(patch_size=9)


class TestModule:
    PARAMETERS = (3, (3, 5), 2, (1, 2), (1, 2), 2)

    def test_it_computes_what_the_function_computes(self):
        maps = pair()
        got = SpatialCorrelationSampler(*self.PARAMETERS)(*maps)
        want = cupycorr.spatial_correlation_sample(*maps, *self.PARAMETERS)
        assert not difference(got, want)

    def test_its_arguments_have_the_defaults_of_the_function(self):
        got = SpatialCorrelationSampler()(*pair())
        want = cupycorr.spatial_correlation_sample(*pair())
        assert not difference(got, want)

    def test_it_has_nothing_to_learn_or_to_load(self):
        module = SpatialCorrelationSampler(*self.PARAMETERS)
        assert not module.state_dict()
        module.load_state_dict({}, strict=True)

    def test_it_keeps_its_arguments_as_given(self):
        names = ["kernel_size", "patch_size", "stride", "padding", "dilation", "dilation_patch"]
        module = SpatialCorrelationSampler(*self.PARAMETERS)
        assert tuple(getattr(module, name) for name in names) == self.PARAMETERS

    @pytest.mark.parametrize(
        ("arguments", "shown"),
        [((), ""), ((3, 21, 1, 0, 1, 2), "kernel_size=3, patch_size=21, dilation_patch=2")],
    )
    def test_it_shows_the_arguments_that_are_not_defaults(self, arguments, shown):
        assert repr(SpatialCorrelationSampler(*arguments)) == f"SpatialCorrelationSampler({shown})"

    @pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda module: pickle.loads(
        pickle.dumps(module))], ids=["copy", "deepcopy", "pickle"])  # fmt: skip
    def test_a_copy_computes_the_same(self, duplicate):
        module, maps = SpatialCorrelationSampler(*self.PARAMETERS), pair()
        want = module(*maps)
        other = duplicate(module)
        assert repr(other) == repr(module)
        assert not difference(other(*maps), want)

    def test_it_takes_over_the_state_of_a_module_that_kept_its_arguments_alone(self):
        module, maps = SpatialCorrelationSampler(*self.PARAMETERS), pair()
        state = vars(torch.nn.Module()) | dict(zip(PARAMETERS, self.PARAMETERS, strict=True))
        other = SpatialCorrelationSampler.__new__(SpatialCorrelationSampler)
        other.__setstate__(state)
        assert repr(other) == repr(module)
        assert not difference(other(*maps), module(*maps))

    def test_it_survives_torch_save(self, tmp_path):
        module = SpatialCorrelationSampler(*self.PARAMETERS)
        torch.save(module, tmp_path / "module.pt")
        assert repr(torch.load(tmp_path / "module.pt", weights_only=False)) == repr(module)

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [({"patch_size": 0}, ValueError), ({"stride": 1.5}, TypeError)],
    )
    def test_bad_parameters_are_refused_at_once(self, arguments, error):
        with pytest.raises(error, match=next(iter(arguments))):
            SpatialCorrelationSampler(**arguments)

    def test_bad_maps_are_refused(self):
        with pytest.raises(ValueError, match="must have equal shapes"):
            SpatialCorrelationSampler()(integers(), integers((2, 3, 5, 7)))


def large_gradients():
    """Return the cost and both gradients of a case that keeps all threads of the engine busy."""
    maps = pair(LARGE, "float32", differentiable=True)
    cost = cupycorr.correlation(*maps, LARGE_GEOMETRY)
    return (cost.detach(), *torch.autograd.grad(cost.sum(), maps))


class Costs(torch.utils.data.Dataset):
    """Computes in the process that loads."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return large_gradients()


@pytest.fixture
def deterministic():
    """Make torch deterministic, and fill what it allocates with NaN, for the time of a test."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("deterministic")
class TestDeterministicMode:
    def test_it_is_honoured_by_the_same_bits_without_an_error(self):
        once, again = large_gradients(), large_gradients()
        assert not difference(once, again)

    @pytest.mark.parametrize("case", GEOMETRIES)
    def test_every_value_is_written(self, case):
        shape, geometry = GEOMETRIES[case]
        maps = pair(shape, differentiable=True)
        cost = cupycorr.correlation(*maps, geometry)
        for result in (cost, *torch.autograd.grad(cost.sum(), maps)):
            assert not result.isnan().any()


class TestProcessesAndThreads:
    def test_several_threads_may_compute_at_once(self):
        want = large_gradients()
        with ThreadPoolExecutor(4) as pool:
            results = [pool.submit(large_gradients) for _ in range(4)]
            for result in results:
                got = result.result(timeout=60)
                assert not difference(got, want)

    def test_forked_workers_compute_after_their_parent_did(self):
        want = large_gradients()
        loader = torch.utils.data.DataLoader(
            Costs(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
        )
        for got in loader:
            assert not difference(got, want)


def test_errors_name_the_modules_own_arguments():
    one, other = torch.ones(1, 2, 5, 6), torch.ones(1, 2, 5, 7)
    with pytest.raises(ValueError, match="input1 and input2 must have equal shapes"):
        SpatialCorrelationSampler()(one, other)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_what_is_computed_with_and_cannot_be_changed(name):
    module = SpatialCorrelationSampler(3, (5, 3), padding=1)
    assert (module.kernel_size, module.patch_size, module.dilation_patch) == (3, (5, 3), 1)
    with pytest.raises(AttributeError, match=f"{name} must not be changed, got 2"):
        setattr(module, name, 2)
