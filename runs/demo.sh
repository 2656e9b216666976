#!/usr/bin/env bash
# A first model on any laptop with 2 CPU cores, in at most 10 minutes: pretraining, instruction tuning, stories.
# Run it again and it continues where it stopped.
source "$(dirname "$0")/setup.sh" requirements.txt
start=$SECONDS
printf '== prepare.py: 24,000 stories become tokens (less than a minute)\n'
[ -e data/demo/meta.json ] || python prepare.py
printf '\n== train.py: a model learns to write stories; it shows one now and then (at most 4 minutes)\n'
python train.py config/demo.py --resume=True
printf '\n== sample.py: two stories\n'
python sample.py --ckpt out/demo --num 2 --temperature 0.7
printf '\n== prepare.py: the stories become instructions and responses (less than a minute)\n'
[ -e data/demo_sft/meta.json ] || python prepare.py --task sft --tokenizer data/demo/tokenizer.model
printf '\n== sft.py: the model learns to write the story it is asked for (at most 4.2 minutes)\n'
python sft.py config/demo_sft.py --resume=True
printf '\n== sample.py: two stories with 帽子 and 消防员\n'
python sample.py --ckpt out/demo_sft --words 帽子,消防员 --num 2 --temperature 0.5
printf '\n== the best of eight\n'
python sample.py --ckpt out/demo_sft --words 帽子,消防员 --best_of 8
printf '\nthe demo took %d min %d s\n' $(((SECONDS - start) / 60)) $(((SECONDS - start) % 60))
echo 'better stories: python train.py config/demo.py --out_dir=out/long --max_iters=3000 --minutes=30'
echo 'next: python sample.py --ckpt out/demo_sft --interactive; python -m tools.eval --ckpt out/demo_sft; README.md'
