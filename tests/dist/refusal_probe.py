"""Parse and check arguments of many configurations in one process; print what was said."""

import json
import os
import sys

from megatron.training import arguments

CASES = json.loads(os.environ["REFUSALS"])

answers = {}
for name, flags in CASES.items():
    sys.argv = ["script.py", *flags.split()]
    try:
        args = arguments.parse_args(None, False)
        arguments.validate_args(args, {"tokenizer_type": "NullTokenizer"})
        answers[name] = None
    except (ValueError, AssertionError) as error:
        answers[name] = str(error)
print("ANSWERS " + json.dumps(answers), flush=True)
