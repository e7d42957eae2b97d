"""The command line: leedl-fast doctor | bench | tune | data | models | train | sample | compare.

Every heavy import stands inside the command that needs it, so that `--help` answers at once.
"""

from leedl_fast.cli import data, models, tools
from leedl_fast.cli.common import app

__all__ = ["app", "data", "main", "models", "tools"]


def main() -> None:
    app()
