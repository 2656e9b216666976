#!/usr/bin/env bash
# The whole way on a laptop: make the stories and the tokens, train a small model, let it tell three
# stories; teach it to follow instructions, let it tell two to order; teach it which of its stories are better. On
# 2 CPU cores with bfloat16 the stories take about 3 minutes after the packages are there, the instructions 4 more
# and the preferences 3; without bfloat16 several times as long.
# Run it again and it goes on where it stopped.
source "$(dirname "$0")/setup.sh" requirements.txt
[ -e data/demo/meta.json ] || python prepare.py
python train.py config/demo.py --resume=True
# So small a model tells more coherent stories when it takes fewer chances.
python sample.py --ckpt out/demo --num 3 --temperature 0.5

[ -e data/demo_sft/meta.json ] || python prepare.py --task sft --tokenizer data/demo/tokenizer.model
python sft.py config/demo_sft.py --resume=True
python sample.py --ckpt out/demo_sft --words 帽子,消防员 --num 2 --temperature 0.5

python dpo.py config/demo_dpo.py --resume=True
python sample.py --ckpt out/demo_dpo --words 帽子,消防员 --num 2 --temperature 0.5
