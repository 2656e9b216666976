#!/usr/bin/env bash
# A first model on a laptop: prepare the stories, train on stories and instructions together, and ask for stories. While
# it trains it prints a story now and then. Run it again and it continues where it stopped.
# On 2 CPU cores without bfloat16, with packages installed: 18 minutes. The setting --minutes=4 of sft.py trains as far
# as 4 minutes go. Preference tuning comes after it: bash runs/demo_dpo.sh
source "$(dirname "$0")/setup.sh" requirements.txt
start=$SECONDS
[ -e data/demo/meta.json ] || python prepare.py
[ -e data/demo_sft/meta.json ] || python prepare.py --task sft --tokenizer data/demo/tokenizer.model
python sft.py config/first.py --resume=True
# A model this small writes more coherent stories at a low temperature. There many begin alike, so give a beginning.
printf '\n== stories that begin with 小兔\n'
python sample.py --ckpt out/first --prompt 小兔 --num 2 --temperature 0.5
printf '\n== a story with 帽子 and 消防员\n'
python sample.py --ckpt out/first --words 帽子,消防员 --num 1 --temperature 0.5
printf '\n== the best of eight\n'
python sample.py --ckpt out/first --words 帽子,消防员 --best_of 8
echo "the demo took $(((SECONDS - start) / 60)) min $(((SECONDS - start) % 60)) s"
