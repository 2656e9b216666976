# Sourced by the other scripts: an environment with the packages of the given requirements file.
# An active virtual environment is used as it is; else .venv is made. What is installed already and
# satisfies the file is kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -e .venv/bin/activate ] || python3 -m venv .venv
    # shellcheck disable=SC1091
    source .venv/bin/activate
fi
python -m pip install --quiet --disable-pip-version-check --requirement "$1"
