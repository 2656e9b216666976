"""What the configs for one GPU share. They name it as their `base`; it is not an experiment of its own."""

block_size = 512

log_interval = 20
eval_interval = 500
eval_blocks = 512
sample_interval = 500
save_interval = 500

deterministic = False  # its cost on a GPU has not been measured
