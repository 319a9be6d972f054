#!/usr/bin/env bash
# Install the dependencies, check style and types, run the tests. Arguments go to pytest: `-m slow` runs the long tests.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/ty check
.venv/bin/pytest -n 2 --dist loadfile "$@"  # a file's fixtures are made once
