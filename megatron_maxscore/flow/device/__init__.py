"""The engine of bounded mode: one kernel launch from scores to a certified assignment.

1. **Sweeps.** Every row takes the K experts of the highest reduced score, which is its score less
   the expert's price. From counts of how many rows would change their mind within some distance
   follows, for each expert, by how much its price has to move. Steps are 1.5 times as long as that
   and combined by Anderson's method; 4 to 9 sweeps leave about a thousandth of the units over.
   Where rows are alike they change their minds together: a perturbation that depends on row and
   expert alone parts them, a larger one where sweeps do not get on.
2. **Rounds.** Every row offers its cheapest swap of an expert that has too many rows for one that
   has room, or that can pass a row on. An offer that is the best in its slot at both experts is
   made. Nobody gives more than it has too many, and nobody takes more than it has room for, so the
   assignment is feasible in the end.
3. **Conclusion.** At the final prices, without the perturbation: what each row would have got at
   most, less what it got, is its part of the certified gap.

Sweeps, rounds and conclusion are phases of one launch, with a barrier between them where the
driver lets a launch's programs wait for each other, and launches of their own elsewhere. What
crosses programs are integer sums and maxima, so the result does not depend on their number.

With Triton's interpreter (``TRITON_INTERPRET=1``) the same kernel runs on the CPU, slowly.
"""

from __future__ import annotations

import functools
import importlib.util
import os

from torch import Tensor


@functools.cache
def has_triton() -> bool:
    """Return whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def is_device(tensor: Tensor) -> bool:
    """Return whether a tensor is where the engine runs, and the host would wait to read it."""
    return tensor.is_cuda and has_triton()


def is_interpreted() -> bool:
    """Return whether Triton's interpreter lets the engine run on tensors on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1" and has_triton()
