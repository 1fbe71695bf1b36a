"""Errors that concern all ranks."""


class CollectiveError(RuntimeError):
    """Raised on every rank together, with the same message: no rank waits for another."""


class LostRankError(RuntimeError):
    """A collective of ours failed or timed out, since another rank of the group is gone or stuck.

    Attributes:
        phase: what was being exchanged.
    """

    def __init__(self, phase: str, where: str, cause: str) -> None:
        super().__init__(
            f"lost contact with another rank while exchanging {phase} ({where}): {cause}. Look for "
            "the first error among the other ranks; --distributed-timeout-minutes sets how long "
            "ranks wait for each other"
        )
        self.phase = phase
