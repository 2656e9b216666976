"""TinyStoriesChinese with its own 8k tokenizer, for one RTX 3090 (24 GB).

    python prepare.py --download tinystories-zh --out_dir data/microstories
    python train.py config/microstories.py

The budget of the original experiment, 44M parameters, spent on layers instead of a 65k vocabulary.
It is spent over 1.3 billion tokens, about 2.5 times all 4 million stories.

Reckoned: 37 TFLOP a step, 3.7 hours at 40% of the card's 71 TFLOP/s in bfloat16. On an H200, a far larger card,
60 steps took 10 GB, at a speed that would make all in 24 minutes.
If memory is short, halve batch_size and double gradient_accumulation_steps: the run stays the same.
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

# No document_mask, which helps the demo: these rows hold more of a story, and flash attention takes no mask.
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
deterministic = False  # what it costs on a GPU has not been measured
