"""Pretraining on the embedded corpus, on two CPU cores.

    python prepare.py
    python train.py config/demo.py

800 steps of 4,096 tokens, a little over one epoch: about 3 minutes. Expect 0.35 bits a character.
"""

data_dir = "data/demo"
out_dir = "out/demo"

block_size = 256
n_layer = 4
n_head = 3
n_kv_head = 3
head_dim = 64
n_embd = 192
intermediate_size = 512
document_mask = True  # the stories are short: without it most of a sequence is text of other stories

batch_size = 16
max_iters = 800
learning_rate = 0.008
warmup_iters = 20
cooldown = 0.7

eval_interval = 200
sample_interval = 200
save_interval = 200
