"""Instructions for the model of microstories.py, on one RTX 3090 (24 GB).

    python prepare.py --task sft --download tinystories-zh --tokenizer data/microstories/tokenizer.model \\
        --out_dir data/microstories_sft
    python sft.py config/microstories_sft.py

AdamW at 5e-4 for three epochs was best in the original experiment, which had 71 thousand instructions. Here
each of the 4 million stories has one.

Estimated, not measured: about a billion tokens an epoch, 2.8 hours each at 40% of the card's 71 TFLOP/s in
bfloat16, 5.5 GB of memory. With --epochs=1 the model still sees fifty times the instructions of the original.
"""

init_from = "out/microstories"
data_dir = "data/microstories_sft"
out_dir = "out/microstories_sft"

block_size = 512
batch_size = 32
gradient_accumulation_steps = 4  # 32 x 4 x 512 = 65,536 tokens a step
epochs = 3.0

optimizer = "adamw"
learning_rate = 5e-4
schedule = "cosine"
min_lr = 5e-5
warmup_iters = 200

log_interval = 20
eval_interval = 500
eval_sequences = 512
sample_interval = 500
save_interval = 500

deterministic = False  # its cost on a GPU has not been measured
