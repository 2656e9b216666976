#!/usr/bin/env bash
# Try to hurt the program, and count what is lost: docs/reliability.md has a whole run's figures. It takes
# about half an hour; bash runs/torture.sh --short takes two minutes. Some parts need root, to mount a small disk.
source "$(dirname "$0")/setup.sh" requirements-dev.txt
PYTHONPATH=.:tests python tests/torture.py "$@"
