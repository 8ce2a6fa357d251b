#!/usr/bin/env bash
# Emits a recipe, deletes everything but its document, and runs it again from that: ends well only if the trained
# weights have the same bits and no claim was found wrong.
#   tests/reproduce.sh smoke      about a minute on 2 cores
#   tests/reproduce.sh demo       twice the time of the demo's training
set -euo pipefail
experiment="${1:-smoke}"
checkout="$(cd "$(dirname "$0")/.." && pwd)"
python="${PYTHON:-$checkout/.venv/bin/python}"
export PYTHONPATH="$checkout"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cd "$work"
for stage in preprocess train evaluate; do
    "$python" "$checkout/$stage.py" "experiment=$experiment"
done
mv "runs/$experiment/recipe.md" .
rm -rf runs data
"$python" -m recipe reproduce recipe.md --yes
grep '^\*\*BIT-EXACT' runs/reproduction-*/reproduction.md
