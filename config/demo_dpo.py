"""Preference tuning of the demo's model, on two CPU cores.

    python -m tools.dpo config/demo_dpo.py

About 400 pairs of the best and the worst of four stories that the model samples itself, two epochs. With
three times this learning rate it forgets more than it learns (docs/experiments.md).
"""

init_from = "out/demo_sft"
data_dir = "data/demo_sft"
out_dir = "out/demo_dpo"

instructions = 528
samples = 4
reference_chosen = False

block_size = 256
batch_size = 8
epochs = 2.0
optimizer = "adamw"
learning_rate = 0.0001
warmup_iters = 10
beta = 0.1
nll_weight = 1.0

eval_interval = 50
save_interval = 100
