"""The demo's model learns to write the story it is asked for, on two CPU cores.

python prepare.py --task sft --tokenizer data/demo/tokenizer.model
python sft.py config/demo_sft.py

"""

init_from = "out/demo"
data_dir = "data/demo_sft"
out_dir = "out/demo_sft"

block_size = 320  # two examples to a row: 99% of it is filled
batch_size = 12
max_iters = 600
learning_rate = 0.004
warmup_iters = 20
cooldown = 1.0

eval_interval = 150
sample_interval = 150
save_interval = 150
