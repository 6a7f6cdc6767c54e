#!/usr/bin/env bash
# The whole way of the data: bash run_all.sh [RECIPE] [key=value ...], RECIPE defaults to `tiny`.
#
#   bash run_all.sh                          a small policy trained from nothing, on a laptop
#   bash run_all.sh tiny seed=0,1,2          three seeds
#   bash run_all.sh tiny method=dmpo,dpo,rft run=versus
#   bash run_all.sh llama2-7b --dry-run --gpus 8 --gpu h100    memory and hours; nothing is loaded or run
#
# What is done already is not done again; a run that was stopped goes on where it was. `python -m pipeline STAGE RECIPE
# [key=value ...]` runs one stage, `--help` explains every key.
set -euo pipefail

if [[ ${1:-} == -* ]]; then # --help
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
  exit 0
fi

recipe=tiny
if [ $# -gt 0 ] && [[ $1 != *=* ]]; then
  recipe=$1
  shift
fi
case $recipe in *.yaml | *.yml) recipe=$(realpath -- "$recipe") ;; esac # of the caller's folder
cd "$(dirname "${BASH_SOURCE[0]}")"

started=$SECONDS
source environment.sh
if [ $((SECONDS - started)) -ge 5 ]; then echo "Set-up: $((SECONDS - started)) s" >&2; fi

for argument in "$@"; do
  if [ "$argument" = --dry-run ]; then exec python -m pipeline train "$recipe" "$@"; fi
done

rounds=$(python -m pipeline rounds "$recipe" "$@")
explore=()
for ((round = 0; round < rounds; round++)); do explore+=(rollout pairs reference train); done
for stage in experts sft "${explore[@]}" evaluate report; do
  launch=python
  case $stage in sft | reference | train) launch=${DMPO_LAUNCH:-python} ;; esac # e.g. accelerate launch --num_processes 8
  $launch -m pipeline "$stage" "$recipe" "$@"
done
