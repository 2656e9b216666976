"""TinyStoriesChinese with its own 8k tokenizer, for one RTX 3090 (24 GB).

    python prepare.py --download tinystories-zh --out_dir data/microstories
    python train.py config/microstories.py

The original experiment had 44M parameters too, but 33M of them in the embedding of a 65k vocabulary. Here
they are in the layers. The run takes 1.3 billion tokens, about 2.5 epochs of all 4 million stories.

Estimated: 37 TFLOP a step, 3.7 hours at 40% of the card's 71 TFLOP/s in bfloat16. On an H200, 60 steps took
10 GB of memory; all steps would take 24 minutes.
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

# No document_mask: it helps the demo's short sequences, but flash attention takes no mask.
batch_size = 64
gradient_accumulation_steps = 4  # 64 x 4 x 512 = 131,072 tokens a step
max_iters = 10_000
learning_rate = 0.005
warmup_iters = 200

log_interval = 20
eval_interval = 500
eval_sequences = 512
sample_interval = 500
save_interval = 500

deterministic = False  # its cost on a GPU has not been measured
