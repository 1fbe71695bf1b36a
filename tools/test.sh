#!/usr/bin/env bash
# Set up .venv and run the checks and tests. --full adds the tests that take minutes each.
# Other options are passed on to pytest.
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
# shellcheck source=tools/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
maxscore_setup test

select=(-m "not full and not gpu")
if [ "${1:-}" = --full ]; then
  shift
  select=(-m "not gpu")
fi

echo "== ruff, mypy"
ruff check .
ruff format --check .
mypy
if [ "$#" -eq 0 ]; then
  echo "== pytest, Triton kernels in the interpreter"
  TRITON_INTERPRET=1 python -m pytest -n 2 --timeout 3600 "${select[@]}" tests/kernels
fi
echo "== pytest"
# Worksteal: tests differ from milliseconds to a minute.
exec python -m pytest -n 2 --dist worksteal --timeout 600 "${select[@]}" "$@"
