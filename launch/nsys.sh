#!/usr/bin/env bash
# Profiles a benchmark with NVIDIA Nsight Systems: kernels, copies and the NVTX ranges of --trace.

set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: launch/nsys.sh [MODELS_CONFIG] [FLAG...]

Runs async-chain (another with --strategy) under nsys profile. Every forward of a model on a GPU is
an NVTX range: prefill, decode, draft or verify. Writes REPORT.nsys-rep for nsys-ui and, of the same
run, REPORT.trace.json for ui.perfetto.dev and viz/pipeline_timeline.py.

  MODELS_CONFIG   models config (default: configs/models/demo.json)
  FLAG...         passed on to python -m pipespec.benchmark; see its --help

Environment:
  PYTHON          interpreter (default: python)
  NSYS            Nsight Systems (default: nsys)
  REPORT          where to write, without an ending (default: pipespec)

Examples:
  launch/nsys.sh configs/models/llama3-8b.json --num-samples 1 --max-new-tokens 64 --force
  REPORT=/tmp/chain launch/nsys.sh configs/models/llama3-8b.json --strategy chain --num-samples 1
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

nsys=${NSYS:-nsys}
report=${REPORT:-pipespec}
if ! command -v "$nsys" > /dev/null; then
  echo "error: there is no $nsys; install NVIDIA Nsight Systems, or name it with NSYS=PATH" >&2
  exit 2
fi

exec "$nsys" profile --trace=cuda,nvtx,osrt --sample=none --cuda-flush-interval=100 \
  --force-overwrite=true --output="$report" \
  "${PYTHON:-python}" -m pipespec.benchmark --strategy async-chain --models-config-path "$config" \
  --trace "$report.trace.json" "$@"
