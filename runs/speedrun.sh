#!/usr/bin/env bash
# The real pipeline on one GPU: 4 million stories, a model of 44M parameters, and a report. Every stage resumes: run
# it again after a stop and it continues.
#
#     bash runs/speedrun.sh            all of it
#     bash runs/speedrun.sh --quick    the same commands with few steps on made-up records: minutes, also on a CPU
#
# Estimated for one RTX 3090, not measured (python -m tools.estimate config/microstories*.py):
#
#     download and prepare    3 GB to fetch, then some minutes, by the number of cores
#     pretraining             3.2 to 4.2 hours (1.3 billion tokens)
#     instructions            2.5 to 3.3 hours (1 epoch of the config's 3)
#     preferences             a few minutes of training; sampling 160,000 stories before it takes longer, how long is
#                             not known
#     evaluations, report     minutes
#
# So about 6 to 8 hours of the card, and what the sampling takes; the cost is that times its price. 9 GiB of GPU memory
# (estimated) and 30 GB of disk.
source "$(dirname "$0")/setup.sh" requirements.txt
python -c "import safetensors, matplotlib" 2>/dev/null ||
    python -m pip install --quiet --disable-pip-version-check safetensors matplotlib

data=data/microstories
run=out/microstories
report=out/report.md
instructions=1000 # of an evaluation
input=(--download tinystories-zh)
train=()
sft=(--epochs=1.0)
dpo=()
sampling=()
if [ "${1:-}" = --quick ]; then
    data=data/quick
    run=out/quick
    report=out/quick_report.md
    instructions=20
    mkdir -p data
    [ -e data/quick.jsonl ] || python -m stories.generate --out data/quick.jsonl --count 1000
    input=(data/quick.jsonl --val_fraction=0.05 --vocab_size=2048)
    loop=(--block_size=256 --batch_size=4 --gradient_accumulation_steps=2 --max_iters=24 --warmup_iters=4
          --log_interval=4 --eval_interval=12 --eval_sequences=16 --sample_interval=0 --save_interval=12 --compile=False)
    train=("${loop[@]}" --n_layer=2 --n_head=2 --n_kv_head=1 --n_embd=64 --intermediate_size=128)
    sft=("${loop[@]}")
    dpo=("${loop[@]}" --instructions=16 --samples=2 --epochs=0 --reference_chosen=True)
    sampling=(--max_new_tokens=60)
fi

stage() { # NAME COMMAND...: run it; note how long it took
    local name=$1
    shift
    local start=$SECONDS
    printf '\n== %s\n' "$name"
    "$@"
    printf '%s\t%s\n' "$name" $((SECONDS - start)) >> "$run.times.tsv"
}

evaluate() { # CHECKPOINT: metrics on held-out instructions, once
    [ -e "$1/eval.json" ] || stage "evaluate $1" python -m tools.eval --ckpt "$1" --data "${data}_sft" --num "$instructions" \
        --json "$1/eval.json"
}

mkdir -p out
[ -e "$data/meta.json" ] || stage "prepare" python prepare.py "${input[@]}" --out_dir "$data"
[ -e "${data}_sft/meta.json" ] || stage "prepare instructions" \
    python prepare.py "${input[@]}" --task sft --tokenizer "$data/tokenizer.model" --out_dir "${data}_sft"

stage "pretrain" python train.py config/microstories.py --data_dir="$data" --out_dir="$run" --resume=True "${train[@]}"
evaluate "$run"
stage "fine-tune" python sft.py config/microstories_sft.py --init_from="$run" --data_dir="${data}_sft" \
    --out_dir="${run}_sft" --resume=True "${sft[@]}"
evaluate "${run}_sft"
stage "prefer" python -m tools.dpo config/microstories_dpo.py --init_from="${run}_sft" --data_dir="${data}_sft" \
    --out_dir="${run}_dpo" --resume=True "${dpo[@]}"
evaluate "${run}_dpo"

python sample.py --ckpt "${run}_dpo" --words 帽子,消防员 --num 2 "${sampling[@]}"
[ -e "hf/$(basename "$run")" ] || python -m tools.export --ckpt "${run}_dpo" --out_dir "hf/$(basename "$run")"
python -m tools.report "$run" "${run}_sft" "${run}_dpo" --times "$run.times.tsv" --out "$report"
