"""The shape and recipe of the original experiment, for comparison: ChatGLM's 64,789 pieces.

    python prepare.py --download tinystories-zh --tokenizer chatglm_tokenizer.model \\
        --out_dir data/microstories_chatglm
    python train.py config/microstories_chatglm.py

The tokenizer is the file tokenizer.model of ChatGLM2-6B or ChatGLM3-6B on the Hugging Face hub. Three
quarters of the 44M parameters are its embedding.

Estimated for one RTX 3090: 70 TFLOP a step, 6.9 hours at 40% of its 71 TFLOP/s in bfloat16. On an H200, 20
steps took 5 GB of memory; all steps would take 41 minutes.
"""

data_dir = "data/microstories_chatglm"
out_dir = "out/microstories_chatglm"

block_size = 512
n_layer = 6
n_head = 6
n_kv_head = 6
head_dim = 48
n_embd = 512
intermediate_size = 768
qk_norm = False

batch_size = 32
gradient_accumulation_steps = 16  # 512 sequences a step
max_iters = 10_000
optimizer = "adamw"
learning_rate = 5e-4
schedule = "cosine"
min_lr = 5e-5
warmup_iters = 1000

log_interval = 20
eval_interval = 500
eval_sequences = 512
sample_interval = 500
save_interval = 500

deterministic = False  # its cost on a GPU has not been measured
