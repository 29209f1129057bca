#!/usr/bin/env bash
# The report of the README: ViT-B/16 with 1, 8 and 64 tasks, by rank, mix, precision and kind of tuner; torch, PEFT and an
# engine per task beside it; UniPT for every task at once; Swin and Video Swin with BAPAT. Random weights: time does not
# read values, so int8's agreement is not asked for.
# Writes bench/results/report/ and the README's tables. Exports what is not there yet; an hour on two cores.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=runs/report
vit=vit_base_patch16_224

tasks() { # NAME BACKBONE TASKS RANK KIND: random tasks
  [ -e "$runs/$1/backbone" ] || python bench/random_tasks.py "$runs/$1" --backbone "$2" --tasks "$3" --rank "$4" --kinds "$5"
}
bundle() { # NAME FOLDER OF TASKS, DELTAS, OPTIONS: one engine
  [ -e "$runs/$1/manifest.json" ] || utune-deploy export --max-batch 8 "${@:3}" --weights "$runs/$2/backbone" \
    -o "$runs/$1" --name "$(tr -c "[:alnum:]\n" - <<< "$1")" --force
}

tasks dual64 $vit 64 64 dual
bundle "64 tasks" dual64 "$runs"/dual64/task?.safetensors "$runs"/dual64/task??.safetensors
bundle "8 tasks" dual64 "$runs"/dual64/task[0-7].safetensors
bundle "one task" dual64 "$runs"/dual64/task0.safetensors
tasks lora $vit 8 16 lora
bundle "8 LoRA tasks" lora "$runs"/lora/task?.safetensors
bundle "one LoRA task, folded" lora "$runs"/lora/task0.safetensors
for rank in 8 16; do
  tasks dual$rank $vit 8 $rank dual
  bundle "8 tasks of rank $rank" dual$rank "$runs"/dual$rank/task?.safetensors
done
for kind in serial patt bapat prefix prompt; do
  tasks $kind $vit 1 16 $kind
  bundle "one task of $kind" $kind "$runs"/$kind/task0.safetensors
done
[ -e "$runs/noise.npz" ] || python -c "import numpy as np; np.savez('$runs/noise.npz',
  images=np.random.default_rng(0).standard_normal((64, 3, 224, 224), dtype='f4'))"
bundle "8 tasks in int8" dual64 "$runs"/dual64/task[0-7].safetensors --precision int8 --calibration "$runs/noise.npz" \
  --least-agreement 0.001 --least-cosine 0.001
tasks unipt $vit 16 0 unipt
bundle "16 UniPT tasks" unipt "$runs"/unipt/task?.safetensors "$runs"/unipt/task??.safetensors --fan-out
tasks swin swin_base_patch4_window7_224 1 16 bapat
bundle "one Swin-BAPAT task" swin "$runs"/swin/task0.safetensors
tasks video video_swin_base 1 16 bapat
bundle "one video BAPAT task" video "$runs"/video/task0.safetensors --max-batch 1

