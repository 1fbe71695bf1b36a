"""``python -m megatron_maxscore COMMAND``: everything that the package does from a shell."""

from __future__ import annotations

import importlib
import os
import sys

# Command: module and what it does.
COMMANDS = {
    "launch": ("launch", "run a Megatron training script with MaxScore's options (under torchrun)"),
    "cpu": ("cpu.__main__", "run a stock Megatron script on the CPU (under torchrun)"),
    "check": ("commands.check", "say what MaxScore would do in a launch, without starting it"),
    "patch": ("patch", "put the options into a Megatron-LM fork, or take them out"),
    "prepare": ("commands.prepare", "turn text files into a tokenizer and Megatron data sets"),
    "evaluate": ("commands.evaluate", "evaluate a checkpoint on a data set, by prices and by flow"),
    "generate": ("commands.generate", "sample text from a checkpoint"),
    "harness": ("commands.harness", "evaluate a checkpoint with lm-evaluation-harness"),
    "export": ("commands.export", "write a checkpoint as a Hugging Face directory"),
    "import": ("commands.import_model", "make a checkpoint of a Hugging Face directory"),
    "demo": ("commands.demo", "pretrain small models on the CPU and compare routers"),
    "compile": ("commands.compile", "compile the solver's kernels ahead of time"),
}


def _usage() -> str:
    lines = ["usage: python -m megatron_maxscore COMMAND [ARGS...]", "", "commands:"]
    lines += [f"  {name:10s}{text}" for name, (_, text) in COMMANDS.items()]
    lines += ["", "python -m megatron_maxscore COMMAND --help shows a command's options."]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit status.

    Args:
        arguments: the command and its arguments; None takes those of the process.
    """
    given = sys.argv[1:] if arguments is None else arguments
    if not given or given[0] in ("-h", "--help"):
        print(_usage())
        return 0 if given else 2
    name, *rest = given
    if name not in COMMANDS:
        if os.environ.get("RANK", "0") == "0":
            known = ", ".join(COMMANDS)
            print(f"error: there is no command {name!r}; there are {known}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"megatron_maxscore.{COMMANDS[name][0]}")
    return module.main(rest) or 0


if __name__ == "__main__":
    raise SystemExit(main())
