#!/usr/bin/env bash
# Measure every figure and draw every picture of README and docs again: some hours on two cores.
#     benchmarks/all.sh MODEL      MODEL: a folder of SmolLM2-135M-Instruct
set -euo pipefail
model=$(realpath -e "${1:?usage: benchmarks/all.sh MODEL}")
cd "$(dirname "$0")/.."
python benchmarks/cartpole.py
python benchmarks/tasks.py
python benchmarks/ppo.py
python benchmarks/curves.py
python benchmarks/grpo.py --model "$model"
python benchmarks/dpo.py --model "$model"
python benchmarks/ablations.py
python tests/mutants/run.py --csv benchmarks/mutants.csv
python benchmarks/readme.py
python docs/generate.py
