#!/usr/bin/env bash
# ViT-B/16 at 224, 8 tasks of rank-64 dual adapters: fused single task and mixed batch against the backbone.
# Writes bench/results/vit_b_dual64/report.{json,html}; about ten minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=runs/vit_b
python bench/random_tasks.py "$runs" --backbone vit_base_patch16_224 --tasks 8 --rank 64
utune-deploy export "$runs"/task?.safetensors --weights "$runs/backbone" -o "$runs/mixed" --max-batch 8 --force
utune-deploy export "$runs/task0.safetensors" --weights "$runs/backbone" -o "$runs/fused" --max-batch 8 --force
utune-deploy bench "$runs/mixed" --against "$runs/fused" -b 8 --rounds "${ROUNDS:-40}" --warmup 3 \
  -o bench/results/vit_b_dual64 --force
