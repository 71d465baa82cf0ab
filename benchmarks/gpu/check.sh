#!/usr/bin/env bash
# A first look at a GPU, without a network and in at most 14 minutes: does all of it work, how fast, in how much
# memory, and how near are learner and sampler?
#
#   benchmarks/gpu/check.sh [--dry] [--any-vllm]
#
# --dry: a tiny model on a CPU, which tests this script (a minute or two)
# --any-vllm: try the vLLM that is installed, though grpo refuses it; without, the built-in engine is looked at instead
#
# OUT: folder of the results (default gpu_check.out): result.jsonl, a log of each step, run/
# GRPO, PYTHON: commands (grpo, python3)        ENGINE: vllm or transformers (vllm where it can be imported)
# STEPS: some of "env model learner doctor run kill replay"
#
# Each step has a time limit of its own, and a failure ends that step alone: one run is to find all there is.
# The exit code is that of the first step that failed.
set -uo pipefail
DRY=0
ANY_VLLM=0
for argument; do
  case $argument in
    --dry) DRY=1 ;;
    --any-vllm) ANY_VLLM=1 ;;
    *) echo "check.sh: $argument: --dry or --any-vllm is right" >&2; exit 2 ;;
  esac
done
OUT=$(realpath -m "${OUT:-gpu_check.out}")
export OUT DRY PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export GRPO=${GRPO:-grpo} PYTHON=${PYTHON:-python3}
STEPS=${STEPS:-env model learner doctor run kill replay}
HERE=$(dirname "$(realpath "$0")")
[ "$ANY_VLLM" = 1 ] && GRPO="$PYTHON $HERE/any_vllm.py"
if [ -z "${ENGINE:-}" ]; then
  ENGINE=vllm
  check='from grpo.generate.engines.vllm_settings import check_version; check_version()'
  if [ "$ANY_VLLM" = 0 ] && ! why=$($PYTHON -c "$check" 2>&1); then
    ENGINE=transformers
    echo "vLLM is skipped: ${why##*$'\n'}"
  fi
fi
export HERE ENGINE
rm -rf "$OUT/run"
mkdir -p "$OUT/run"
: > "$OUT/result.jsonl"
began=$SECONDS
failed=0

say() { printf '%5ds  %s\n' $((SECONDS - began)) "$*"; }

step() { # name, limit in seconds, command
  case " $STEPS " in *" $1 "*) ;; *) return 0 ;; esac
  local start=$SECONDS code
  say "$1"
  timeout --kill-after=5 "$2" bash -c "cd '$OUT/run' && $3" > "$OUT/$1.log" 2>&1
  code=$?
  printf '{"step": "%s", "exit": %d, "seconds": %d}\n' "$1" "$code" $((SECONDS - start)) >> "$OUT/result.jsonl"
  [ "$code" = 0 ] && return 0
  [ "$failed" = 0 ] && failed=$code
  say "$1: exit $code"
  tail -n 12 "$OUT/$1.log" | sed 's/^/        /'
}

say "engine: $ENGINE"
if command -v nvidia-smi > /dev/null; then # twice a second, with the time
  nvidia-smi --query-gpu=timestamp,memory.used,utilization.gpu --format=csv,noheader,nounits -lms 500 \
    > "$OUT/memory.csv" &
  sampler=$!
  trap 'kill $sampler 2> /dev/null' EXIT
fi

libraries='^(torch|triton|transformers|vllm|flashinfer|grpo)'
step env 30 "nvidia-smi; command -v cc gcc nvcc; df -h . | tail -1; free -g | head -2;
  $PYTHON -m pip list 2> /dev/null | grep -iE '$libraries'; true"
step model 90 "$PYTHON '$HERE/make_project.py'"
step learner 150 "$PYTHON '$HERE/learner.py'"
step doctor 170 "$GRPO doctor --model"
seconds='select iteration, stage, part, seconds from timings where seconds > 0.05 order by 1, 4 desc'
step run 260 "$GRPO run --until 2 && $GRPO sql '$seconds'"
step kill 200 "bash '$HERE/kill.sh'"
step replay 90 "$GRPO verify --replay"
say summary
(cd "$OUT/run" && $PYTHON "$HERE/summary.py")
grep -h '"step"' "$OUT/result.jsonl"
say "results: $OUT"
exit "$failed"
