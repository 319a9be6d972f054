#!/usr/bin/env bash
# Install what is needed, check style, run the tests. Arguments go to pytest: `scripts/test.sh -m slow` for the long ones.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/pytest -n 2 "$@"
