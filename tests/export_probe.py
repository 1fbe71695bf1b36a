"""Print, as JSON, what stands against each export format in launches given as JSON arguments."""

from __future__ import annotations

import argparse
import json
import sys


def main():
    """Parse each command line as a launch does, not validated, and ask the formats."""
    from megatron_maxscore import cpu, training

    cpu.enable()
    training.install()
    from megatron.training import arguments

    from megatron_maxscore.export import refusals

    found = {}
    for name, flags in json.loads(sys.argv[1]).items():
        parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
        found[name] = refusals(parser.parse_args(flags.split()))
    print("FOUND", json.dumps(found))


if __name__ == "__main__":
    main()
