"""Preferences for the model of microstories_sft.py, on one RTX 3090 (24 GB).

    python -m tools.dpo config/microstories_dpo.py

Never run. The recipe is the demo's: pairs of the best and the worst of eight stories that the model samples
itself, or of the reference story where that is better, and a term that keeps the probability of the chosen
ones up.
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

log_interval = 20
eval_interval = 100
eval_sequences = 512
sample_interval = 100
save_interval = 100

deterministic = False  # its cost on a GPU has not been measured
