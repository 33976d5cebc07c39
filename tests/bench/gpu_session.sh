#!/usr/bin/env bash
# One session on a host with two GPUs, in two halves: whole warm clips on the first GPU beside single steps and decoding on
# the second, then one clip over both. Rows and logs go to $OUT. A half took under 280 s on two H200s (2026-11-29).
#
#   tests/bench/gpu_session.sh apart|together      PYTHON (python3), MODEL (ltx2_19b_distilled)
set -u
half=${1:?apart or together}
python=${PYTHON:-python3}
model=model=${MODEL:-ltx2_19b_distilled}
shapes='shapes=[960x544x121,1920x1088x121]'
mkdir -p "$OUT/clips" "$OUT/steps" "$OUT/gangs"

# What is measured says its exit code and when it ended, into its own log and here.
measure() {
  local folder=$OUT/$1
  shift
  "$python" -m jobs.bench "$@" "$model" "results=$folder" > "$folder/$1.log" 2>&1
  echo "$1: exit $? at $(date +%T)"
}

case $half in
  apart)
    CUDA_VISIBLE_DEVICES=0 measure clips latency repeats=2 &
    {
      export CUDA_VISIBLE_DEVICES=1
      measure steps step "$shapes" 'contestants=[exact,fp8,fast,diffusers_compiled]'
      measure steps decode 'shapes=[1920x1088x121]' 'contestants=[stream_4_channels_last_fused,stream_8_channels_last_fused]'
    } &
    wait
    ;;
  together)
    "$python" -m pytest -q -m multi_gpu tests/distributed -p no:cacheprovider 2>&1 | tail -20
    measure gangs gang "$shapes" 'layouts=[ulysses2]' 'contestants=[exact,fp8,fast,xdit_compiled,decode]'
    ;;
  *)
    echo "half must be apart or together, got $half" >&2
    exit 2
    ;;
esac
