#!/usr/bin/env bash
# Parts of a session on a host with GPUs, each of which fits into ten minutes. Rows and logs go to $OUT.
#
#   tests/bench/gpu_session.sh PART      PYTHON (python3), MODEL (ltx2_19b_distilled), FOLDER (/tmp/model, of `cold`)
#
# On one GPU: `clips`, whole warm clips (300 s on an H200, 2026-12-01); `steps`, single steps beside diffusers; `small`, steps
# of LTX-Video 2B at the sizes of its recipe for 1920x1088; `cold`, a clip from an empty process, without and with what the
# first one compiled, under 80 GB. On two: `apart`, clips on one and steps on the other; `together`, one clip over both.
set -u
part=${1:?clips, steps, small, cold, apart or together}
python=${PYTHON:-python3}
model=model=${MODEL:-ltx2_19b_distilled}
shapes='shapes=[960x544x121,1920x1088x121]'
mkdir -p "$OUT"

# What is measured says its exit code and when it ended, into its own log and here.
measure() {
  local folder=$OUT/$1
  shift
  mkdir -p "$folder"
  "$python" -m jobs.bench "$@" "$model" "results=$folder" > "$folder/$1.log" 2>&1
  echo "$1: exit $? at $(date +%T)"
}

case $part in
  clips)
    measure clips latency repeats=2
    measure short latency repeats=2 recipe=distilled_two_stage_short 'contestants=[fast]'
    ;;
  steps)
    # The small ones replayed too, as workers do.
    measure large step 'shapes=[1920x1088x121]' 'contestants=[exact,fp8,fast,diffusers_compiled]'
    measure small step 'shapes=[768x512x121,960x544x121]' 'contestants=[exact,fp8_graphed,fast_graphed,diffusers_compiled]'
    ;;
  small)
    model=model=ltxv_2b_distilled
    measure steps step repeats=1 'shapes=[1280x704x257]' 'contestants=[exact,fast,diffusers_compiled]'
    measure steps step repeats=1 'shapes=[2560x1408x257]' 'contestants=[exact,fast,diffusers_compiled]'
    ;;
  cold)
    files=folder=${FOLDER:-/tmp/model}
    "$python" -m jobs.bench write "$model" "$files" > "$OUT/write.log" 2>&1
    for name in first second; do
      measure "$name" clip "$files" gpu_memory_limit_gb=80 precision=fp8 output=/tmp/cold
    done
    ;;
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
    echo "PART must be clips, steps, small, cold, apart or together, got $part" >&2
    exit 2
    ;;
esac
