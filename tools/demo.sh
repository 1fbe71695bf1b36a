#!/usr/bin/env bash
# Set up .venv and pretrain the demo models on CPU: MaxScore, stock top-k, and a pipeline layout.
# Options are those of python -m megatron_maxscore demo; --help lists them.
set -euo pipefail
# shellcheck source=tools/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
maxscore_setup demo
exec python -m megatron_maxscore demo "$@"
