# Sourced by the other scripts: makes or reuses .venv in the repository's root and installs the
# project with the extras named in $MAXSCORE_EXTRAS. Touches nothing else but pip's cache.

MAXSCORE_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$MAXSCORE_ROOT"

# Prints the version of an interpreter if running it shows one that is new enough.
# Shims exist that are found but fail when run.
maxscore_is_new_enough() {
  [ "$("$1" -c 'import sys; print(int(sys.version_info >= (3, 12)))' 2>/dev/null)" = 1 ]
}

maxscore_find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    if maxscore_is_new_enough "$PYTHON"; then echo "$PYTHON"; return 0; fi
    echo "error: PYTHON=$PYTHON does not run as Python 3.12 or newer; point it to one" >&2
    return 1
  fi
  for candidate in python3.13 python3.12 python3; do
    if maxscore_is_new_enough "$candidate"; then echo "$candidate"; return 0; fi
  done
  for candidate in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.*/bin/python; do
    if maxscore_is_new_enough "$candidate"; then echo "$candidate"; return 0; fi
  done
  echo "error: no Python 3.12 or newer found; install one (apt install python3.12-venv, or pyenv install 3.12) or set PYTHON" >&2
  return 1
}

# Succeeds if .venv can be used: a Python that is new enough, with pip.
maxscore_has_venv() {
  maxscore_is_new_enough .venv/bin/python && .venv/bin/python -m pip --version >/dev/null 2>&1
}

maxscore_setup() {
  local extras="$1" stamp=".venv/.maxscore-$1" wanted python
  if ! maxscore_has_venv; then
    if [ -e .venv ] && [ -z "$(ls -d .venv/.maxscore-* 2>/dev/null)" ]; then
      echo "error: .venv is not of these scripts' making, and has no Python 3.12 or newer with pip; move it away, or install that into it" >&2
      return 1
    fi
    python="$(maxscore_find_python)" || return 1
    echo "Making .venv with $("$python" --version)"
    rm -rf .venv
    # Marked before it is made: one that was interrupted is made anew.
    mkdir .venv
    touch .venv/.maxscore-made
    "$python" -m venv .venv || {
      echo "error: $python cannot make a virtual environment; install its venv package (apt install python3-venv) or set PYTHON" >&2
      return 1
    }
  fi
  wanted="$(cat setup.py pyproject.toml tools/constraints.txt | cksum)"
  if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    echo "Installing the project with the extra '$extras' into .venv (about 5.5 GB, a minute or two)"
    .venv/bin/python -m pip install --quiet --constraint tools/constraints.txt \
      --editable ".[$extras]" || {
      echo "error: pip could not install the project; its message is above" >&2
      return 1
    }
    echo "$wanted" >"$stamp"
  fi
  export PATH="$MAXSCORE_ROOT/.venv/bin:$PATH" VIRTUAL_ENV="$MAXSCORE_ROOT/.venv"
  # The machine's cores are shared by several ranks or test workers.
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
}
