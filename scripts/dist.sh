#!/usr/bin/env bash
# Wheel and sdist into dist/, checked; then the wheel alone in an empty environment, without Node or a compiler, and tried there.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
rm -rf dist
"$python" -m build --quiet --outdir dist
"$python" -m twine check --strict dist/*
"$(dirname "$python")/check-wheel-contents" dist/*.whl

fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
"$python" -m venv "$fresh/venv"
pip="$fresh/venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt"
$pip "${TORCH:-torch==2.13.0}"
$pip "$(echo dist/*.whl)[plot]" pytest
cp scripts/smoke.py "$fresh"
cd "$fresh" # so that nothing of the checkout is found
env -i PATH="$fresh/venv/bin:/usr/bin:/bin" HOME="$fresh" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 CC=false CXX=false "$fresh/venv/bin/python" smoke.py
