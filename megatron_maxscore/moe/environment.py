"""Options from the environment, for stock scripts that are started with ``--spec``."""

from __future__ import annotations

import dataclasses
import json
import os

from megatron_maxscore.moe.config import MaxScoreConfig, flag

VARIABLE = "MEGATRON_MAXSCORE"


def options_from_environment(given: MaxScoreConfig | None = None) -> MaxScoreConfig:
    """Return the options that the environment variable names; the others are as given.

    Args:
        given: from flags or a checkpoint; None stands for the defaults.

    Raises:
        ValueError: it is no JSON object, has unknown fields or wrong values, or says something else
            than a flag.
    """
    given = given or MaxScoreConfig()
    text = os.environ.get(VARIABLE, "{}")
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{VARIABLE} is not JSON ({error}): {text}") from None
    if not isinstance(values, dict):
        raise ValueError(f'{VARIABLE} must be a JSON object like {{"scope": "group"}}, not {text}')
    names = [f.name for f in dataclasses.fields(MaxScoreConfig)]
    unknown = sorted(values.keys() - set(names))
    if unknown:
        raise ValueError(f"{VARIABLE} has unknown options {unknown}; there are {', '.join(names)}")
    for name, value in values.items():
        own = getattr(given, name)
        if own not in (value, getattr(MaxScoreConfig(), name)):
            raise ValueError(
                f"{VARIABLE} says {name} {value!r}, and {flag(name)} {own!r}; leave one of them out"
            )
    try:
        return dataclasses.replace(given, **values)
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {error}") from None
