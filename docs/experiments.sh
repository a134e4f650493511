#!/usr/bin/env bash
# Records the outputs of docs/experiments.md: bash docs/experiments.sh FOLDER, with the environment's bin folder on PATH.
# Clones this repository into FOLDER, which must not exist, runs the commands and prints them with their outputs. This
# takes a few minutes.
set -euo pipefail
git clone --quiet "$(dirname "$0")/.." "$1"
cd "$1"
git switch --quiet --create small
export DVC_NO_ANALYTICS=1 MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR=false
git config user.name "A Reader" && git config user.email reader@example.com

show() { printf '\n$ %s\n' "$1"; eval "$1" 2>&1; }

show 'cp presets/smoke.yaml params.yaml'
show "sed -i -E 's/(n_embd|block_size): 32/\1: 64/; s/max_steps: 60/max_steps: 300/; s/(eval|save)_interval: 20/\1_interval: 60/' params.yaml"
show 'git commit --quiet --all --message "A small model"'
show 'dvc repro'
show 'git commit --quiet --all --message "Its results"'
show 'dvc exp run --name no-dropout -S model.dropout=0.0'
show 'git diff params.yaml'
show 'dvc params diff'
show 'dvc metrics diff'
show 'dvc exp run --temp --name seed-7 -S train.seed=7'
show "dvc exp run --queue --name grid -S 'train.learning_rate=choice(0.005,0.02)' -S 'model.n_layer=range(2,4)'"
show 'dvc queue start --jobs 2'
until [ "$(dvc exp list --name-only | grep -c grid)" = 4 ]; do sleep 3; done
show 'dvc queue status'
show "dvc exp show --only-changed --hide-workspace --sort-by val/best_loss --drop 'Created|State|Executor|.*pt'"
show 'dvc queue logs grid-4 | grep "loss .* nats"'
show 'dvc plots diff HEAD no-dropout grid-4'
show 'dvc exp apply grid-4'
show 'git commit --quiet --all --message "Three layers, no dropout"'
show 'git checkout --quiet HEAD~1 && dvc checkout'
show 'python -m gpt generate --checkpoint chargpt_nano.pt --prompt "ROMEO:" --max-new-tokens 80'
show 'git checkout --quiet - && dvc checkout --quiet'
show 'head -2 generation_out.txt'
export MLFLOW_TRACKING_URI=sqlite:///mlflow.db
show 'mlflow runs list --experiment-id 1'
show "mlflow artifacts download -r $(mlflow runs list --experiment-id 1 | awk '/ grid-2 / {print $NF}') -a chargpt_nano.pt -d old"
show 'python -m gpt generate --checkpoint old/chargpt_nano.pt --prompt "ROMEO:" --max-new-tokens 80'
show 'dvc exp list --all-commits'
show 'dvc exp remove grid-1 grid-2 grid-3 grid-4'
show "python -m stages.sweep search --trials 8 -S 'train.learning_rate=tag(log,interval(0.001,0.1))' -S 'model.n_layer=range(2,4)' -S model.dropout=0.0"
