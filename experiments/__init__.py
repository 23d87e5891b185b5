"""Measurements and how they were made. Looks for its packages before any work starts."""
import sys

from support.errors import UserError, require

try:
    require("matplotlib", "PIL", "scipy")
except UserError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
