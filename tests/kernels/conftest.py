"""Kernels run in Triton's interpreter, which has to be chosen before Triton is imported.

So these tests have a run of their own: ``TRITON_INTERPRET=1 python -m pytest tests/kernels``.
"""

from __future__ import annotations

import os

# Megatron compiles small functions, which is of no use here.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]
else:
    from tools.benchmarks import interpreted

    interpreted.install()
