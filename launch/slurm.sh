#!/usr/bin/env bash
# Submits stages to Slurm, each to begin when the one before is through.
#
#   bash launch/slurm.sh --nodes=4 \
#       --job="--config=configs/stage1.py --config.batch_size=32 --workdir=/shared/stage1" \
#       --job="--config=configs/stage2.py --config.batch_size=32 --workdir=/shared/stage2 ..."
#
# A job is the arguments of launch/slurm.sbatch, in one word; other options are those of sbatch.
# --dry_run prints every command, quoted, and calls none.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "error: $1" >&2
  exit 2
}

dry_run='' options=() jobs=()
for word; do
  case $word in
  --dry_run) dry_run=1 ;;
  --job=*) jobs+=("${word#*=}") ;;
  --*=*) options+=("$word") ;;
  *) fail "unexpected argument '$word'; options are --name=value" ;;
  esac
done
[ ${#jobs[@]} != 0 ] || fail "--job is missing; give the arguments of launch/slurm.sbatch in quotes"

split() {
  words=()
  eval "words=($1)" 2>/dev/null || fail "--job=$1: the quotes do not match"
}

for job in "${jobs[@]}"; do # mistakes in any are told before the first is submitted
  split "$job"
  bash launch/slurm.sbatch --dry_run "${words[@]}" >/dev/null
done
after=()
for job in "${jobs[@]}"; do
  split "$job"
  command=(sbatch --parsable "${options[@]}" "${after[@]}" launch/slurm.sbatch "${words[@]}")
  if [ -n "$dry_run" ]; then
    printf -v line '%q ' "${command[@]}"
    echo "${line% }"
    bash launch/slurm.sbatch --dry_run "${words[@]}"
    id=JOB_ID
  else
    id=$("${command[@]}")
    echo "submitted as $id: $job"
  fi
  after=("--dependency=afterok:${id%%;*}" --kill-on-invalid-dep=yes)
done
