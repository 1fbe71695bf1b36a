#!/usr/bin/env bash
# Set up .venv and pretrain the demo models on CPU: MaxScore, stock top-k, and a pipeline layout.
# Options: --data DIRECTORY, --output DIRECTORY, --iterations N, --pipeline-iterations N.
set -euo pipefail
case " $* " in *" --help "* | *" -h "*) sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}"; exit 0 ;; esac
# shellcheck source=tools/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
maxscore_setup demo
exec python -m megatron_maxscore demo "$@"
