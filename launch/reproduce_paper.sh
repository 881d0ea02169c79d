#!/usr/bin/env bash
# Runs the paper's configurations and prints the published table beside ours.

set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

usage() {
  cat <<'TEXT'
Usage: launch/reproduce_paper.sh [emulated|real] [70b|8b|all] [FLAG...]

Runs greedy, chain and async-chain over the sets of models that the PipeSpec paper
was measured with, by its own policy and by our defaults, and prints its numbers
beside ours. Runs that are finished are not repeated: after an interruption the
same command goes on.

  emulated  models without weights, at the speed of the published runs (default)
  real      the Llama 3 models themselves, on a node with four GPUs
  70b, 8b   runs with that target only (default: all)
  FLAG...   passed on to python -m pipespec.benchmark; see its --help

Environment:
  PYTHON      interpreter (default: python)
  OUTPUT_DIR  for result files (default: results/paper/emulated or .../real)

The published numbers and their source are in launch/published.json.

Examples:
  launch/reproduce_paper.sh emulated 8b --num-samples 2
  launch/reproduce_paper.sh real --dataset humaneval --num-samples 20
TEXT
}

hardware=emulated
groups=(70b 8b)
case "${1:-}" in
  -h | --help)
    usage
    exit 0
    ;;
  emulated | real)
    hardware=$1
    shift
    ;;
esac
case "${1:-}" in
  70b | 8b)
    groups=("$1")
    shift
    ;;
  all) shift ;;
esac
if [[ -n ${1:-} && $1 != -* ]]; then
  echo "error: $1 is neither emulated, real, 70b, 8b, all nor a flag; see --help" >&2
  exit 2
fi

python=${PYTHON:-python}
output=${OUTPUT_DIR:-results/paper/$hardware}
published=("$python" -m pipespec.comparison.published)
about=("$root/launch/published.json" --hardware "$hardware" --output-dir "$output")

for group in "${groups[@]}"; do
  # Not piped into the loop: a failing plan must end the script.
  plan=$("${published[@]}" plan "${about[@]}" --group "$group")
  while IFS=$'\t' read -ra flags; do
    "$python" -m pipespec.benchmark "${flags[@]}" --resume "$@" < /dev/null >&2
  done <<< "$plan"
done

for group in "${groups[@]}"; do
  "${published[@]}" table "${about[@]}" --group "$group"
  echo
done
