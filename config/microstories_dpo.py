"""Preferences for the model of microstories_sft.py, on one RTX 3090 (24 GB).

    python dpo.py config/microstories_dpo.py

Never run. The shape of it is the demo's: stories the model tells itself, the best against the worst of eight,
the reference story where it is better still, and a term that keeps the chosen ones likely.
"""

init_from = "out/microstories_sft"
data_dir = "data/microstories_sft"
out_dir = "out/microstories_dpo"

instructions = 20000
samples = 8

block_size = 512
batch_size = 8
gradient_accumulation_steps = 4
epochs = 1.0

optimizer = "adamw"
learning_rate = 2e-5
warmup_iters = 30
beta = 0.1
nll_weight = 1.0

eval_interval = 100
sample_interval = 100
save_interval = 100

dtype = "bfloat16"
deterministic = False  # what it costs on a GPU has not been measured
