"""Forks do what new processes would: streams, status, ranks, time limits."""

from __future__ import annotations

import pytest

from tests import forked

RANKS = """
import os, sys, time
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], flush=True)
time.sleep(float(sys.argv[1]))
"""
# Rank 1 fails once rank 0 is ready to say that it was ended.
FAILING = """
import os, signal, sys, time
from pathlib import Path
ready = Path(sys.argv[1])
if os.environ["RANK"] == "0":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("ended", flush=True)))
    ready.touch()
    time.sleep(200)
while not ready.exists():
    time.sleep(0.01)
sys.exit(5)
"""


def test_streams_status_arguments_and_environment():
    code = (
        "import os, sys; print(sys.argv, os.environ['GIVEN'], 'megatron.core' in sys.modules);"
        "print('to stderr', file=sys.stderr); sys.exit(3)"
    )
    done = forked.python("-c", code, 7, environment={"GIVEN": "yes"})
    assert done == forked.Done(3, "['-c', '7'] yes True\n", "to stderr\n")
    done = forked.python("-c", "raise ValueError('wrong')")
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "ValueError: wrong"
    assert "GIVEN" not in forked.python("-c", "import os; print(list(os.environ))").stdout
    assert forked.python("-m", "megatron_maxscore").stdout.startswith("usage: python -m")


def test_a_rank_that_fails_ends_the_others(tmp_path):
    done = forked.python("-c", FAILING, tmp_path / "ready", ranks=2)
    assert done.returncode == 1 and done.stdout == "ended\n"
    done = forked.python("-c", RANKS, 0, ranks=3)
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == [f"rank {rank} of 3" for rank in range(3)]


def test_a_run_that_hangs_shows_where():
    with pytest.raises(forked.HungError, match="Fatal Python error: Aborted"):
        forked.python("-c", RANKS, 600, ranks=2, timeout=2)
    assert forked.python("-c", "print('again')").stdout == "again\n"
