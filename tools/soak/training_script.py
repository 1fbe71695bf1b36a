"""Megatron's training script as the soak runs it: exact losses, and a process that kills itself.

Environment:
    SOAK_LOSSES: file to which the last rank appends "iteration loss", the loss as an exact
        hexadecimal float.
    SOAK_KILL: "where:iteration:rank"; that rank kills itself with SIGKILL in that iteration, where
        is forward (in a router), exchange (in a collective of the solver), backward or step.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path
from typing import Any

from megatron.training import get_args, training

ROOT = Path(__file__).resolve().parents[2]


def _iteration() -> int:
    return int(get_args().curr_iteration) + 1


def die_if_due(where: str) -> None:
    """Kill this process if this is the place, the iteration and the rank."""
    wanted = os.environ.get("SOAK_KILL", "").split(":")
    if wanted == [where, str(_iteration()), os.environ["RANK"]]:
        os.kill(os.getpid(), signal.SIGKILL)


def install() -> None:
    """Wrap the training step, the router and the exchange."""
    from megatron_maxscore.flow import exchange
    from megatron_maxscore.moe.router import MaxScoreRouter

    train_step, routing = training.train_step, MaxScoreRouter.routing
    make_round = exchange.GroupExchange._round

    def recording_step(*args: Any, **kwargs: Any) -> Any:
        result = train_step(*args, **kwargs)
        die_if_due("step")
        is_last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        for loss in result[0].values() if is_last and "SOAK_LOSSES" in os.environ else ():
            with open(os.environ["SOAK_LOSSES"], "a", encoding="utf-8") as file:
                file.write(f"{_iteration()} {float(loss).hex()}\n")
        return result

    def dying_routing(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = routing(self, *args, **kwargs)
        if self.training:
            die_if_due("forward")
            if result[0].requires_grad:
                result[0].register_hook(lambda _: die_if_due("backward"))
        return result

    def dying_round(self: Any, *args: Any) -> Any:
        die_if_due("exchange")
        return make_round(self, *args)

    training.train_step = recording_step
    MaxScoreRouter.routing = dying_routing  # type: ignore[method-assign]
    exchange.GroupExchange._round = dying_round  # type: ignore[method-assign]


def main() -> None:
    """Run examples/pretrain_gpt.py."""
    path = ROOT / "examples" / "pretrain_gpt.py"
    found = importlib.util.spec_from_file_location("pretrain_gpt", path)
    assert found is not None and found.loader is not None
    script = importlib.util.module_from_spec(found)
    found.loader.exec_module(script)
    install()
    script.main()


if __name__ == "__main__":
    main()
