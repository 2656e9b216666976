"""The demo's model learns to write the story it is asked for, on two CPU cores.

    python prepare.py --task sft --tokenizer data/demo/tokenizer.model
    python sft.py config/demo_sft.py

1,200 steps of 3,840 tokens, 1.2 epochs: about 4 minutes.
"""

init_from = "out/demo"
data_dir = "data/demo_sft"
out_dir = "out/demo_sft"

block_size = 320  # two examples to a row: 98% of it is filled
batch_size = 12
max_iters = 1200
learning_rate = 0.01  # higher than the stories': what a story is to hold must now come from its instruction
warmup_iters = 20
cooldown = 0.9

eval_interval = 300
sample_interval = 300
save_interval = 300
