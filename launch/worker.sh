#!/usr/bin/env bash
# What launch/cloud.py does on every host, where the code lies in ~/cfpp.
#
#   worker.sh setup tpu|cuda    installs cfpp; quick when nothing has changed
#   worker.sh start ID JOB...   starts the jobs, one after another, in the background
#   worker.sh status ID         prints 'cfpp: running|idle|busy' or 'cfpp: exited CODE [ERROR]'
#   worker.sh stop              ends the jobs, which save first; kills them if that takes too long
#
# A JOB is the arguments of cfpp.main, in one word. A held lock, not a process number, tells that
# jobs are running: the kernel drops it with the last of their processes, whatever ended them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
readonly state=~/cfpp_jobs seconds_to_save=300
mkdir -p "$state"

setup() {
  if [ "$1" = tpu ]; then # TPU v5e and later start much faster with huge pages
    echo always | sudo -n tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null || true
  fi
  if [ .venv/installed -nt setup.py ] && [ .venv/installed -nt constraints.txt ]; then
    return
  fi
  python3 -m pip install --quiet --user uv # the images' own Python is older than 3.11
  python3 -m uv venv --quiet --clear --python 3.11 .venv
  python3 -m uv pip install --quiet --python .venv --constraint constraints.txt \
    --editable ".[$1,atari,gcs,tensorboard]"
  touch .venv/installed
}

start() {
  exec 9>"$state/lock"
  if ! flock --nonblock 9; then
    return # running; `status` tells whether these
  fi
  rm -f "$state/$1.exit"
  echo "$1" >"$state/current"
  setsid nohup bash launch/worker.sh jobs "$@" >>"$state/log" 2>&1 </dev/null &
}

jobs_one_after_another() {
  local id=$1 code=0 begin error='' stopped=''
  shift
  echo $$ >"$state/pid"
  trap 'stopped=1' TERM # the job is told too, and ends first
  for job; do
    begin=$(wc -c <"$state/log")
    bash -c "exec .venv/bin/python -m cfpp.main $job" || code=$?
    if [ "$code" = 0 ] && { [ -n "$stopped" ] || interrupted "$begin"; }; then
      code=143 # ended by SIGTERM, after saving: not through
    fi
    if [ "$code" != 0 ]; then
      error=$(told "$begin" '^error: ' || true)
      break
    fi
  done
  echo "$code $error" >"$state/$id.exit"
}

interrupted() { # whether a job that was told, here or on another host, has said so
  told "$1" 'run the same command to continue' >/dev/null
}

told() { # the last line in the log that matches, from some byte on
  tail -c "+$(($1 + 1))" "$state/log" | grep "$2" | tail -n 1
}

running() {
  ! flock --nonblock "$state/lock" true
}

status() {
  if running; then
    if [ "$(cat "$state/current")" = "$1" ]; then echo "cfpp: running"; else echo "cfpp: busy"; fi
  elif [ -e "$state/$1.exit" ]; then
    echo "cfpp: exited $(cat "$state/$1.exit")"
  else
    echo "cfpp: idle"
  fi
}

stop() {
  running || return 0
  kill -TERM -- "-$(cat "$state/pid")"
  for ((i = 0; i < 10 * seconds_to_save; i++)); do
    running || return 0
    sleep 0.1
  done
  kill -KILL -- "-$(cat "$state/pid")"
}

case "${1:-}" in
setup | start | status | stop) "$@" ;;
jobs)
  shift
  jobs_one_after_another "$@"
  ;;
*)
  echo "error: worker.sh knows setup, start, status and stop, not '${1:-}'" >&2
  exit 2
  ;;
esac
