#!/usr/bin/env bash
# Preference tuning of the model that runs/demo.sh made: of the model's own stories the best and the worst are a pair.
# On 2 CPU cores without bfloat16: 5 minutes. Run it again and it continues where it stopped.
source "$(dirname "$0")/setup.sh" requirements.txt
[ -e out/demo_sft ] || { echo "error: out/demo_sft is not there; run bash runs/demo.sh first" >&2; exit 2; }
start=$SECONDS
python -m tools.dpo config/demo_dpo.py --resume=True
echo "preference tuning took $(((SECONDS - start) / 60)) min $(((SECONDS - start) % 60)) s"
python sample.py --ckpt out/demo_dpo --words 帽子,消防员 --num 2 --temperature 0.5
