"""Part models: two models in one process, in turn and in threads; copies, pickles and forks."""

from __future__ import annotations

import contextlib
import copy
import io
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_maxscore import cpu
from megatron_maxscore.flow import solve
from tools.benchmarks import one_rank_layer

TOKENS = 96
# Experts and k of the two models.
MODELS = ((16, 2), (8, 3))


def _hidden(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(TOKENS, 1, one_rank_layer.HIDDEN, generator=generator).bfloat16()


def _step(layer: Any, seed: int) -> Tensor:
    """Train one step's forward and backward pass; return output and gradient as one tensor."""
    layer.zero_grad(set_to_none=True)
    output, _ = layer(_hidden(seed))
    output.float().square().mean().backward()
    return torch.cat([output.detach().flatten(), layer.router.weight.grad.flatten()]).float()


def _layers(is_ours: bool = True) -> list[Any]:
    """Build the models, alike each time."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    with contextlib.redirect_stdout(io.StringIO()):
        model_parallel_cuda_manual_seed(1)
    torch.manual_seed(3)
    return [
        one_rank_layer.make_layer(experts=e, topk=k, expert_hidden=32, is_ours=is_ours).train()
        for e, k in MODELS
    ]


def _copy(layer: Any) -> Any:
    """Copy a layer; it shares its process groups, which nothing can copy."""
    # Megatron's dispatcher keeps the probs of the last pass, with their graph, in stock layers too.
    layer.token_dispatcher.probs = None
    groups: list[Any] = []
    for part in (*layer.modules(), layer.token_dispatcher):
        for value in vars(part).values():
            held = vars(value).values() if hasattr(value, "__dict__") else ()
            groups += [each for each in held if isinstance(each, dist.ProcessGroup)]
        groups += [each for each in vars(part).values() if isinstance(each, dist.ProcessGroup)]
    return copy.deepcopy(layer, {id(group): group for group in groups})


def _together(layers: list[Any], steps: int, threads: bool) -> list[list[Tensor]]:
    """Return each layer's steps, done in turn or in a thread for each layer."""
    found: list[list[Tensor]] = [[] for _ in layers]

    def work(place: int) -> None:
        for step in range(steps):
            found[place].append(_step(layers[place], step))

    if threads:
        workers = [threading.Thread(target=work, args=(place,)) for place in range(len(layers))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    else:
        for step in range(steps):
            for place in range(len(layers)):
                found[place].append(_step(layers[place], step))
    return found


def _solve_in_child(answer: Any) -> None:
    scores = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    answer.send(solve(scores, 2).experts.numpy())


def run(steps: int) -> list[dict[str, Any]]:
    """Run all cases; return a line of results for each."""
    cpu.enable_if_needed(forced=True)
    one_rank_layer.set_up("gloo")
    lines = []

    def case(name: str, holds: Callable[[], bool]) -> None:
        try:
            failures = [] if holds() else ["results differ"]
        except Exception as error:  # every failure is a finding
            failures = [f"{type(error).__name__}: {error}"]
        lines.append({"part": "models", "case": name, "steps": steps, "failures": failures})

    def equal(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> bool:
        pairs = [
            (a, b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)
        ]
        return all(torch.equal(a, b) for a, b in pairs)

    try:
        alone = [_together([layer], steps, threads=False)[0] for layer in _layers()]
        case("two models in turn", lambda: equal(_together(_layers(), steps, False), alone))
        case("two models in threads", lambda: equal(_together(_layers(), steps, True), alone))

        def copied(make: Callable[[Any], Any]) -> bool:
            """A copy after half of the steps goes on as the original does."""
            half = steps // 2
            layers = _layers()
            for place in range(half):
                for layer in layers:
                    _step(layer, place)
            copies = [make(layer) for layer in layers]
            after = [[_step(layer, half)] for layer in layers]
            return equal([[_step(layer, half)] for layer in copies], after)

        def reloaded(layer: Any) -> Any:
            buffer = io.BytesIO()
            torch.save(layer.router.state_dict(), buffer)
            buffer.seek(0)
            other = _copy(layer)
            with torch.no_grad():
                other.router.weight.zero_()
            other.router.load_state_dict(torch.load(buffer, weights_only=True))
            return other

        case("deep copies that share process groups", lambda: copied(_copy))
        case("state_dict by torch.save, weights_only", lambda: copied(reloaded))

        def pickled() -> bool:
            scores = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
            solution = solve(scores, 2)
            again = pickle.loads(pickle.dumps(solution))
            return torch.equal(again.experts, solution.experts) and again.gap == solution.gap

        case("pickle of a solution", pickled)

        def forked() -> bool:
            scores = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
            wanted = solve(scores, 2).experts.numpy()
            context = multiprocessing.get_context("fork")
            receiving, sending = context.Pipe(duplex=False)
            child = context.Process(target=_solve_in_child, args=(sending,))
            child.start()
            answer = receiving.recv() if receiving.poll(60) else None
            child.kill()
            child.join()
            return answer is not None and bool((answer == wanted).all())

        case("fork after use", forked)
    finally:
        one_rank_layer.tear_down()
    return lines
