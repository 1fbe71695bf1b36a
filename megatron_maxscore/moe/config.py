"""The options of MaxScore routing.

:class:`MaxScoreConfig` is the one list of options; :mod:`fields` makes flags of them, and
:mod:`checks` says what they cannot be combined with.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_maxscore.moe.recording import parse_numbers

PREFIX = "maxscore_"
# Options of Megatron's with which the number of tokens of a microbatch is not known in advance.
VARIABLE_LENGTHS = ("variable_seq_lengths", "hybrid_context_parallel")
# Expert loads may be bounded less tightly than any model needs, but numbers must stay numbers.
_LARGEST_FACTOR = 4096.0


def option(default: Any, help_text: str, **argparse_meta: Any) -> Any:
    """Declare an option with what ``--help`` says of it."""
    return field(default=default, metadata={"argparse_meta": {"help": help_text, **argparse_meta}})


def flag(name: str) -> str:
    """Return the command-line flag of an option."""
    return "--maxscore-" + name.replace("_", "-")


@dataclass(frozen=True)
class MaxScoreConfig:
    """Options of MaxScore routing; the defaults are those of the command line.

    Raises:
        ValueError: a value is out of range or not available yet; names the flag and the fix.
    """

    scope: Literal["local", "group", "sequence"] = option(
        "local",
        "Whose tokens form one flow problem. local: each rank's own, with quotas that balance "
        "the experts without any communication. group: those of all ranks that share the experts. "
        "sequence: every sequence alone, over the ranks among which it is split.",
    )
    preset: Literal["none", "servable"] = option(
        "none",
        "servable: gates and objective of the score function, so that prices become the bias of "
        "experts that servers know: with softmax as in ERNIE 4.5, with sigmoid as in GLM-4. "
        "Checkpoints then export to Hugging Face directories.",
    )
    mode: Literal["auto", "exact", "bounded"] = option(
        "auto",
        "auto: bounded on GPUs, exact on the CPU. bounded: solved on the GPU, always feasible, "
        "with a certified gap. exact: the optimum, solved on the CPU, to which scores on a GPU are "
        "copied.",
    )
    capacity_factor: float = option(
        1.0,
        "Capacity of an expert over an equal share of the assignments, at least 1. Nothing is "
        "ever dropped; at 1.0 every expert gets exactly its share.",
    )
    gate: Literal["auto", "soft_topk", "score"] = option(
        "auto",
        "Weight of an expert's output. soft_topk: SoftTopk of the logits, unchanged. score: what "
        "Megatron makes of --moe-router-score-function for the chosen experts. auto: soft_topk for "
        "softmax, score for sigmoid and sqrtsoftplus.",
    )
    variant: Literal["bientropic", "softmax"] = option(
        "bientropic",
        "Variant of SoftTopk. bientropic: entries in (0, 1). softmax: k times softmax.",
    )
    temperature: float | None = option(
        None,
        "Temperature of SoftTopk, in the unit of the logits. Default: half of what the logits' "
        "standard deviation is at first, --init-method-std times the root of --hidden-size.",
    )
    normalize_gates: bool = option(
        False, "Divide SoftTopk's values of a token's chosen experts by their sum."
    )
    anneal_steps: int = option(
        0,
        "With N > 0 multiply all gates of a token but its largest by max(4 - 3 step / N, 1), as "
        "the code that the paper's authors released does with 30000.",
    )
    objective: Literal["auto", "logits", "scores"] = option(
        "auto",
        "What the flow maximises. scores: SoftTopk values, or with --maxscore-gate score the "
        "values of the score function. auto: scores with --moe-router-enable-expert-bias, which is "
        "added to them, and with --maxscore-preset servable; logits otherwise.",
    )
    eval_routing: Literal["both", "price", "flow"] = option(
        "both",
        "Routing in evaluation. price: each token takes its best experts by score minus price, "
        "which is causal. flow: as in training. both: validation reports price, then flow.",
    )
    price_decay: float = option(
        0.9, "Decay per global batch of the running average of expert prices, in [0, 1)."
    )
    fixed_shape: list[int] | None = option(  # noqa: RUF009
        None,
        "Positions of each sequence, and number of sequences, that every rank routes in every "
        "microbatch; 0 0 if they may differ. Where loads then follow from the shape, ranks need "
        "not tell each other how many tokens they send. Default: what --seq-length, "
        "--micro-batch-size and the parallel sizes say; in a training loop of your own 0 0.",
        nargs=2,
        metavar=("LENGTH", "BATCH"),
    )
    stats_file: str | None = option(
        None,
        "Write one JSON line per iteration to this file: expert loads, dropped assignments, "
        "maxvio, gap, time in solve. Works with --moe-router-type topk too.",
    )
    record_dir: str | None = option(
        None,
        "Write what the flow is asked to solve in training, scores included, to this directory: "
        "one file per solve. Meant for a few steps.",
    )
    record_layers: str | None = option(
        None, "Layers to record, numbered from 1, like 1,3-4; all without this option."
    )
    record_steps: str | None = option(
        None, "Iterations to record, numbered from 1, like 10,20-21; all without this option."
    )

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            self._check_type(item.name, typing.get_type_hints(type(self))[item.name])
        for name, ok, range_text in (
            (
                "capacity_factor",
                1.0 <= self.capacity_factor <= _LARGEST_FACTOR,
                "at least 1, at most 4096",
            ),
            (
                "temperature",
                self.temperature is None or 0.0 < self.temperature < math.inf,
                "greater than 0, and finite",
            ),
            ("price_decay", 0.0 <= self.price_decay < 1.0, "in [0, 1)"),
            ("anneal_steps", self.anneal_steps >= 0, "at least 0"),
        ):
            if not ok:
                raise ValueError(f"{flag(name)} must be {range_text}, got {getattr(self, name)}")
        if self.gate == "score":
            self._refuse_soft_topk_options("--maxscore-gate score")
        if self.preset == "servable":
            for name, given in (("gate", "soft_topk"), ("objective", "logits")):
                if getattr(self, name) == given:
                    raise ValueError(
                        f"{flag(name)} {given} cannot be served, so it contradicts "
                        "--maxscore-preset servable; leave one of them out"
                    )
            self._refuse_soft_topk_options("--maxscore-preset servable")
        for name in ("record_layers", "record_steps"):
            text = getattr(self, name)
            if text is None:
                continue
            if self.record_dir is None:
                raise ValueError(
                    f"{flag(name)} {text} chooses what --maxscore-record-dir records; add "
                    f"--maxscore-record-dir, or leave {flag(name)} out"
                )
            try:
                parse_numbers(text)
            except ValueError as error:
                raise ValueError(f"{flag(name)}: {error}") from None

    def _refuse_soft_topk_options(self, cause: str) -> None:
        for name in ("normalize_gates", "anneal_steps", "temperature", "variant"):
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise ValueError(
                    f"{flag(name)} is for --maxscore-gate soft_topk, which {cause} replaces; "
                    "leave one of them out"
                )

    def _check_type(self, name: str, hint: Any) -> None:
        """Refuse a value of another type: JSON's "no" would count as true."""
        value, kinds = getattr(self, name), typing.get_args(hint)
        if value is None and type(None) in kinds:
            return
        if typing.get_origin(hint) is Literal:
            ok, wanted = value in kinds, "one of " + ", ".join(kinds)
        elif hint is bool:
            ok, wanted = isinstance(value, bool), "true or false"
        elif hint is int:
            ok, wanted = type(value) is int, "a whole number"
        elif hint is float or float in kinds:
            ok = isinstance(value, (int, float)) and not isinstance(value, bool)
            wanted = "a number"
        elif str in kinds:
            ok, wanted = isinstance(value, str) and bool(value), "a text"
        else:
            shape = list(value) if isinstance(value, (list, tuple)) else []
            ok = len(shape) == 2 and all(type(size) is int and size >= 0 for size in shape)
            wanted = "two numbers, positions of a sequence and sequences, or 0 0"
        if not ok:
            raise ValueError(f"{flag(name)} must be {wanted}, got {value!r}")

    @classmethod
    def from_transformer_config(cls, config: Any) -> MaxScoreConfig:
        """Read the ``maxscore_*`` attributes of a TransformerConfig or parsed arguments."""
        present = {
            f.name: getattr(config, PREFIX + f.name)
            for f in dataclasses.fields(cls)
            if hasattr(config, PREFIX + f.name)
        }
        return cls(**present)

    def write_to(self, config: Any) -> None:
        """Make layers that are built from a configuration ours, with these options.

        Args:
            config: a TransformerConfig, or Megatron's parsed arguments; changed in place.
        """
        config.moe_router_type = "maxscore"
        for item in dataclasses.fields(self):
            setattr(config, PREFIX + item.name, getattr(self, item.name))

    def resolved_for(self, config: Any) -> MaxScoreConfig:
        """Return these options with ``auto`` for gate and objective replaced by the actual choice.

        Args:
            config: a TransformerConfig, or Megatron's parsed arguments.

        Raises:
            ValueError: the score function and an option contradict each other; names both.
        """
        score_function = getattr(config, "moe_router_score_function", None) or "softmax"
        has_bias = getattr(config, "moe_router_enable_expert_bias", False)
        is_softmax = score_function == "softmax"
        if has_bias and is_softmax:
            raise ValueError(
                "--moe-router-enable-expert-bias needs --moe-router-score-function sigmoid or "
                "sqrtsoftplus; use one of them, or leave the bias out"
            )
        if has_bias and self.objective == "logits":
            raise ValueError(
                "--maxscore-objective logits cannot be combined with "
                "--moe-router-enable-expert-bias, which is added to the scores; leave "
                "--maxscore-objective out"
            )
        if self.gate == "soft_topk" and not is_softmax:
            raise ValueError(
                "--maxscore-gate soft_topk replaces --moe-router-score-function "
                f"{score_function}; leave --maxscore-gate out, or leave the score function at "
                "softmax"
            )
        if not is_softmax:
            self._refuse_soft_topk_options(f"--moe-router-score-function {score_function}")
        gate, objective = self.gate, self.objective
        is_servable = self.preset == "servable"
        if gate == "auto":
            gate = "soft_topk" if is_softmax and not is_servable else "score"
        if objective == "auto":
            objective = "scores" if has_bias or is_servable else "logits"
        return dataclasses.replace(self, gate=gate, objective=objective)

    def temperature_for(self, config: Any) -> float:
        """Return SoftTopk's temperature in a model, in the unit of the logits.

        A router's input is normalised, so logits start with a standard deviation of
        ``init_method_std * sqrt(hidden_size)``. What SoftTopk makes of them depends only on the
        ratio of the temperature to this deviation. By default the ratio is one half, for which
        docs/evidence/study/first gives the reason.

        Args:
            config: a TransformerConfig.
        """
        if self.temperature is not None:
            return self.temperature
        return 0.5 * float(config.init_method_std) * math.sqrt(config.hidden_size)
