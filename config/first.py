"""A first model, on two CPU cores: it learns to tell stories and to follow instructions in one training.

    python prepare.py
    python prepare.py --task sft --tokenizer data/demo/tokenizer.model
    python sft.py config/first.py

1,150 steps of 3,840 tokens: 17 minutes without bfloat16. Instructions from the first step on give more for the time
than pretraining first, as in config/demo.py and config/demo_sft.py, which train longer (docs/experiments.md).
"""

init_from = ""
data_dir = "data/demo_sft"
out_dir = "out/first"

block_size = 320  # two examples in a sequence: packing efficiency 98%
n_layer = 2  # fewer layers, more steps
n_head = 3
n_kv_head = 3
head_dim = 64
n_embd = 192
intermediate_size = 512

batch_size = 12
max_iters = 1150
learning_rate = 0.01
warmup_iters = 20
cooldown = 0.9
momentum = 0.8
weight_decay = 0.3
word_weight = 5.0
plain_share = 0.1

eval_interval = 400
sample_interval = 200
save_interval = 200
