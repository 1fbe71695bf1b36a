#!/usr/bin/env bash
# Check the kernels on a machine with a CUDA device: what could go wrong first, then times, all tests,
# and registers. Writes runs/gpu/; options go to tools/benchmarks/gpu.py. With WHEELS=DIRECTORY nothing is downloaded; on a machine with a network, fill it:
#   python3.12 -m pip download --dest DIRECTORY --constraint tools/constraints.txt '.[test]' setuptools wheel
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}"
  exit 0
fi
# Before 5.5 GB are installed.
nvidia-smi >/dev/null 2>&1 || {
  echo "error: nvidia-smi finds no GPU; run this on a machine that has one, with its driver" >&2
  exit 1
}
if [ -n "${WHEELS:-}" ]; then
  [ -d "$WHEELS" ] || { echo "error: WHEELS=$WHEELS is no directory" >&2; exit 1; }
  PIP_FIND_LINKS="$(cd "$WHEELS" && pwd)"
  export PIP_NO_INDEX=1 PIP_FIND_LINKS
fi
# shellcheck source=tools/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
maxscore_setup test
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
  echo "error: torch sees no CUDA device; run this on a machine that has one, and check its driver with nvidia-smi" >&2
  exit 1
}
mkdir -p runs/gpu
echo "== one launch, phase by phase, graph, no waits"
# A kernel that hangs blocks Python, where only a thread or another process can end it.
timeout -k 10 600 python -m pytest -q -m gpu --timeout 300 --timeout-method thread -x \
  tests/gpu/test_kernels.py -k "same_bits or graph or waits or beside" | tee runs/gpu/first.txt || failed=1
echo "== times"
python -m tools.benchmarks.gpu --output runs/gpu "$@" | tee runs/gpu/times.txt || failed=1
echo "== tests"
python -m pytest -q -m gpu --timeout 1200 --timeout-method thread --junitxml runs/gpu/tests.xml tests/gpu || failed=1
echo "== resources"
python -m tools.maintenance.kernel_report --output runs/gpu/kernels.md || failed=1
exit "${failed:-0}"
