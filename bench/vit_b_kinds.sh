#!/usr/bin/env bash
# ViT-B/16 at 224, eighteen tasks of eighteen methods in one engine: export, with its check against torch.
# About fifteen minutes on two cores; ROWS of a batch are mixed tasks.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=runs/vit_b_kinds
python bench/random_tasks.py "$runs" --backbone vit_base_patch16_224 --tasks 18 --rank 8 --classes 20 --kinds all
utune-deploy export "$runs"/task?.safetensors "$runs"/task1?.safetensors --weights "$runs/backbone" \
  -o "$runs/mixed" --max-batch 4 --force
