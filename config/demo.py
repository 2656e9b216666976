"""A first model, trained on the embedded corpus on two CPU cores.

    python prepare.py
    python train.py config/demo.py

Costs about 4 minutes and 1 GB of memory on 2 cores. Expect a validation loss near X (Y bits a character)
and stories that keep their hero from the first sentence to the last.
"""

data_dir = "data/demo"
out_dir = "out/demo"

block_size = 512
n_layer = 4
n_head = 3
n_kv_head = 3
head_dim = 64
n_embd = 192
intermediate_size = 512

batch_size = 8  # 8 x 512 = 4,096 tokens a step
max_iters = 500
learning_rate = 0.01
warmup_iters = 20

eval_interval = 100
sample_interval = 100
save_interval = 100
