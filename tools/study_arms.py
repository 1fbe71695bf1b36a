"""What the study compares: routers, their tuning, data families and model sizes.

Pure data: each name stands for flags of Megatron's command line.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

AUX = "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff"
NO_AUX = "--moe-router-load-balancing-type none"
# E / k^2 with 16 experts, top-2: what makes SoftTopk's gates sum to about 1 (docs/routing.md).
MAXSCORE = (
    "--moe-router-type maxscore --maxscore-mode exact --maxscore-eval-routing price "
    "--moe-token-dispatcher-type alltoall"
)
DEFAULT = f"{MAXSCORE} --maxscore-scope local {NO_AUX} --moe-router-topk-scaling-factor 4"
LOCAL = f"{MAXSCORE} --maxscore-scope local {NO_AUX}"
# The first is used while the knob is tuned.
LEARNING_RATES = ("2e-3", "1e-3", "4e-3")


@dataclass(frozen=True)
class Arm:
    """One router.

    Attributes:
        name: in files and results.
        title: in tables.
        flags: of the router.
        knob: name of what is tuned, beside the learning rate.
        values: its values, flags each, the usual one first.
        follows: arm whose tuned learning rate is used, for arms that are not tuned.
        ranks: processes; with two the experts are spread over both.
        script: training script.
    """

    name: str
    title: str
    flags: str
    knob: str = ""
    values: dict[str, str] = field(default_factory=lambda: {"": ""})
    follows: str = ""
    ranks: int = 1
    script: str = "examples/pretrain_gpt.py"


def _numbers(flag: str, *values: str) -> dict[str, str]:
    return {value: f"{flag} {value}" for value in values}


_AUX_VALUES = {value: f"{AUX} {value}" for value in ("1e-2", "1e-3", "1e-1")}
CORE = (
    Arm(
        "maxscore", "MaxScore", DEFAULT, "temperature",
        _numbers("--maxscore-temperature", "1.0", "0.5", "2.0"),
    ),
    Arm("dropless", "dropless top-k, aux loss", "", "aux loss coefficient", _AUX_VALUES),
    Arm(
        "gshard", "top-k, capacity 1, drops", "--moe-expert-capacity-factor 1.0",
        "aux loss coefficient", _AUX_VALUES,
    ),
    Arm(
        "bias", "top-k, expert bias",
        f"{NO_AUX} --moe-router-enable-expert-bias --moe-router-score-function sigmoid",
        "bias update rate", _numbers("--moe-router-bias-update-rate", "1e-3", "3e-3", "1e-2"),
    ),
    Arm(
        "sinkhorn", "sinkhorn", "--moe-router-load-balancing-type sinkhorn",
        "z-loss coefficient", {"0": ""} | _numbers("--moe-z-loss-coeff", "1e-3", "1e-2"),
    ),
    Arm(
        "quantile", "quantile balancing", "--moe-router-load-balancing-type quantile_balancing",
        "EMA of its bias", _numbers("--moe-router-quantile-balancing-ema", "0.0", "0.5", "0.9"),
    ),
)  # fmt: skip
_SCALED = "--moe-router-topk-scaling-factor 4"
_TWO_RANKS = "--expert-model-parallel-size 2 --micro-batch-size 4"
EXPLORATORY = tuple(
    Arm(name, title, flags, follows="maxscore", ranks=ranks, script=script)
    for name, title, flags, ranks, script in (
        ("sequence", "scope sequence",
         f"{MAXSCORE} --maxscore-scope sequence {NO_AUX} {_SCALED}", 1, Arm.script),
        ("local2", "scope local, 2 ranks of 1,024 tokens", f"{DEFAULT} {_TWO_RANKS}", 2,
         Arm.script),
        ("group2", "scope group, 2 ranks of 1,024 tokens",
         f"{MAXSCORE} --maxscore-scope group {NO_AUX} {_SCALED} {_TWO_RANKS}", 2, Arm.script),
        ("bounded", "bounded mode", f"{DEFAULT} --maxscore-mode bounded", 1, Arm.script),
        ("softmax", "softmax variant", f"{DEFAULT} --maxscore-variant softmax", 1, Arm.script),
        ("scores", "flow maximises SoftTopk", f"{DEFAULT} --maxscore-objective scores", 1,
         Arm.script),
        ("normalized", "SoftTopk gates normalised", f"{LOCAL} --maxscore-normalize-gates", 1,
         Arm.script),
        ("score_gate", "top-k's softmax gates", f"{LOCAL} --maxscore-gate score", 1, Arm.script),
        ("sigmoid_gate", "sigmoid gates, flow maximises them",
         f"{LOCAL} --maxscore-gate score --moe-router-score-function sigmoid "
         "--maxscore-objective scores", 1, Arm.script),
        ("unscaled", "gates not scaled by E/k^2", LOCAL, 1, Arm.script),
        ("aux", "with aux loss 1e-2",
         f"{DEFAULT} --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2", 1,
         Arm.script),
        ("zloss", "with z-loss 1e-3", f"{DEFAULT} --moe-z-loss-coeff 1e-3", 1, Arm.script),
        ("capacity125", "capacity factor 1.25", f"{DEFAULT} --maxscore-capacity-factor 1.25", 1,
         Arm.script),
        ("annealed", "softmax, annealed second gate (authors' code)",
         f"{DEFAULT} --maxscore-variant softmax --maxscore-anneal-steps ITERATIONS", 1, Arm.script),
        ("greedy", "greedy, then Hungarian (authors' code), per sequence",
         f"{MAXSCORE} --maxscore-scope sequence {NO_AUX} {_SCALED}", 1, "tools/study_greedy.py"),
        ("decay0", "prices of the last batch only", f"{DEFAULT} --maxscore-price-decay 0", 1,
         Arm.script),
        ("decay99", "price decay 0.99", f"{DEFAULT} --maxscore-price-decay 0.99", 1, Arm.script),
    )
)  # fmt: skip
ARMS = {arm.name: arm for arm in (*CORE, *EXPLORATORY)}


@dataclass(frozen=True)
class Size:
    """A model and how long it is trained.

    Attributes:
        name: in files and results.
        flags: of the model and of training.
        iterations: training steps.
        tokens_per_step: of one step.
        seconds_per_step: on one core of the machine named in docs/study.md, for the estimate.
        valid_sequences: evaluated at the end, None for all.
    """

    name: str
    flags: str
    iterations: int
    tokens_per_step: int
    seconds_per_step: float
    valid_sequences: int | None = None


_MODEL = """
    --num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 256
    --max-position-embeddings 256 --position-embedding-type rope --normalization RMSNorm --swiglu
    --disable-bias-linear --attention-dropout 0 --hidden-dropout 0
    --num-experts 16 --moe-router-topk 2 --moe-ffn-hidden-size 128
    --moe-token-dispatcher-type alltoall
    --micro-batch-size 8 --global-batch-size 16 --lr-decay-style cosine --min-lr 2e-4
    --lr-warmup-fraction 0.1 --weight-decay 0.1 --clip-grad 1.0 --log-interval 1
"""
SIZES = {
    "small": Size("small", _MODEL, 300, 4096, 1.0),
    "quick": Size("quick", _MODEL, 40, 4096, 1.0, valid_sequences=64),
}
FAMILIES = {
    "code": "the sources of this Python's standard library (PSF licence)",
    "prose": "Django's documentation, from its source distribution on PyPI (BSD-3-Clause)",
}
# Where the prose comes from; the version fixes the text.
PROSE_PACKAGE = "django==5.2.8"


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        family: data.
        size: model and length.
        arm: router.
        value: of the arm's knob.
        learning_rate: peak.
        seed: of weights and of the data's order.
        purpose: what it counts for: tuning, core or exploratory.
    """

    family: str
    size: Size
    arm: Arm
    value: str
    learning_rate: str
    seed: int
    purpose: str

    @property
    def flags(self) -> str:
        """Return the run's flags, all but paths."""
        size = self.size
        text = (
            f"{size.flags} --train-iters {size.iterations} --lr-decay-iters {size.iterations} "
            f"--lr {self.learning_rate} --seed {self.seed} {self.arm.flags} "
            f"{self.arm.values[self.value]}"
        )
        return " ".join(text.replace("ITERATIONS", str(size.iterations)).split())

    @property
    def key(self) -> str:
        """Return what identifies the run: equal keys give equal results."""
        arm, size = self.arm, self.size
        text = f"{self.family} {arm.script} {arm.ranks} {size.valid_sequences} {self.flags}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """Return a short name for people."""
        setting = f" {self.arm.knob} {self.value}" if self.value else ""
        return f"{self.family} {self.arm.name}{setting} lr {self.learning_rate} seed {self.seed}"
