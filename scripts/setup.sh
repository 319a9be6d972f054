# Sourced by the other scripts: a virtual environment in .venv with the tested versions, made once and reused.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/one" >&2; exit 2; }
stamp=.venv/.installed
if ! cmp -s <(cat constraints.txt pyproject.toml) "$stamp" 2>/dev/null; then
    [ -d .venv ] || "$PYTHON" -m venv .venv
    echo "installing into .venv (about 6 GB, a few minutes, once)"
    .venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
    cat constraints.txt pyproject.toml > "$stamp"
fi
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} PYTHONUNBUFFERED=1
