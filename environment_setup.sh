#!/usr/bin/env bash
# Makes the environment that Sana and its tests run in. Safe to run again: nothing is done when it is up to date.
#   ./environment_setup.sh sana      a conda environment named sana (then: conda activate sana)
#   ./environment_setup.sh           .venv in this folder (then: source .venv/bin/activate); also where conda is absent
# PYTHON=/path/to/python chooses the interpreter of .venv (3.11 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

say() { printf 'environment: %s\n' "$*"; }
fail() { printf 'environment: %s\n' "$*" >&2; exit 1; }

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3 python; do
    if command -v "$candidate" >/dev/null && new_enough "$candidate"; then command -v "$candidate"; return; fi
  done
  fail "no Python 3.11 or newer was found; install one or set PYTHON=/path/to/python."
}

use_conda() {
  local name=$1 prefix
  prefix="$(conda info --base)/envs/$name"
  [ -x "$prefix/bin/python" ] || prefix="$(conda env list | awk -v name="$name" '$1 == name {print $NF}')"
  if [ ! -x "$prefix/bin/python" ]; then
    say "creating the conda environment $name"
    conda create -y -n "$name" python=3.11 pip
    prefix="$(conda env list | awk -v name="$name" '$1 == name {print $NF}')"
  fi
  new_enough "$prefix/bin/python" || fail "the conda environment $name has no Python 3.11 or newer."
  environment=$prefix
  activate="conda activate $name"
}

use_venv() {
  environment="$PWD/.venv"
  activate="source .venv/bin/activate"
  if [ ! -x .venv/bin/python ] || ! new_enough .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    local python
    python="$(find_python)"
    say "creating .venv with $python"
    "$python" -m venv --clear .venv || fail "$python cannot make a virtual environment; on Debian: apt-get install python3-venv."
  fi
}

if [ $# -gt 1 ]; then fail "usage: ./environment_setup.sh [name of a conda environment]"; fi
if [ $# -eq 1 ] && command -v conda >/dev/null; then
  use_conda "$1"
else
  if [ $# -eq 1 ]; then say "conda is not here, so .venv is used and the name $1 is not needed"; fi
  use_venv
fi

# What was installed, and for which folder: the editable install points here.
stamp="$environment/.sana-environment"
wanted="$(cat requirements.lock pyproject.toml | cksum) $PWD"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
  say "up to date ($activate)"
  exit 0
fi
rm -f "$stamp"
say "installing the locked packages into $environment"
"$environment/bin/python" -m pip install --disable-pip-version-check -q -r requirements.lock
"$environment/bin/python" -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation -e .
"$environment/bin/python" -c 'import app, sana, tools, torch, torchvision' || fail "the installed packages do not import."
printf '%s' "$wanted" >"$stamp"
say "ready; activate it with: $activate"
