"""Part kills: a training run is killed at a random moment, resumed, and compared bit for bit.

Each trial starts from nothing, is killed once, and goes on from its last checkpoint to the end. Its
losses, those of repeated iterations included, must be those of the run that was left alone.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from .runs import start

ITERATIONS, SAVE_EVERY = 12, 3
SCOPES = ("local", "group", "sequence")
PLACES = ("forward", "backward", "exchange", "step", "saving", "any time")
# A run of a dozen steps that takes longer hangs.
LONGEST = 300.0


def flags_of(scope: str, directory: Path) -> str:
    """Return the flags of a run."""
    checkpoint = directory / "checkpoint"
    return (
        f"--maxscore-scope {scope} --global-batch-size 8 --train-iters {ITERATIONS} "
        f"--save {checkpoint} --load {checkpoint} --save-interval {SAVE_EVERY}"
    )


def losses_in(path: Path) -> dict[int, set[str]]:
    """Return every loss that was written, by iteration."""
    found: dict[int, set[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        iteration, loss = line.split()
        found.setdefault(int(iteration), set()).add(loss)
    return found


def finish(directory: Path, scope: str, kill: str = "") -> int | None:
    """Run to the end, or until it is killed; return the exit status, None if it hung."""
    environment = {"SOAK_LOSSES": str(directory / "losses"), "SOAK_KILL": kill}
    process = start(directory, flags_of(scope, directory), environment)
    try:
        return process.wait(LONGEST)
    except Exception:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return None


def kill_from_outside(directory: Path, scope: str, place: str, moment: float) -> bool:
    """Kill every process of a run: while it saves, or so many seconds after its first step.

    Returns:
        Whether it was killed before it ended.
    """
    losses, checkpoint = directory / "losses", directory / "checkpoint"
    process = start(directory, flags_of(scope, directory), {"SOAK_LOSSES": str(losses)})
    deadline = time.monotonic() + LONGEST

    def is_due() -> bool:
        if place == "saving":
            # The directory of an iteration that the tracker does not name yet.
            newest = max((p.name for p in checkpoint.glob("iter_*")), default="")
            tracker = checkpoint / "latest_checkpointed_iteration.txt"
            named = tracker.read_text().strip() if tracker.exists() else "0"
            return bool(newest) and int(newest.removeprefix("iter_")) > int(named or 0)
        return losses.exists()

    while process.poll() is None and not is_due() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(moment)
    if process.poll() is not None:
        return False
    for child in psutil.Process(process.pid).children(recursive=True):
        child.send_signal(signal.SIGKILL)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return True


def reference(scope: str) -> dict[int, set[str]]:
    """Return the losses of the run that is left alone."""
    with tempfile.TemporaryDirectory() as scratch:
        status = finish(Path(scratch), scope)
        if status != 0:
            log = (Path(scratch) / "log").read_text(encoding="utf-8")
            raise RuntimeError(f"the run that is left alone ended with {status}:\n{log[-3000:]}")
        return losses_in(Path(scratch) / "losses")


def trial(number: int, references: dict[str, dict[int, set[str]]]) -> dict[str, Any]:
    """Kill one run, resume it, compare; return its line of results.

    Args:
        number: of the trial; decides scope, place and moment.
        references: losses of runs that were left alone, by scope; filled as needed.
    """
    chance = random.Random(number)
    place = PLACES[number % len(PLACES)]
    # The two ranks share no sequence, so they exchange in scope group alone.
    scope = "group" if place == "exchange" else chance.choice(SCOPES)
    if scope not in references:
        references[scope] = reference(scope)
    iteration, rank = chance.randint(1, ITERATIONS), chance.randint(0, 1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        if place in ("saving", "any time"):
            longest = 0.05 if place == "saving" else 3.0
            was_killed = kill_from_outside(directory, scope, place, chance.uniform(0, longest))
            how = place
        else:
            how = f"{place}, iteration {iteration}, rank {rank}"
            was_killed = finish(directory, scope, f"{place}:{iteration}:{rank}") != 0
        after = (directory / "checkpoint" / "latest_checkpointed_iteration.txt").exists()
        status = finish(directory, scope)
        found = losses_in(directory / "losses")
        wanted = references[scope]
        failures = []
        if status != 0:
            failures.append(f"the resumed run ended with {status}")
            log = (directory / "log").read_text(encoding="utf-8")
            failures.append(log[-1500:])
        missing = [i for i in wanted if i not in found]
        other = [i for i in found if not found[i] <= wanted.get(i, set())]
        if other:
            failures.append(f"losses of iterations {other} differ")
        if missing:
            failures.append(f"iterations {missing} have no loss")
        if not was_killed and place != "any time":
            failures.append("the run ended before it was killed, so nothing was tested")
    return {
        "part": "kills", "trial": number, "scope": scope, "how": how, "killed": was_killed,
        "from_checkpoint": after, "failures": failures,
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip
