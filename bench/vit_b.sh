#!/usr/bin/env bash
# ViT-B/16 at 224, rank-64 dual adapters, a batch of 8: one fused task, 8 tasks and 64 tasks, and a folded LoRA,
# against the backbone. Writes bench/results/vit_b_dual64/report.{json,html} and the README's table; a quarter of an hour on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=runs/vit_b
results=bench/results/vit_b_dual64
python bench/random_tasks.py "$runs" --backbone vit_base_patch16_224 --tasks 64 --rank 64
python bench/random_tasks.py "$runs/lora" --backbone vit_base_patch16_224 --tasks 1 --rank 16 --kinds lora
export_() { utune-deploy export "${@:2}" --weights "$runs/backbone" -o "$runs/$1" --max-batch 8 --force; }
time export_ tasks64 "$runs"/task?.safetensors "$runs"/task??.safetensors
export_ tasks8 "$runs"/task[0-7].safetensors
export_ fused "$runs/task0.safetensors"
export_ folded "$runs/lora/task0.safetensors"
utune-deploy bench "$runs/tasks8" --against "$runs/tasks64" --against "$runs/fused" --against "$runs/folded" \
  -b 8 --rounds "${ROUNDS:-40}" --warmup 3 -o "$results" --force
python bench/tables.py
