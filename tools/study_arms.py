"""What the study compares: routers, their tuning, data families and model sizes.

Pure data: each name stands for flags of Megatron's command line.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from megatron_maxscore.commands.demo import MODEL

AUX = "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff"
NO_AUX = "--moe-router-load-balancing-type none"
MAXSCORE = (
    "--moe-router-type maxscore --maxscore-eval-routing price --moe-token-dispatcher-type alltoall"
)
LOCAL = f"{MAXSCORE} --maxscore-scope local"
# E / k^2 with 16 experts, top-2: SoftTopk's gates then sum to 1 where all scores are equal, to 4 at
# the default temperature (docs/routing.md).
SCALE = 4.0
# Part of every run's key: results of another revision of the study do not count.
REVISION = 1
# What tuning climbs on, from the first: learning rates, and factors on top of an arm's gate scale.
LEARNING_RATES = ("1e-3", "2e-3", "4e-3", "8e-3", "1.6e-2")
FIRST_RATE = "2e-3"
GAINS = ("0.25", "0.5", "1", "2", "4", "8")


@dataclass(frozen=True)
class Arm:
    """One router.

    Attributes:
        name: in files and results.
        title: in tables.
        flags: of the router.
        knob: name of what is tuned, beside the learning rate.
        values: its values in order, flags each.
        usual: the value that is taken without tuning.
        reserve: values that are only tried where the climb leads there.
        gate_scale: what the gates are multiplied by, before tuning; None if the router cannot.
        follows: arm whose tuned setting is used, for arms that are not tuned.
        against: arm that a variant is compared with, in pairs.
        ranks: processes; with two the experts are spread over both.
        script: training script.
    """

    name: str
    title: str
    flags: str
    knob: str = ""
    values: dict[str, str] = field(default_factory=lambda: {"": ""})
    usual: str = ""
    reserve: tuple[str, ...] = ()
    gate_scale: float | None = 1.0
    follows: str = ""
    against: str = "maxscore"
    ranks: int = 1
    script: str = "examples/pretrain_gpt.py"


def _numbers(flag: str, *values: str) -> dict[str, str]:
    return {value: f"{flag} {value}" for value in values}


_AUX_VALUES = {value: f"{AUX} {value}" for value in ("1e-4", "1e-3", "1e-2", "1e-1", "1", "10")}
_AUX_TUNING: dict[str, Any] = {
    "knob": "aux loss coefficient", "values": _AUX_VALUES, "usual": "1e-2",
    "reserve": ("1e-4", "1e-3", "10"),
}  # fmt: skip
CORE = (
    Arm(
        "maxscore", "MaxScore", LOCAL, "aux loss coefficient", {"0": NO_AUX} | _AUX_VALUES, "1e-1",
        ("0", "1e-4", "1e-3", "10"), gate_scale=SCALE,
    ),
    Arm("dropless", "dropless top-k, aux loss", "", **_AUX_TUNING),
    Arm(
        "gshard", "top-k, capacity 1, drops", "--moe-expert-capacity-factor 1.0", **_AUX_TUNING
    ),
    Arm(
        "bias", "top-k, expert bias",
        f"{NO_AUX} --moe-router-enable-expert-bias --moe-router-score-function sigmoid",
        "bias update rate",
        _numbers("--moe-router-bias-update-rate", "3e-5", "1e-4", "3e-4", "1e-3", "3e-3", "1e-2"),
        "1e-3", ("3e-5", "1e-4", "1e-2"),
    ),
    Arm(
        "sinkhorn", "sinkhorn as in Megatron", "--moe-router-load-balancing-type sinkhorn",
        "z-loss coefficient",
        {"0": ""} | _numbers("--moe-z-loss-coeff", "1e-3", "1e-2", "1e-1"), "0", ("1e-1",),
        # Megatron's sinkhorn ignores the factor.
        gate_scale=None,
    ),
    Arm(
        "quantile", "quantile balancing", "--moe-router-load-balancing-type quantile_balancing",
        "EMA of its bias",
        _numbers("--moe-router-quantile-balancing-ema", "0.0", "0.5", "0.9", "0.97"), "0.0",
        ("0.97",),
    ),
)  # fmt: skip
# What of a difference is the flow's, the gates', the aux loss's: tuned as the core arms, at their
# seeds.
ABLATION = (
    Arm(
        "no_aux", "MaxScore without aux loss", f"{LOCAL} {NO_AUX}", "temperature",
        _numbers("--maxscore-temperature", "0.0625", "0.125", "0.25", "0.5", "1.0", "2.0"), "0.5",
        ("0.0625", "0.125", "2.0"), gate_scale=SCALE,
    ),
    Arm(
        "flow_plain_gates", "flow, top-k's softmax gates", f"{LOCAL} --maxscore-gate score",
        CORE[0].knob, CORE[0].values, CORE[0].usual, CORE[0].reserve,
    ),
    # A capacity of all tokens: the flow is top-k.
    Arm(
        "plain_soft_gates", "top-k, SoftTopk gates, aux loss",
        f"{LOCAL} --maxscore-capacity-factor 8", gate_scale=SCALE, **_AUX_TUNING,
    ),
)  # fmt: skip
_TWO_RANKS = "--expert-model-parallel-size 2 --micro-batch-size 4"
_SEQUENCE = f"{MAXSCORE} --maxscore-scope sequence"
# As the authors' code: softmax (k softmax times 1/2), all but the largest gate annealed, aux loss.
_ANNEALED = (
    f"{MAXSCORE} --maxscore-variant softmax --maxscore-anneal-steps ITERATIONS {AUX} 1e-2 "
    "--maxscore-temperature 1"
)


def _variant(
    name: str,
    title: str,
    flags: str,
    of: Arm = CORE[0],
    against: str = "",
    gate_scale: float = SCALE,
    **options: Any,
) -> Arm:
    """Return a variant of MaxScore: at its tuned setting, unless its flags say another."""
    return Arm(
        name, title, flags, of.knob, of.values, of.usual, follows=of.name,
        gate_scale=gate_scale, against=against or of.name, **options,
    )  # fmt: skip


EXPLORATORY = (
    _variant("sequence", "scope sequence", _SEQUENCE),
    _variant(
        "local2", "scope local, 2 ranks of 1,024 tokens", f"{LOCAL} {_TWO_RANKS}", ranks=2,
        against="local2",
    ),
    _variant(
        "group2", "scope group, 2 ranks of 1,024 tokens",
        f"{MAXSCORE} --maxscore-scope group {_TWO_RANKS}", ranks=2, against="local2",
    ),
    _variant("softmax", "softmax variant", f"{LOCAL} --maxscore-variant softmax"),
    _variant("scores", "flow maximises SoftTopk", f"{LOCAL} --maxscore-objective scores"),
    _variant(
        "normalized", "SoftTopk gates normalised", f"{LOCAL} --maxscore-normalize-gates",
    ),
    _variant(
        "sigmoid_gate", "sigmoid gates, flow maximises them",
        f"{LOCAL} --maxscore-gate score --moe-router-score-function sigmoid "
        "--maxscore-objective scores",
    ),
    _variant("zloss", "with z-loss 1e-3", f"{LOCAL} --moe-z-loss-coeff 1e-3"),
    _variant("capacity125", "capacity factor 1.25", f"{LOCAL} --maxscore-capacity-factor 1.25"),
    _variant("annealed", "softmax, annealed second gate, aux loss, as the authors' code",
             f"{_ANNEALED} --maxscore-scope sequence", gate_scale=0.5, against="sequence"),
    _variant(
        "greedy", "the authors' greedy, then Hungarian, per sequence", _SEQUENCE,
        against="sequence", script="tools/study_greedy.py",
    ),
    _variant("decay0", "prices of the last batch only", f"{LOCAL} --maxscore-price-decay 0"),
    _variant("decay99", "price decay 0.99", f"{LOCAL} --maxscore-price-decay 0.99"),
    # From before MaxScore had an aux loss.
    _variant(
        "by_prices", "by average prices in training too, no aux loss", f"{LOCAL} {NO_AUX}",
        ABLATION[0], script="tools/study_prices.py",
    ),
    _variant(
        "aux_tenth", "with aux loss 1e-1, temperature tuned without",
        f"{LOCAL} {NO_AUX} {AUX} 1e-1", ABLATION[0],
    ),
)  # fmt: skip
ARMS = {arm.name: arm for arm in (*CORE, *ABLATION, *EXPLORATORY)}


@dataclass(frozen=True)
class Size:
    """A model and how long it is trained.

    Attributes:
        name: in files and results.
        flags: of the model and of training.
        iterations: training steps.
        tokens_per_step: of one step.
        seconds_per_step: on one core, for the estimate of what is to come.
        valid_sequences: evaluated at the end, None for all.
    """

    name: str
    flags: str
    iterations: int
    tokens_per_step: int
    seconds_per_step: float
    valid_sequences: int | None = None


# Also the demo's.
_TRAINED = (
    MODEL
    + """
    --micro-batch-size 8 --global-batch-size 16 --lr-decay-style cosine --min-lr 2e-4
    --lr-warmup-fraction 0.1 --weight-decay 0.1 --clip-grad 1.0 --log-interval 1
"""
)
SIZES = {
    "small": Size("small", _TRAINED, 300, 4096, 1.1),
    "quick": Size("quick", _TRAINED, 30, 4096, 1.1, valid_sequences=48),
    # Two epochs of the prose; compared at what "small" is tuned to.
    "long": Size("long", _TRAINED, 1200, 4096, 1.1),
}
FAMILIES = {
    "code": "the sources of this Python's standard library (PSF licence)",
    "prose": "documentation of six OpenStack services, from their source distributions on PyPI "
    "(Apache-2.0)",
}
# Where the prose comes from; the versions fix the text.
PROSE_PACKAGES = (
    "cinder==29.0.0", "ironic==39.0.0", "keystone==30.0.0", "manila==23.0.1", "neutron==29.0.0",
    "nova==34.0.0",
)  # fmt: skip


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
        purpose: what it counts for: tuning, core, ablation or exploratory.
        data: digest of tokenizer and data sets.
        gain: factor on top of the arm's gate scale, one of :data:`GAINS`.
        device: "cpu", or "cuda" for one device that all runs share.
    """

    family: str
    size: Size
    arm: Arm
    value: str
    learning_rate: str
    seed: int
    purpose: str
    data: str = ""
    gain: str = "1"
    device: str = "cpu"

    @property
    def scale(self) -> float:
        """Return what the gates are multiplied by."""
        return (self.arm.gate_scale or 1.0) * float(self.gain)

    @property
    def flags(self) -> str:
        """Return the run's flags, all but paths."""
        size = self.size
        text = (
            f"{size.flags} --train-iters {size.iterations} --lr-decay-iters {size.iterations} "
            f"--lr {self.learning_rate} --seed {self.seed} {self.arm.values[self.value]} "
            f"{self.arm.flags}"
        )
        if self.scale != 1.0:
            text += f" --moe-router-topk-scaling-factor {self.scale:g}"
        return " ".join(text.replace("ITERATIONS", str(size.iterations)).split())

    @property
    def key(self) -> str:
        """Return what identifies the run.

        It does not have the versions of this repository, Megatron and torch, which a result names.
        """
        arm, size = self.arm, self.size
        text = f"{REVISION} {self.family} {self.data} {arm.script} {arm.ranks} {size.name} "
        text += f"{size.valid_sequences} {self.flags}"
        if self.device != "cpu":
            text += f" {self.device}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """Return a short name for people."""
        setting = f" {self.arm.knob} {self.value}" if self.value else ""
        gain = f" gates times {self.scale:g}" if self.scale != 1.0 else ""
        return (
            f"{self.family} {self.arm.name}{setting} lr {self.learning_rate}{gain} seed {self.seed}"
        )
