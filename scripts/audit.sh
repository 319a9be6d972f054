#!/usr/bin/env bash
# Known vulnerabilities of the pinned dependencies, from the Python advisory database. Needs the network: a package that
# cannot be looked up is a failure. Arguments go to pip-audit.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -x .venv-audit/bin/pip-audit ] || { "${PYTHON:-python3}" -m venv .venv-audit && .venv-audit/bin/pip install --quiet pip-audit; }
.venv-audit/bin/pip-audit --requirement constraints.txt --strict --no-deps --disable-pip "$@"
