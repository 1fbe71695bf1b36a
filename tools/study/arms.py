"""What the study compares: routers, their settings, data families and model sizes.

Pure data: each name stands for flags of Megatron's command line.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

from megatron_maxscore.commands.demo import MODEL

NO_AUX = "--moe-router-load-balancing-type none"
MAXSCORE = "--moe-router-type maxscore"
# Part of every run's key: results of another revision of the study do not count.
REVISION = 3
# What tuning climbs on: peak learning rates, and factors on the gates of the chosen experts
# (--moe-router-topk-scaling-factor).
LEARNING_RATES = ("1e-3", "2e-3", "4e-3", "8e-3", "1.6e-2")
FACTORS = ("0.5", "1", "2", "4", "8")


class Setting(NamedTuple):
    """What an arm is run with, beside its flags: peak learning rate, factor on the gates."""

    learning_rate: str
    factor: str


# Where the tuning of most arms begins: at what it had found for most arms before.
START = Setting("2e-3", "4")


@dataclass(frozen=True)
class Arm:
    """One router.

    Attributes:
        name: in files and results.
        title: in tables.
        flags: of the router.
        setting: learning rate and factor that the first study has found; None if they are tuned.
        start: where tuning begins.
        factors: what tuning may multiply the gates by.
    """

    name: str
    title: str
    flags: str
    setting: Setting | None = None
    start: Setting = START
    factors: tuple[str, ...] = FACTORS


def _aux(coefficient: str) -> str:
    return f"--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff {coefficient}"


_BIAS = (
    f"{NO_AUX} --moe-router-enable-expert-bias --moe-router-score-function sigmoid "
    "--moe-router-bias-update-rate 3e-3"
)
CORE = (
    # One flag, and what the product makes of it.
    Arm("maxscore", "MaxScore", MAXSCORE, start=Setting("4e-3", "4")),
    Arm("dropless", "dropless top-k, aux loss", _aux("1e-1"), Setting("2e-3", "4")),
    Arm("bias", "top-k, expert bias", _BIAS, Setting("2e-3", "4")),
    Arm(
        "quantile", "quantile balancing",
        "--moe-router-load-balancing-type quantile_balancing "
        "--moe-router-quantile-balancing-ema 0.97",
        Setting("2e-3", "4"),
    ),
    Arm(
        "gshard", "top-k, aux loss, capacity 1, drops (GShard)",
        f"{_aux('1')} --moe-expert-capacity-factor 1.0", Setting("2e-3", "2"),
    ),
    Arm(
        "bias_capacity", "top-k, expert bias, capacity 1, drops",
        f"{_BIAS} --moe-expert-capacity-factor 1.0", Setting("2e-3", "4"),
    ),
)  # fmt: skip
# Routers that drop nothing but bound no load, and routers that bound it: what MaxScore's primary
# question names.
DROPLESS = ("dropless", "bias", "quantile")
BOUNDED = ("gshard", "bias_capacity")
# The other two of flow or top-k, SoftTopk or softmax gates.
FACTORIAL = (
    Arm("flow_plain_gates", "flow, top-k's softmax gates", f"{MAXSCORE} --maxscore-gate score"),
    # A capacity of all tokens: the flow is top-k.
    Arm(
        "plain_soft_gates", "top-k, SoftTopk gates, aux loss",
        f"{MAXSCORE} --maxscore-capacity-factor 8 {_aux('1e-1')}", Setting("4e-3", "4"),
    ),
)  # fmt: skip
SERVABLE = (
    Arm(
        "servable_sigmoid", "MaxScore, servable, sigmoid gates",
        f"{MAXSCORE} --maxscore-preset servable --moe-router-score-function sigmoid",
    ),
    Arm(
        "servable_softmax", "MaxScore, servable, softmax gates",
        # ERNIE 4.5 has no place for a factor.
        f"{MAXSCORE} --maxscore-preset servable", start=Setting("2e-3", "1"), factors=("1",),
    ),
)  # fmt: skip
# The recipe of the dropless arm, and one flag more: nothing is tuned for MaxScore.
ONE_FLAG = (
    Arm(
        "one_flag", "dropless top-k's recipe and one flag", f"{_aux('1e-1')} {MAXSCORE}",
        Setting("2e-3", "4"),
    ),
)  # fmt: skip
ARMS = {arm.name: arm for arm in (*CORE, *FACTORIAL, *SERVABLE, *ONE_FLAG)}


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


_EXPERTS = "--num-experts 16 --moe-router-topk 2 --moe-ffn-hidden-size 128"
_FINE_EXPERTS = "--num-experts 64 --moe-router-topk 6 --moe-ffn-hidden-size 40"
# MODEL is the demo's model.
_TRAINED = (
    MODEL
    + """
    --micro-batch-size 8 --global-batch-size 16 --lr-decay-style cosine --min-lr 2e-4
    --lr-warmup-fraction 0.1 --weight-decay 0.1 --clip-grad 1.0 --log-interval 1
"""
)
SIZES = {
    "small": Size("small", _TRAINED, 300, 4096, 0.8),
    "quick": Size("quick", _TRAINED, 30, 4096, 0.8, valid_sequences=48),
    # Each token of prose_large once.
    "long": Size("long", _TRAINED, 1200, 4096, 0.8),
    # Fine-grained: four times as many experts, each a third as wide.
    "fine": Size("fine", _TRAINED.replace(_EXPERTS, _FINE_EXPERTS), 300, 4096, 1.3),
}
FAMILIES = {
    "code": "the sources of this Python's standard library (PSF licence)",
    "prose": "documentation of six OpenStack services, from their source distributions on PyPI "
    "(Apache-2.0)",
    "prose_large": "that documentation and that of twenty more projects of OpenStack's",
}
_SIX = (
    "cinder==29.0.0", "ironic==39.0.0", "keystone==30.0.0", "manila==23.0.1", "neutron==29.0.0",
    "nova==34.0.0",
)  # fmt: skip
# Where the prose comes from; the versions fix the text.
PACKAGES = {
    "prose": _SIX,
    "prose_large": (
        *_SIX, "barbican==23.0.0", "bifrost==21.1.0", "designate==23.0.0", "glance==33.0.0",
        "horizon==27.0.0", "ironic-python-agent==13.0.0", "kolla-ansible==23.0.0",
        "magnum==23.0.0", "mistral==23.0.0", "octavia==19.0.0", "openstack-heat==27.0.1",
        "openstacksdk==4.22.0", "python-openstackclient==10.5.0", "rally==5.1.1",
        "sahara==19.0.0", "swift==2.38.3", "tacker==16.0.0", "tempest==47.0.0", "trove==26.0.0",
        "zun==18.0.0",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        family: data.
        size: model and length.
        arm: router.
        setting: learning rate and factor on the gates.
        seed: of weights and of the data's order.
        purpose: what it counts for, one of ``study.PURPOSES``.
        data: digest of tokenizer and data sets.
        device: "cpu", or "cuda" for one device that all runs share.
        milestones: steps after which the run is evaluated too, in order.
    """

    family: str
    size: Size
    arm: Arm
    setting: Setting
    seed: int
    purpose: str
    data: str = ""
    device: str = "cpu"
    milestones: tuple[int, ...] = ()

    @property
    def flags(self) -> str:
        """Return the run's flags, all but paths."""
        size = self.size
        text = (
            f"{size.flags} --train-iters {size.iterations} --lr-decay-iters {size.iterations} "
            f"--lr {self.setting.learning_rate} --seed {self.seed} {self.arm.flags}"
        )
        if self.setting.factor != "1":
            text += f" --moe-router-topk-scaling-factor {self.setting.factor}"
        return " ".join(text.split())

    @property
    def key(self) -> str:
        """Return what identifies the run.

        It does not have the versions of this repository, Megatron and torch, which a result names.
        """
        size = self.size
        text = f"{REVISION} {self.family} {self.data} {size.name} {size.valid_sequences} "
        text += self.flags
        if self.device != "cpu":
            text += f" {self.device}"
        if self.milestones:
            text += f" evaluated after {self.milestones}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def title(self) -> str:
        """Return a short name for people."""
        return (
            f"{self.family} {self.arm.name} lr {self.setting.learning_rate} "
            f"gates times {self.setting.factor} seed {self.seed}"
        )
