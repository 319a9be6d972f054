#!/usr/bin/env bash
# Install what is needed and fine-tune the embedded model for a few minutes on the CPU. Arguments: key=value overrides.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
.venv/bin/mmalign train configs/quickstart.yaml "out=runs/quickstart-$(date +%Y%m%d-%H%M%S)" "$@"
