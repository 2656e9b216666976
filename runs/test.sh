#!/usr/bin/env bash
# Install what the tests need and run them; with --all also the long ones. Other arguments go to pytest:
# bash runs/test.sh -k resume
source "$(dirname "$0")/setup.sh" requirements-dev.txt
ruff check .
ruff format --check .
mypy
if [ "${1:-}" = --all ]; then
    set -- -m "" "${@:2}"
fi
# A test for each core, and one thread for each: two programs with two threads each on two cores wait for each other.
OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --dist worksteal "$@"
