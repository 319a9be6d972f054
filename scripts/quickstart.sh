#!/usr/bin/env bash
# Install what is needed and fine-tune an embedded model for a few minutes on the CPU: that of shapes, or with the first
# argument `things` that of things. Other arguments: key=value overrides.
config=quickstart
case "${1:-}" in
    shapes) shift ;;
    things) config=tiny_things && shift ;;
    *=* | "") ;;
    *) echo "quickstart: '$1' is neither shapes, things nor key=value" >&2 && exit 2 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
.venv/bin/mmalign train "configs/$config.yaml" "out=runs/$config-$(date +%Y%m%d-%H%M%S)" "$@"
