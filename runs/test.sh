#!/usr/bin/env bash
# Install what the tests need and run them all. Arguments go to pytest: bash runs/test.sh -k resume
source "$(dirname "$0")/setup.sh" requirements-dev.txt
ruff check .
ruff format --check .
mypy
# A test for each core, and one thread for each: two programs with two threads each on two cores wait for each other.
OMP_NUM_THREADS=1 python -m pytest --numprocesses auto --dist worksteal "$@"
