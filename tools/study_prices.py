"""``examples/pretrain_gpt.py`` with MaxScore's prices but not its flow in training.

Every batch is solved, and the prices averaged, as always; but each token takes the k largest of
score minus average price, as outside training, so loads are only balanced on average. For the
study, to tell the flow within a batch from its prices; started by it.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import pretrain_gpt  # noqa: E402

from megatron_maxscore.moe.router import MaxScoreRouter  # noqa: E402

_experts = MaxScoreRouter._experts


def experts_by_prices(self, scores, recompute_pass):
    """Solve for the prices, and choose by those of the batches before.

    Args:
        self: the router.
        scores: (T, E).
        recompute_pass: as for the router.
    """
    experts = _experts(self, scores, recompute_pass)
    if not self.training:
        return experts
    self.plan.forget()
    return (scores - self.expert_prices.to(scores.dtype)).topk(self.topk, dim=1).indices


MaxScoreRouter._experts = experts_by_prices

if __name__ == "__main__":
    pretrain_gpt.main()
