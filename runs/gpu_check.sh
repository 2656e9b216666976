#!/usr/bin/env bash
# What only a GPU shows: the CUDA tests; the speed and memory of config/microstories.py; a run that is killed and
# resumed, then tuned; the speed of decoding. A check that fails is named at the end, and the others go on.
# The figures are in out/gpu_check/report.md. Needs only the clone and pip.
#
#     bash runs/gpu_check.sh
#     bash runs/gpu_check.sh --device=cpu --quick      the same commands with a tiny model, to try the script itself
source "$(dirname "$0")/setup.sh" requirements-dev.txt

device=cuda
quick=
for argument in "$@"; do
    case $argument in
        --device=*) device=${argument#--device=} ;;
        --quick) quick=yes ;;
        *) echo "error: $argument: no option; the options are --device=NAME and --quick" >&2; exit 2 ;;
    esac
done

out=out/gpu_check
stories=20000
steps=200
common=("--device=$device" --sample_interval=0)
speed=(--max_iters=12 --log_interval=4 --eval_sequences=1)
model=()
tuning=()
if [ "$quick" ]; then
    stories=1000
    steps=40
    speed=(--max_iters=4 --log_interval=2 --eval_sequences=1)
    model=(--n_layer=2 --n_head=2 --n_kv_head=1 --n_embd=64 --intermediate_size=128 --block_size=256 --batch_size=2)
    tuning=(--batch_size=2 --block_size=256)
fi

failed=
check() { # NAME COMMAND...: run it and go on, also if it fails
    local name=$1
    shift
    printf '\n== %s\n' "$name"
    "$@" || failed="$failed [$name]"
}

kill_at_checkpoint() { # COMMAND...: run it until its first checkpoint is there, then kill it (-9)
    "$@" &
    local process=$!
    until compgen -G "$out/resumed/ckpt_*.pt" > /dev/null; do
        kill -0 "$process" || return 1 # it has ended with an error
        sleep 0.05
    done
    kill -9 "$process"
    wait "$process" || true
}

rm -rf "$out"
mkdir -p "$out"
python -m stories.generate --out "$out/stories.jsonl" --count "$stories"
python prepare.py "$out/stories.jsonl" --out_dir "$out/data" --val_fraction 0.05
python prepare.py "$out/stories.jsonl" --out_dir "$out/data_sft" --val_fraction 0.05 \
    --task sft --tokenizer "$out/data/tokenizer.model"

check "CUDA tests" python -m pytest tests/test_cuda.py

pretrain=(python train.py config/microstories.py "--data_dir=$out/data" "${common[@]}" "${model[@]}")
check "speed, compiled" "${pretrain[@]}" "${speed[@]}" "--out_dir=$out/compiled"
check "speed, not compiled" "${pretrain[@]}" "${speed[@]}" "--out_dir=$out/eager" --compile=False
if [ "$device" != cpu ]; then
    check "speed, float16" "${pretrain[@]}" "${speed[@]}" "--out_dir=$out/float16" --dtype=float16
fi

loop=(--compile=False --gradient_accumulation_steps=1 --log_interval=5 --eval_interval=1000)
resumed=("${pretrain[@]}" "${loop[@]}" "--out_dir=$out/resumed" --warmup_iters=10
         "--max_iters=$steps" "--save_interval=$((steps / 4))")
tuned=("--data_dir=$out/data_sft" "${common[@]}" "${loop[@]}" "${tuning[@]}" --epochs=0 "--max_iters=$((steps / 4))")
check "a run killed" kill_at_checkpoint "${resumed[@]}"
check "and resumed" "${resumed[@]}" --resume=True
check "instruction tuning" python sft.py config/microstories_sft.py "--init_from=$out/resumed" \
    "--out_dir=$out/sft" "${tuned[@]}"
check "preference tuning" python -m tools.dpo config/microstories_dpo.py "--init_from=$out/sft" \
    "--out_dir=$out/dpo" "${tuned[@]}" "--instructions=$steps" --samples=2

runs=()
for name in compiled eager float16 resumed sft dpo; do
    if compgen -G "$out/$name/ckpt_*.pt" > /dev/null; then
        runs+=("$out/$name")
    fi
done
check "report" python -m tools.report "${runs[@]}" --out "$out/report.md"
[ "$quick" ] || check "speed of decoding" python -m tools.bench decode
if [ "$failed" ]; then
    echo "failed:$failed" >&2
    exit 1
fi
