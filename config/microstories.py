"""TinyStoriesChinese with its own 8k tokenizer, for one RTX 3090 (24 GB).

    python prepare.py --download tinystories-zh --out_dir data/microstories
    python train.py config/microstories.py

The budget of the original experiment, 44M parameters, spent on layers instead of a 65k vocabulary.
Reckoned, not measured (71 TFLOP/s bf16, 40% of it used): 0.26 TFLOP a step... see docs/benchmarks.md.
"""

data_dir = "data/microstories"
out_dir = "out/microstories"

block_size = 512
n_layer = 12
n_head = 8
n_kv_head = 4
head_dim = 64
n_embd = 512
intermediate_size = 1664

batch_size = 64
gradient_accumulation_steps = 4  # 64 x 4 x 512 = 131,072 tokens a step
max_iters = 10_000
learning_rate = 0.005
warmup_iters = 200

log_interval = 20
eval_interval = 500
eval_blocks = 512
sample_interval = 500
save_interval = 500

dtype = "bfloat16"
