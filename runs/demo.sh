#!/usr/bin/env bash
# The pipeline on a laptop: prepare the stories, pretrain a small model and sample from it; fine-tune it to follow
# instructions and ask it for a story. Run it again and it continues where it stopped.
# On 2 quiet CPU cores with bfloat16, with packages installed: pretraining about 3 minutes, instructions 4. Without
# bfloat16 it takes several times as long; the settings --minutes=3 and --minutes=4 of train.py and sft.py then train
# as far as that time goes. Preference tuning comes after it: bash runs/demo_dpo.sh
source "$(dirname "$0")/setup.sh" requirements.txt
[ -e data/demo/meta.json ] || python prepare.py
python train.py config/demo.py --resume=True
# A model this small writes more coherent stories at a low temperature.
python sample.py --ckpt out/demo --num 3 --temperature 0.5

[ -e data/demo_sft/meta.json ] || python prepare.py --task sft --tokenizer data/demo/tokenizer.model
python sft.py config/demo_sft.py --resume=True
python sample.py --ckpt out/demo_sft --words 帽子,消防员 --num 2 --temperature 0.5
