"""Forks do what new processes would: streams, status, ranks, time limits."""

from __future__ import annotations

import pytest

from tests import forked

RANKS = """
import os, signal, sys, time
print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], flush=True)
signal.signal(signal.SIGTERM, lambda *_: (print("ended"), sys.exit(0)))
if os.environ["RANK"] == sys.argv[1]:
    sys.exit(5)
time.sleep(float(sys.argv[2]))
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


def test_a_rank_that_fails_ends_the_others():
    # Rank 1 waits for no signal handler of rank 0, which may be cut off while it starts.
    done = forked.python("-c", RANKS.replace("if os", "time.sleep(2)\nif os"), 1, 200, ranks=2)
    assert done.returncode == 1
    assert sorted(done.stdout.splitlines()) == ["ended", "rank 0 of 2", "rank 1 of 2"]
    done = forked.python("-c", RANKS, "none", 0, ranks=3)
    assert done.returncode == 0 and done.stdout.count("of 3") == 3


def test_a_run_that_hangs_shows_where():
    with pytest.raises(forked.HungError, match="Fatal Python error: Aborted"):
        forked.python("-c", RANKS, "none", 600, ranks=2, timeout=2)
    assert forked.python("-c", "print('again')").stdout == "again\n"
