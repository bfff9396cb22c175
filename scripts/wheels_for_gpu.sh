#!/usr/bin/env bash
# What tests/gpu and scripts/bench_gpu.py need on a bare machine with torch, Triton and transformers
# but no network: wheels of the pinned versions, about 40 MB with SAELens for the comparison.
#   scripts/wheels_for_gpu.sh FOLDER [PYTHON_VERSION]     here, with a network
#   python3 -m pip install --no-index --no-deps --target site FOLDER/*.whl; export PYTHONPATH=site:.
#   python3 -m pytest --noconftest -q tests/gpu/on_card.py && python3 scripts/bench_gpu.py     there
set -euo pipefail
folder=${1:?give a folder for the wheels}
version=${2:-3.12}
here=$(cd "$(dirname "$0")/.." && pwd)
pip="$here/.venv/bin/python -m pip"
platforms="--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64"
pinned() { sed -n "s/^$1==\([^; ]*\).*/$1==\1/Ip" "$here/requirements.lock" "$here/requirements-embedded.lock"; }
mkdir -p "$folder"
for name in antlr4-python3-runtime py2store transformers-stream-generator; do
  wanted=$(pinned "$name")
  [ -z "$wanted" ] || $pip wheel -q --no-deps -w "$folder" "$wanted"
done
for name in hydra-core omegaconf pydantic pydantic_core annotated-types typing-inspection \
  sae-lens transformer-lens plotly plotly-express babe config2py dol i2 nltk python-dotenv \
  simple-parsing tenacity docstring_parser beartype better-abc fancy-einsum typeguard wandb datasets \
  dill multiprocess patsy jaxtyping platformdirs googleapis-common-protos truststore sniffio httpx2 \
  httpcore2 opentelemetry-api opentelemetry-sdk opentelemetry-proto \
  opentelemetry-semantic-conventions opentelemetry-exporter-otlp-proto-common \
  opentelemetry-exporter-otlp-common opentelemetry-exporter-otlp-proto-http \
  opentelemetry-exporter-http-transport; do
  wanted=$(pinned "$name")
  [ -z "$wanted" ] || $pip download -q --no-deps --only-binary=:all: --implementation cp \
    --python-version "$version" $platforms -d "$folder" "$wanted"
done
du -sh "$folder"
