"""What goes on around a router: the iteration, the microbatch, logging, and the rule of evaluation.

Megatron passes none of this to a router. The hooks of a training loop set it, or functions that
return it, on :data:`RUN`. Without hooks each router counts global batches by itself, nothing is
logged, and the microbatch's number is 0.
"""

from __future__ import annotations

import threading
from collections.abc import Callable


class RunContext:
    """The context of every router in the process.

    Attributes:
        iteration: returns the number of the current iteration, from 1; None without a training
            loop that knows it.
        is_logging: returns whether values of the current iteration are logged; None: they are not.
    """

    def __init__(self) -> None:
        self.iteration: Callable[[], int] | None = None
        self.is_logging: Callable[[], bool] | None = None
        # Two models in one process may run in two threads.
        self._thread = threading.local()

    @property
    def microbatch(self) -> int:
        """Number of the microbatch in its global batch, from 0; of the calling thread."""
        return getattr(self._thread, "microbatch", 0)

    @microbatch.setter
    def microbatch(self, number: int) -> None:
        self._thread.microbatch = number

    @property
    def evaluation_rule(self) -> str | None:
        """Rule that routers in evaluation follow in the calling thread, None for their own."""
        return getattr(self._thread, "evaluation_rule", None)

    @evaluation_rule.setter
    def evaluation_rule(self, rule: str | None) -> None:
        self._thread.evaluation_rule = rule


RUN = RunContext()
