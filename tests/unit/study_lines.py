"""Made-up results of the study's runs."""

from __future__ import annotations

import dataclasses

import numpy as np

from tools.study import runs as study_runs
from tools.study.arms import SIZES, Run

SIZE = dataclasses.replace(SIZES["quick"], iterations=20)


def result(run: Run, loss: float, **changes) -> dict:
    """Return a line of results as a run would leave it."""
    rules = {"price": loss, "flow": loss * 1.001} if "maxscore" in run.flags else {"own": loss}
    two = len(rules) == 2
    line = {
        "key": run.key, "purpose": run.purpose, "family": run.family, "size": run.size.name,
        "arm": run.arm.name, "learning_rate": run.setting.learning_rate,
        "factor": run.setting.factor, "code": "c0de", "revision": "1a2b",
        "seed": run.seed, "iterations": 20, "tokens": 20 * 4096, "flags": run.flags,
        "train_loss": list(np.linspace(9, loss, 20)), "curve": {5: 8.0, 10: 7.0, 20: loss},
        "maxvio_mean": 0.5, "maxvio_mean_late": 0.4, "maxvio_max": 2.0, "dropped": 0.25,
        "solve_share": 0.03 if two else None, "ms_per_step": 1000.0, "seconds": 60.0,
        "evaluation": {
            "rules": {
                rule: {"loss": value, "tokens": 1000, "loads": [[10] * 16] * 4,
                       "maxvio": [0.1, 0.2, 0.05, 0.1], "dropped": 0.0, "gate_sum": [1.0] * 4}
                for rule, value in rules.items()
            },
            "comparison": {"rules": list(rules), "kl": 0.01, "top1_agreement": 0.9} if two else {},
            "decoding": {
                "sequences": 4, "loss_one_pass": loss, "loss_token_by_token": loss + 1e-7,
                "loss_one_pass_float64": loss, "loss_token_by_token_float64": loss,
                "largest_difference": 1e-6, "largest_difference_float64": 1e-15,
            },
        },
    }  # fmt: skip
    if run.seed == study_runs.LOAD_MAP_SEED:
        line["load_map"] = np.ones((30, 4, 16)).tolist()
    return line | changes
