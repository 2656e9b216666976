#!/usr/bin/env bash
# What only a GPU shows: the CUDA tests, speed, memory, number types, resuming and tuning, as a table and in
# out/gpu_check.json; then the speed of decoding. Needs only the clone and pip.
#
#     bash runs/gpu_check.sh
#     bash runs/gpu_check.sh --device=cpu --quick      the same commands with a tiny model, to try the script itself
source "$(dirname "$0")/setup.sh" requirements-dev.txt
python -m tools.gpu_check "$@"
[ $# -gt 0 ] || python -m tools.bench decode
