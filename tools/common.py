"""What `python tools/NAME.py` finds instead of the repository's packages."""

import sys
from pathlib import Path

print(f"error: type python -m tools.{Path(sys.argv[0]).stem}", file=sys.stderr)
sys.exit(2)
