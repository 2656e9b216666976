"""Instruction tuning of the demo's model, on two CPU cores.

    python prepare.py --task sft --tokenizer data/demo/tokenizer.model
    python sft.py config/demo_sft.py

At most 600 steps of 3,840 tokens and at most 4.2 minutes.
"""

init_from = "out/demo"
data_dir = "data/demo_sft"
out_dir = "out/demo_sft"

block_size = 320  # two examples in a sequence: packing efficiency 98%
batch_size = 12
max_iters = 600
minutes = 4.2
learning_rate = 0.01  # at 0.007 the stories have fewer of the words that are asked for
warmup_iters = 20
decay_fraction = 0.9
momentum = 0.8
weight_decay = 0.3

eval_interval = 200
sample_interval = 100
save_interval = 200

compile = False  # without it, tokens that are no targets cost no logits
