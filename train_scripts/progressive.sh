#!/usr/bin/env bash
# bash train_scripts/progressive.sh [--np=N] [--section.key=value ...]
# Trains at one size after another, each stage from the weights of the one before. Without arguments: the bundled tiny
# configuration at 64, 128 and 256 px on asset/example_data, in a minute or two. A stage that is done is not repeated,
# one that was stopped goes on. Environment variables, lists separated by spaces:
#   STAGES   sizes in pixels of one configuration, or names of the stages of several configurations
#   CONFIGS  one YAML for all stages, or one for each: these are taken as they are
#   STEPS    optimiser steps, one number for all stages or one for each; with CONFIGS by default what each YAML says
#   OUT      where the stages lie [output/progressive]; the result is the model/ of the last one
# The official sizes on real hardware (data.data_dir and what else is common to all stages as arguments):
#   c=configs/sana_config CONFIGS="$c/512ms/Sana_1600M_img512.yaml $c/1024ms/Sana_1600M_img1024.yaml \
#     $c/2048ms/Sana_1600M_img2048_bf16.yaml $c/4096ms/Sana_1600M_img4096_bf16.yaml" \
#     bash train_scripts/progressive.sh --data.data_dir="[/data/shards]"
# A position embedding (model.use_pe) is made anew for every size: model.pe_interpolation divides the positions, so that
# a larger grid covers the range that the weights know. Official YAMLs set it; for one YAML it is size / first size.
set -euo pipefail
cd "$(dirname "$0")/.."

fail() {
  echo "error: $1" >&2
  exit 2
}

out="${OUT:-output/progressive}"
common=()
if [ -n "${CONFIGS:-}" ]; then
  read -ra configs <<<"$CONFIGS"
else
  configs=(configs/sana_config/tiny/Sana_tiny_img256.yaml)
  STAGES="${STAGES:-64 128 256}" STEPS="${STEPS:-8}"
  common=(
    --data.data_dir="[asset/example_data]" --data.type=SanaImgDataset --model.use_pe=true --model.mixed_precision=fp32
    --model.class_dropout_prob=0.1 --train.extra.train_text_encoder=false --train.extra.null_caption_probability=0
    --train.train_batch_size=2 --train.log_interval=1 --train.lr_schedule=constant
    --train.lr_schedule_args="{num_warmup_steps: 0}"
  )
fi
if [ -n "${STAGES:-}" ]; then
  read -ra stages <<<"$STAGES"
else
  [ "${#configs[@]}" -gt 1 ] || fail "STAGES must name the sizes in pixels where CONFIGS is one file"
  stages=()
  for config in "${configs[@]}"; do stages+=("$(basename "$config" .yaml)"); done
fi
read -ra steps <<<"${STEPS:-}"
count="${#stages[@]}"
[ "${#configs[@]}" = 1 ] || [ "${#configs[@]}" = "$count" ] || fail "CONFIGS names ${#configs[@]} files for $count STAGES"
[ "${#steps[@]}" -le 1 ] || [ "${#steps[@]}" = "$count" ] || fail "STEPS has ${#steps[@]} numbers for $count STAGES"

before=""
for index in "${!stages[@]}"; do
  stage="${stages[$index]}" config="${configs[0]}"
  folder="$out/$stage" own=()
  if [ "${#configs[@]}" -gt 1 ]; then
    config="${configs[$index]}"
  else
    [[ "$stage" =~ ^[1-9][0-9]*$ ]] || fail "STAGES: $stage is no size in pixels"
    pe="$(python -c "print($stage / ${stages[0]})")"
    own+=(--model.image_size="$stage" --data.image_size="$stage" --model.pe_interpolation="$pe")
  fi
  case "${#steps[@]}" in
    0) ;;
    1) own+=(--train.extra.max_steps="${steps[0]}") ;;
    *) own+=(--train.extra.max_steps="${steps[$index]}") ;;
  esac
  [ -z "$before" ] || own+=(--model.load_from="$before")
  if [ -e "$folder/done" ]; then
    echo "stage $stage is done ($folder)"
  else
    echo "stage $stage: $config${before:+ from $before}"
    bash train_scripts/train.sh "$config" "${common[@]}" "$@" "${own[@]}" --work_dir="$folder"
    [ -e "$folder/model/model.safetensors" ] || { echo "stage $stage stopped early; the same command goes on" >&2; exit 1; }
    touch "$folder/done"
  fi
  before="$folder/model/model.safetensors"
done
echo "the result is $(dirname "$before")"
