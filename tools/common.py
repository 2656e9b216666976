"""Found only where a tool was started as `python tools/NAME.py`, which does not find the packages of the repository."""

import sys
from pathlib import Path

print(f"error: run it in the repository's folder as python -m tools.{Path(sys.argv[0]).stem}", file=sys.stderr)
sys.exit(2)
