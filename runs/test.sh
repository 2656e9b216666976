#!/usr/bin/env bash
# Install what the tests need and run them all. Arguments go to pytest: bash runs/test.sh -k resume
source "$(dirname "$0")/setup.sh" requirements-dev.txt
ruff check .
ruff format --check .
python -m pytest "$@"
