#!/usr/bin/env bash
# The whole way on a laptop: make the stories and the tokens, train a small model, let it tell three
# stories. On 2 CPU cores this takes about 5 minutes after the packages are there.
# Run it again and it goes on where it stopped.
source "$(dirname "$0")/setup.sh" requirements.txt
[ -e data/demo/meta.json ] || python prepare.py
python train.py config/demo.py --resume=True
# So small a model tells more coherent stories when it takes fewer chances.
python sample.py --ckpt out/demo --num 3 --temperature 0.5
