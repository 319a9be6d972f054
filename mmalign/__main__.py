"""`python -m mmalign`, for launchers that start modules."""

from mmalign.cli import main

main()
