"""`python -m mmalign`, for launchers that start modules."""

import os
import sys

# `-m` puts the current folder first on Python's path, where a file called like a library would be imported in its place
if not sys.flags.safe_path and sys.path and sys.path[0] in ("", os.getcwd()):
    del sys.path[0]

from mmalign.cli.app import main

main()
