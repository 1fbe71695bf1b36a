"""``examples/pretrain_gpt.py`` with MaxScore's prices but not its flow in training.

Every batch is solved, and the prices averaged, as always; but each token takes the k largest of
score minus average price, as outside training, so loads are only balanced on average. For the
study, to tell the flow within a batch from its prices; started by it.
"""

import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import pretrain_gpt  # noqa: E402

from megatron_maxscore.moe.plan import RoutingPlan  # noqa: E402
from megatron_maxscore.moe.router import MaxScoreRouter  # noqa: E402

_assign = MaxScoreRouter.assign


def assign_by_prices(self, scores, call, biased=None):
    """Solve for the prices, and choose by those of the batches before.

    Args:
        self: the router.
        scores: (T, E).
        call: as for the router.
        biased: as for the router.
    """
    decision = _assign(self, scores, call, biased)
    if not self.training:
        return decision
    experts = (scores - self.prices.to(scores.dtype)).topk(self.topk, dim=1).indices
    return replace(decision, plan=RoutingPlan(experts))


MaxScoreRouter.assign = assign_by_prices

if __name__ == "__main__":
    pretrain_gpt.main()
