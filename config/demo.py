"""Pretraining on the embedded corpus, on two CPU cores.

    python prepare.py
    python train.py config/demo.py

At most 500 steps of 4,096 tokens and at most 4 minutes. With minutes=0 and more max_iters the model becomes
better.
"""

data_dir = "data/demo"
out_dir = "out/demo"

block_size = 256
n_layer = 2  # fewer layers, more steps
n_head = 3
n_kv_head = 3
head_dim = 64
n_embd = 192
intermediate_size = 512
document_mask = True  # the stories are short: without it most of a sequence is text of other stories

batch_size = 16
max_iters = 500
minutes = 4.0
learning_rate = 0.01
warmup_iters = 20
decay_fraction = 0.7
momentum = 0.8
weight_decay = 0.3

eval_interval = 50
sample_interval = 25
save_interval = 50

compile = False  # in so short a training, compiling costs more time than it saves
