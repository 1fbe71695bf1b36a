"""Bounded mode's kernels in the interpreter, beside the solver on the CPU: the same bits."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from megatron_maxscore.flow import device, fused, rounds, sample, solve
from megatron_maxscore.flow.device import solver as launcher
from tests.draws import unequal_capacities
from tests.simulated_rank import Simulated
from tools.workloads import FAMILIES, workload

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ALLOWED = [family for family in FAMILIES if family != "forbidden arcs"]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill new buffers with what no kernel may take for a result."""
    original = torch.empty

    def empty(*size, **options):
        tensor = original(*size, **options)
        poison = float("nan") if tensor.is_floating_point() else -77
        return tensor.fill_(poison)

    monkeypatch.setattr(torch, "empty", empty)


@pytest.fixture
def small_samples(monkeypatch):
    """Let few rows be enough for a sample."""
    for module in (sample, launcher):
        monkeypatch.setattr(module, "wanted_sample", lambda experts, topk: 48)


def on_device(scores, topk, **arguments):
    """Solve in the kernels; tensors are on the CPU, where the interpreter works."""
    with mock.patch.object(device, "is_device", lambda tensor: True):
        return solve(scores, topk, mode="bounded", **arguments)


def assert_same(scores, topk, **arguments):
    """Assert the CPU's bits, and return the solution."""
    expected = solve(scores, topk, mode="bounded", **arguments)
    found = on_device(scores, topk, **arguments)
    for name in ("experts", "prices", "loads"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("objective", "bound", "gap"):
        one, other = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-14)
    assert found.bad == 0 and found.converged == expected.converged
    return found


@pytest.mark.parametrize(
    ("family", "slack"),
    [(family, 0) for family in ALLOWED]
    + [(family, 3) for family in ("iid", "skewed, sigma 4", "40 repeated tokens", "all equal")],
)
def test_same_bits_on_every_family(family, slack):
    work = workload(family, 200, 12, 3)
    capacity = work.capacity.clone()
    capacity[:slack] += 1
    other = workload(family, 200, 12, 3, batch=1)
    warm = solve(other.scores, 3, capacity=other.capacity).prices
    for prices in (None, warm):
        assert_same(work.scores, 3, capacity=capacity, prices=prices)


@pytest.mark.parametrize("family", ["iid", "skewed, sigma 4", "40 repeated tokens"])
def test_same_bits_with_a_sample(family, small_samples):
    work = workload(family, 260, 10, 2)
    for prices in (None, 0.1 * torch.randn(10), 1e6 * torch.randn(10)):
        assert_same(work.scores, 2, capacity=work.capacity, prices=prices)


@pytest.mark.parametrize(
    ("tokens", "experts", "topk"),
    [(1, 2, 1), (9, 2, 1), (70, 3, 2), (40, 64, 8), (17, 100, 7)],
)
@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_same_bits_at_odd_sizes(tokens, experts, topk, factor):
    scores = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens))
    assert_same(scores, topk, capacity_factor=factor)


def test_same_bits_with_many_experts(monkeypatch):
    # In one piece, which the interpreter has done sooner.
    monkeypatch.setattr(launcher, "_COSTS", 1 << 22)
    scores = torch.randn(12, 512, generator=torch.Generator().manual_seed(1))
    assert_same(scores, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    scores = torch.randn(60, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_same(scores, 2)


def test_padding_is_filled():
    scores = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    valid = torch.arange(50) % 5 != 0
    assert_same(scores, 2, valid=valid, fill_padding=True)


@pytest.mark.parametrize(("seed", "topk", "tight"), [(795, 2, False), (295, 3, True)])
def test_rounds_without_a_path(monkeypatch, seed, topk, tight):
    # So few rows in several classes that there is no path in some round, and then in one class.
    monkeypatch.setattr(rounds, "_UNITS_PER_CLASS", 1)
    steps = []
    step = fused.step

    def counted(key_CEE, *rest):
        moves = step(key_CEE, *rest)
        steps.append((key_CEE.shape[0] > 1, len(moves) > 0))
        return moves

    monkeypatch.setattr(fused, "step", counted)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(12, 5, generator=generator)
    capacity = unequal_capacities(12, 5, topk, tight, generator)
    assert_same(scores, topk, capacity=capacity)
    assert (True, False) in steps and (False, True) in steps


def test_prices_are_not_spread_after_the_last_sweep():
    # Of which the device would choose at other prices than those whose loads it has counted.
    generator = torch.Generator().manual_seed(132)
    scores = torch.randn(12, 5, generator=generator)
    capacity = unequal_capacities(12, 5, 2, False, generator)
    found = assert_same(scores, 2, capacity=capacity)
    assert (torch.bincount(found.experts.flatten(), minlength=5) == found.loads[0]).all()


def test_many_units_end_in_rounds_over_all_rows():
    # Where contested rows are not enough: most rows want the same experts, and loosely so.
    generator = torch.Generator().manual_seed(3)
    kind = torch.randint(3, (240,), generator=generator)
    scores = torch.randn(3, 16, generator=generator)[kind]
    scores = scores + 1e-3 * torch.randn(240, 16, generator=generator)
    launched = launcher._Launcher.run
    states = []

    def run(self, *arguments):
        launched(self, *arguments)
        states.append(self.state)

    with mock.patch.object(launcher._Launcher, "run", run):
        assert_same(scores, 4)
    assert states[0][launcher.layout.ALL_ROUNDS.value] > 0


@pytest.mark.parametrize("family", ["iid", "40 repeated tokens"])
def test_ranks_with_equally_many_rows_solve_the_whole(family):
    work = workload(family, 90, 8, 2)
    whole = solve(work.scores, 2, mode="bounded", capacity_factor=1.1)
    parts = list(work.scores.split(30))
    for rank in (0, 2):
        exchange = Simulated(parts, rank)
        known = dict(group=exchange, equal_rows=True, fill_padding=True)
        found = on_device(parts[rank], 2, capacity_factor=1.1, **known)
        own = slice(30 * rank, 30 * rank + 30)
        assert torch.equal(found.experts, whole.experts[own])
        assert torch.equal(found.prices, whole.prices) and found.gap == whole.gap
        for other in range(3):
            part = whole.experts[30 * other : 30 * other + 30]
            assert found.loads[other].tolist() == part.flatten().bincount(minlength=8).tolist()
        assert exchange.calls == ["arguments", "scores"]
    # What was compared once is not compared again.
    again = on_device(parts[2], 2, capacity_factor=1.1, **known)
    assert exchange.calls[2:] == ["scores"] and torch.equal(again.experts, found.experts)
    assert again.experts.untyped_storage().nbytes() == again.experts.nbytes, "others' are kept"
    known["prices"] = torch.stack([whole.prices] * 2, 1)[:, 1]  # not contiguous
    mask = torch.ones(30, dtype=torch.bool)
    warm = on_device(parts[2], 2, capacity_factor=1.1, valid=mask, **known)
    expected = solve(
        work.scores, 2, mode="bounded", capacity_factor=1.1, prices=whole.prices.contiguous()
    )
    assert torch.equal(warm.experts, expected.experts[60:])
    assert exchange.calls[3:] == ["arguments", "scores"], "with prices, new"
    with pytest.raises(ValueError, match="valid must be"):
        on_device(parts[2], 2, capacity_factor=1.1, valid=mask[:1], **known)


def test_ranks_that_may_differ_are_solved_on_the_cpu():
    parts = [torch.randn(10, 4)] * 2
    with mock.patch.object(device, "solve_bounded", side_effect=AssertionError):
        on_device(parts[0], 2, group=Simulated(parts, 0), fill_padding=True)
        # Another rank may have a mask, for which the kernels have no rows without experts.
        on_device(parts[0], 2, group=Simulated(parts, 0), equal_rows=True)
        with pytest.raises(AssertionError):
            on_device(parts[0], 2, group=Simulated(parts, 0), equal_rows=True, fill_padding=True)


def test_scores_that_are_not_finite_count_as_zero():
    scores = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    clean = scores.clone()
    for row, expert, value in ((3, 1, float("nan")), (3, 2, float("inf")), (20, 0, -float("inf"))):
        scores[row, expert], clean[row, expert] = value, 0.0
    found, expected = on_device(scores, 2), solve(clean, 2, mode="bounded")
    assert torch.equal(found.experts, expected.experts) and found.bad == 2


def test_what_kernels_cannot_do_is_done_on_the_cpu():
    scores = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    for arguments in (
        dict(scores=scores.double(), topk=2),
        dict(scores=scores, topk=4),
        dict(scores=scores, topk=2, valid=torch.arange(30) < 20),
        dict(scores=scores.reshape(3, 10, 4), topk=2),
    ):
        with mock.patch.object(launcher, "solve_bounded", side_effect=AssertionError):
            on_device(**arguments)


def test_capacities_are_checked():
    scores = torch.randn(10, 4)
    with pytest.raises(ValueError, match="capacities hold 16 assignments but 10 tokens"):
        on_device(scores, 2, capacity=4)
    with pytest.raises(ValueError, match=r"prices must be \(4,\)"):
        on_device(scores, 2, prices=torch.zeros(5))
    # On the device their shape is checked here, their values there.
    with pytest.raises(ValueError, match=r"capacity must be an int or \(4,\) int64"):
        on_device(scores, 2, capacity=torch.tensor([20]))
    for values in ([4, 4, 4, 4], [30, 30, -1, 30]):
        with pytest.raises(RuntimeError, match="capacity holds less"):
            on_device(scores, 2, capacity=torch.tensor(values))


class Waits(TorchDispatchMode):
    """Raises at operators that make the host wait, or whose result's size depends on values."""

    def __init__(self):
        super().__init__()
        self.names = set()

    forbidden = ("_local_scalar_dense", "nonzero", "masked_select", "_unique", "unique_dim")

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        self.names.add(name)
        assert not name.startswith(self.forbidden), f"{name} waits for the device"
        if name == "index":
            assert all(i is None or i.dtype != torch.bool for i in arguments[1]), "index by a mask"
        return function(*arguments, **(options or {}))


@pytest.fixture
def launches(monkeypatch):
    """Names of kernels launched; they run outside of dispatch modes, which do not see them."""
    names: list[str] = []

    class Counted:
        def __init__(self, kernel, name):
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid):
            def launch(*arguments, **options):
                names.append(self.name)
                with _disable_current_modes():
                    self.kernel[grid](*arguments, **options)

            return launch

    for module, kernels in (
        (launcher.sweeps, ("scan", "price_pass", "sample_sweeps")),
        (launcher.contested, ("nearest",)),
        (launcher.moves, ("move",)),
        (launcher.all_rows, ("move_all",)),
        (launcher.results, ("conclude",)),
    ):
        for name in kernels:
            monkeypatch.setattr(module, name, Counted(getattr(module, name), name))
    return names


@pytest.mark.parametrize("samples", [False, True])
def test_a_solve_is_thirteen_launches_and_waits_for_nothing(launches, samples, request):
    if samples:
        request.getfixturevalue("small_samples")
    work = workload("iid", 200, 8, 2)
    prices = 0.1 * torch.randn(8)
    on_device(work.scores, 2, capacity=50, prices=prices)
    counted = [len(launches)]
    launches.clear()
    with Waits() as mode:
        found = on_device(work.scores, 2, capacity=50, prices=prices)
    counted.append(len(launches))
    # No operator besides that would be a launch of its own.
    assert mode.names <= {"empty", "detach", "unbind", "select", "view", "fill_"}
    assert counted == [13, 13]
    assert launches.count("price_pass") == (7 if samples else 8)
    assert dataclasses.is_dataclass(found)


def test_waits_is_able_to_fail():
    for wait in (
        lambda t: t.sum().item(), lambda t: bool(t.any()), lambda t: t[t > 0], torch.nonzero
    ):  # fmt: skip
        with pytest.raises(AssertionError), Waits():
            wait(torch.ones(3))
