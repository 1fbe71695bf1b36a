"""The engine in Triton's interpreter: properties, the exact optimum, and the form in numba."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_maxscore.flow import certified, engine, solve
from megatron_maxscore.flow.device import layout
from megatron_maxscore.moe.groups import Groups
from tests.draws import unequal_capacities
from tests.kernels.watching import Watch
from tools.benchmarks.engine_model import Model
from tools.benchmarks.oracles import check_assignment, ortools_objective
from tools.benchmarks.workloads import FAMILIES, workload

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
ALLOWED = [family for family in FAMILIES if family != "forbidden arcs"]
DEGENERATE = ("peaked", "two-hot", "repeated", "clusters", "equal", "31 tokens", "1/90")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill new buffers with what no kernel may take for a result."""
    original = torch.empty

    def empty(*size, **options):
        tensor = original(*size, **options)
        poison = float("nan") if tensor.is_floating_point() else -77
        return tensor.fill_(poison)

    monkeypatch.setattr(torch, "empty", empty)


def bounded(scores, topk, **arguments):
    return solve(scores, topk, mode="bounded", **arguments)


def bar_of(family):
    if family == "all equal":
        return 0.0
    if any(name in family for name in DEGENERATE):
        return 1e-2
    # In so small a problem a single unit counts, 1.7e-3 of all; more so where scales differ.
    return 1e-3 if "scales" in family else 4e-4


def certificate(scores, topk, capacity, solution):
    """Return objective, bound and relative gap of a solution, in float64 on the host."""
    s = scores.double()
    x = torch.zeros_like(s).scatter_(1, solution.experts, 1.0)
    r = s - solution.prices.double()
    idle = capacity.clamp(max=len(s)) - x.sum(0)
    slack = (r.topk(topk, 1).values.sum(1) - (r * x).sum(1)).sum()
    difference = float(slack + (solution.prices.double() * idle).sum())
    spans = float((s.amax(1) - s.amin(1)).sum())
    objective = float((s * x).sum())
    return objective, objective + difference, difference / spans if spans else difference


def assert_sound(scores, topk, capacity, solution):
    """Assert that a solution is feasible and its certificate what it says."""
    total = check_assignment(
        solution.experts.numpy(), scores.float().numpy(), topk, capacity.numpy()
    )
    assert (
        solution.loads[0].tolist()
        == solution.experts.flatten().bincount(minlength=scores.shape[1]).tolist()
    )
    objective, bound, gap = certificate(scores.float(), topk, capacity, solution)
    wide = max(1.0, abs(objective))
    assert solution.objective.item() == pytest.approx(total, rel=1e-12, abs=1e-12)
    assert solution.bound.item() == pytest.approx(bound, rel=1e-9, abs=1e-12 * wide)
    assert solution.gap.item() == pytest.approx(gap, rel=1e-5, abs=1e-9)
    assert solution.bad == 0 and solution.converged == (solution.gap <= 1e-9)
    # By expert, then by row: what a stable sort of the experts says.
    order = solution.experts.flatten().sort(stable=True)
    rows = order.indices // topk
    assert solution.order.tolist() == [
        rows.tolist(),
        (rows * scores.shape[1] + order.values).tolist(),
    ]
    is_tight = int(capacity.clamp(max=len(scores)).sum()) == len(scores) * topk
    level = solution.prices.mean() if is_tight else solution.prices.min()
    assert abs(level.item()) <= 1e-5 * max(1.0, solution.prices.abs().max().item())


@pytest.mark.parametrize(
    ("family", "slack"),
    [(family, 0) for family in ALLOWED]
    + [(family, 3) for family in ("iid", "skewed, sigma 4", "40 repeated tokens", "all equal")],
)
def test_families(family, slack):
    work = workload(family, 200, 12, 3)
    capacity = work.capacity.clone()
    capacity[:slack] += 1
    exact = solve(work.scores, 3, capacity=capacity)
    other = workload(family, 200, 12, 3, batch=1)
    warm = solve(other.scores, 3, capacity=other.capacity).prices
    hostile = 1e6 * torch.randn(12, generator=torch.Generator().manual_seed(1))
    for prices in (warm, hostile) if slack or family == "iid" else (None, hostile):
        found = bounded(work.scores, 3, capacity=capacity, prices=prices)
        assert_sound(work.scores, 3, capacity, found)
        some = 1e-9 * (1 + abs(exact.objective.item()))
        assert found.objective.item() <= exact.objective.item() + some
        assert exact.objective.item() <= found.bound.item() + some
        assert found.gap.item() <= bar_of(family)


@pytest.mark.parametrize(
    ("tokens", "experts", "topk"),
    [
        (1, 2, 1), (1, 17, 16), (9, 2, 1), (70, 3, 2), (40, 64, 8), (33, 100, 7), (20, 160, 6),
        (12, 384, 6), (6, 1024, 3), (30, 5, 5), (33, 16, 15),
    ],
)  # fmt: skip
@pytest.mark.parametrize("factor", [1.0, 1.02, 1.5])
def test_odd_sizes(tokens, experts, topk, factor):
    scores = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens))
    each = math.ceil(min(tokens * topk * factor / experts, tokens))
    found = bounded(scores, topk, capacity_factor=factor)
    assert_sound(scores, topk, torch.full((experts,), each), found)


@pytest.mark.parametrize("height", [8.0, 12.0, 16.0])
def test_peaked_rows_keep_their_other_scores(height):
    """One score near 1 does not hide the others, of 1e-4 to 1e-7, behind the perturbation."""
    logits = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    logits[:, 0] += height
    scores = logits.softmax(-1)
    found = bounded(scores, 2)
    assert_sound(scores, 2, torch.full((16,), 38), found)
    assert found.gap.item() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    scores = torch.randn(60, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, same = bounded(scores, 2), bounded(scores.float(), 2)
    assert_sound(scores, 2, torch.full((16,), 8), found)
    assert torch.equal(found.experts, same.experts) and torch.equal(found.prices, same.prices)


def phases(scores, topk, capacity, programs, prices=None):
    """Solve phase by phase with so many programs; return experts and all results."""
    made = engine.Solve(scores[None].contiguous(), topk, torch.zeros(scores.shape[1]), 0, programs)
    if prices is not None:
        made.prices = prices
    for phase in range(400):
        made.launch(phase, phase + 1, capacity)
        if int(made.state("KIND")) == layout.ORDER.value:
            return made.experts, made.results, made.order
    raise AssertionError("endless")


@pytest.mark.parametrize("family", ["iid", "40 repeated tokens", "capacity factor 1.25"])
def test_same_bits_for_any_number_of_programs(family):
    work = workload(family, 120, 20, 3)
    one = phases(work.scores, 3, work.capacity, 1)
    whole = bounded(work.scores, 3, capacity=work.capacity)
    assert torch.equal(whole.experts, one[0][0]), "one launch"
    for programs in (2, 5):
        found = phases(work.scores, 3, work.capacity, programs)
        assert all(torch.equal(a, b) for a, b in zip(found, one, strict=True)), programs


@pytest.mark.parametrize(
    ("family", "size", "slack", "hostile"),
    [
        ("iid", (230, 16, 2), 0, False),
        ("iid", (230, 40, 3), 5, True),
        ("skewed, sigma 4", (150, 17, 3), 0, True),
        ("sorted by type", (200, 33, 4), 4, False),
        ("40 repeated tokens", (400, 12, 3), 0, False),
        ("two-hot, underflow", (160, 12, 2), 1, False),
        ("all equal", (200, 12, 3), 0, False),
    ],
)
def test_form_in_numba_takes_the_kernels_decisions(family, size, slack, hostile):
    work = workload(family, *size)
    capacity = work.capacity.clone()
    capacity[:slack] += 1
    generator = torch.Generator().manual_seed(3)
    prices = torch.randn(size[1], generator=generator) if hostile else torch.zeros(size[1])
    model = Model(work.scores, size[2], capacity, prices)
    expected = model.run()
    found = bounded(work.scores, size[2], capacity=capacity, prices=prices)
    held = torch.zeros(size[:2], dtype=torch.bool).scatter_(1, found.experts, True)
    assert torch.equal(held, torch.from_numpy(expected.held))
    assert torch.equal(found.prices, torch.from_numpy(expected.prices))
    assert found.gap.item() == pytest.approx(expected.gap, rel=1e-5, abs=1e-9)
    assert expected.sweeps > 0


def test_rank_one_scores_anneal():
    # Every row ranks the experts alike: load passes from neighbour to neighbour only.
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(300, 1, generator=generator) * torch.randn(1, 17, generator=generator)
    capacity = torch.full((17,), 54)
    model = Model(scores, 3, capacity)
    found = model.run()
    assert found.sweeps >= 20, "annealing takes longer than plain sweeps may"
    assert (found.held.sum(1) == 3).all() and (found.held.sum(0) <= 54).all()
    assert found.gap <= 1e-2


def test_two_hops_where_no_row_has_a_swap():
    # Experts 0 and 1 are overfull, 2 is full, 3 has room; every row with 0 or 1 has 3 already.
    scores = torch.full((6, 4), -1.0)
    scores[:4, 3] = 9.0
    scores[0, 0] = scores[1, 0] = scores[2, 1] = scores[3, 0] = 8.0
    scores[4:, 2] = 9.0
    scores[4:, 0] = 8.0
    for capacity in ([2, 1, 4, 5], [2, 2, 4, 4], [1, 1, 5, 5]):
        capacity = torch.tensor(capacity)
        found = bounded(scores, 2, capacity=capacity)
        assert_sound(scores, 2, capacity, found)
        best = ortools_objective(scores.numpy(), 2, capacity.numpy())
        assert found.objective.item() <= best <= found.bound.item() + 1e-6


def random_problem(seed):
    """Return scores, k, capacities and prices: ties, plateaus, slack, hostile prices."""
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(2, 9))
    topk = int(rng.integers(1, experts))
    tokens = int(rng.integers(1, 30))
    scores = rng.integers(0, rng.choice([1, 3, 1000]), (tokens, experts)).astype(np.float32)
    generator = torch.Generator().manual_seed(seed)
    capacity = unequal_capacities(tokens, experts, topk, seed % 2, generator)
    prices = torch.tensor(rng.choice([0.0, 1.0, 1e6]) * rng.standard_normal(experts)).float()
    return torch.from_numpy(scores), topk, capacity, prices


def assert_random_problem(seed):
    scores, topk, capacity, prices = random_problem(seed)
    found = bounded(scores, topk, capacity=capacity, prices=prices)
    assert_sound(scores, topk, capacity, found)
    best = ortools_objective(scores.numpy(), topk, capacity.numpy())
    assert found.objective.item() <= best <= found.bound.item() + 1e-4


@given(st.integers(0, 2**31 - 1))
@settings(max_examples=12, deadline=None)
def test_random_problems(seed):
    assert_random_problem(seed)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("first", range(0, 2000, 250))
def test_two_thousand_random_problems(first):
    for seed in range(first, first + 250):
        assert_random_problem(seed)


def test_a_batch_is_its_problems():
    work = [workload(family, 70, 12, 3) for family in ("iid", "40 repeated tokens", "all equal")]
    batch = torch.stack([each.scores for each in work])
    prices = 0.1 * torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    for given_prices in (None, prices):
        found = bounded(batch, 3, capacity=18, prices=given_prices)
        for index in range(3):
            own = None if given_prices is None else given_prices[index]
            alone = bounded(batch[index], 3, capacity=18, prices=own)
            for name in ("experts", "prices", "objective", "bound", "gap", "loads", "converged"):
                assert torch.equal(getattr(found, name)[index], getattr(alone, name)), name


def test_padding_is_filled():
    scores = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    valid = torch.arange(50) % 5 != 0
    found = bounded(scores, 2, valid=valid, fill_padding=True)
    clean = scores.masked_fill(~valid[:, None], 0.0)
    assert_sound(clean, 2, torch.full((8,), 13), found)
    assert found.gap <= 2e-4


def test_scores_that_are_not_finite_count_as_zero():
    scores = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    clean = scores.clone()
    for row, expert, value in ((3, 1, float("nan")), (3, 2, float("inf")), (20, 0, float("nan"))):
        scores[row, expert], clean[row, expert] = value, 0.0
    found, expected = bounded(scores, 2), bounded(clean, 2)
    assert torch.equal(found.experts, expected.experts) and found.bad == 2


def test_groups_of_experts():
    groups = Groups(number=4, chosen=2, topk=4)
    work = workload("iid", 512, 16, 4)
    scores_TG = groups.scores(work.scores)
    found = bounded(scores_TG, 2)
    exact = solve(scores_TG, 2)
    assert_sound(scores_TG, 2, torch.full((4,), 256), found)
    spans = float((scores_TG.amax(1) - scores_TG.amin(1)).sum())
    assert (exact.objective - found.objective) / spans <= 4e-4
    inside = groups.inside(found.experts, 16)
    preferred = groups.preferred(work.scores, inside)
    found = bounded(preferred, 4)
    assert_sound(preferred, 4, torch.full((16,), 128), found)
    assert found.gap <= 4e-4
    assert (~inside.gather(1, found.experts)).float().mean() <= 0.01


def test_a_forbidden_arc_costs_a_row_range():
    work = workload("forbidden arcs", 200, 12, 3)
    found = bounded(work.scores, 3, capacity=work.capacity)
    exact = solve(work.scores, 3, capacity=work.capacity)
    taken = work.scores.gather(1, found.experts)
    assert torch.isfinite(taken).all() and found.bad == 0
    assert found.objective.item() == pytest.approx(float(taken.double().sum()))
    assert exact.objective.item() <= found.bound.item() + 1e-6
    assert found.gap <= 2e-4
    # Rows that may not take two of the experts, which have all the room there is.
    scores = torch.zeros(4, 4)
    scores[:2, :2] = -float("inf")
    found = bounded(scores, 2, capacity=torch.tensor([2, 2, 2, 2]))
    assert set(found.experts[:2].flatten().tolist()) == {2, 3} and found.gap == 0


@pytest.mark.parametrize("size", [1e5, 1e30])
def test_outliers_leave_the_others_their_certificate(size):
    work = workload("iid", 300, 16, 2)
    scores = work.scores.clone()
    scores[7] *= size
    found = bounded(scores, 2, capacity=work.capacity)
    counts = found.experts.flatten().bincount(minlength=16)
    assert (counts <= work.capacity).all() and found.scaled == 1
    # The outlier has its best, and the others are nearly as well off as they can be beside it.
    assert found.experts[7].tolist() == scores[7].topk(2).indices.tolist()
    rest = torch.arange(300) != 7
    left = work.capacity - found.experts[7].bincount(minlength=16)
    best = solve(work.scores[rest], 2, capacity=left)
    spans = (work.scores.amax(1) - work.scores.amin(1)).sum()
    got = work.scores.gather(1, found.experts)[rest].sum()
    assert got >= best.objective - 2e-4 * spans


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e30])
def test_scores_of_any_size(size):
    work = workload("iid", 60, 8, 2)
    scores = (work.scores.double() * size).float()
    found = bounded(scores, 2, capacity=work.capacity)
    check_assignment(found.experts.numpy(), scores.numpy(), 2, work.capacity.numpy())
    assert found.gap <= 1e-3 and torch.isfinite(found.prices).all()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), 3e38])
def test_warm_prices_of_any_size(wrong):
    work = workload("iid", 60, 8, 2)
    prices = torch.zeros(8)
    prices[3] = wrong
    found = bounded(work.scores, 2, capacity=work.capacity, prices=prices)
    check_assignment(found.experts.numpy(), work.scores.numpy(), 2, work.capacity.numpy())
    assert found.gap <= 1e-3 and torch.isfinite(found.prices).all()


def test_arguments():
    scores = torch.randn(10, 4)
    with pytest.raises(ValueError, match="capacities hold 16 assignments but 10 tokens"):
        bounded(scores, 2, capacity=4)
    with pytest.raises(ValueError, match=r"prices must be \(4,\), got shape \(5,\)"):
        bounded(scores, 2, prices=torch.zeros(5))
    with pytest.raises(ValueError, match=r"capacity must be an int or \(4,\) int64"):
        bounded(scores, 2, capacity=torch.tensor([20]))
    for what, reason in (
        (scores.double(), "scores are torch.float64"),
        (scores[:0], "there are no tokens"),
        (scores.new_empty(0).expand(1 << 21, 0), f"{1 << 21} tokens are too many"),
    ):
        assert certified.obstacle(what, "bounded", 1, False, True) == reason
    assert certified.obstacle(scores[None], "bounded", 2, False, True) == (
        "sequences are split over ranks"
    )
    assert certified.obstacle(scores, "bounded", 1, True, False) == "padding gets no experts"
    assert solve(scores, 2).gap <= 1e-9, "auto is exact on the CPU"


def test_one_launch_and_three_allocations(monkeypatch):
    work = workload("iid", 200, 8, 2)
    prices = 0.1 * torch.randn(8)
    bounded(work.scores, 2, capacity=50, prices=prices)
    monkeypatch.undo()  # of the buffers
    with Watch().kernels(monkeypatch) as watch:
        bounded(work.scores, 2, capacity=50, prices=prices)
    assert watch.operations == {"solve_kernel": 1, "zero_": 1}
    assert watch.allocations == 3


def test_watch_is_able_to_fail():
    for wait in (
        lambda t: t.sum().item(), lambda t: bool(t.any()), lambda t: t[t > 0], torch.nonzero
    ):  # fmt: skip
        with pytest.raises(AssertionError), Watch():
            wait(torch.ones(3))
