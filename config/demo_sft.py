"""Instruction tuning of the demo's model, on two CPU cores.

    python prepare.py --task sft --tokenizer data/demo/tokenizer.model
    python sft.py config/demo_sft.py

1,200 steps of 3,840 tokens, 1.2 epochs: about 4 minutes.
"""

init_from = "out/demo"
data_dir = "data/demo_sft"
out_dir = "out/demo_sft"

block_size = 320  # two examples in a sequence: packing efficiency 98%
batch_size = 12
max_iters = 1200
learning_rate = 0.01  # higher than in pretraining, or the model does not learn to look at the instruction
warmup_iters = 20
cooldown = 0.9

eval_interval = 300
sample_interval = 300
save_interval = 300
