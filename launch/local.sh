#!/usr/bin/env bash
# Benchmarks every strategy over one models config on this machine.

set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/local.sh [MODELS_CONFIG] [FLAG...]

Runs greedy, chain and async-chain over the same prompts and prints one table.

  MODELS_CONFIG   models config (default: configs/models/demo.json)
  FLAG...         passed on to python -m pipespec.benchmark; see its --help

Environment:
  PYTHON          interpreter (default: python)

Examples:
  launch/local.sh
  launch/local.sh configs/models/demo-3.json --num-samples 20
  launch/local.sh configs/models/llama3-8b.json --dataset humaneval --resume
TEXT
}

config=configs/models/demo.json
case "${1:-}" in
  -h | --help)
    usage
    exit 0
    ;;
  "" | -*) ;;
  *)
    config=$1
    shift
    ;;
esac

exec "${PYTHON:-python}" -m pipespec.benchmark --strategy all --models-config-path "$config" "$@"
