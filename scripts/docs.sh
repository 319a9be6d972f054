#!/usr/bin/env bash
# Build the documentation into build/site, without the network. Arguments go to mkdocs: `--site-dir FOLDER`.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict "$@"
