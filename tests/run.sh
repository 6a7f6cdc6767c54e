#!/usr/bin/env bash
# The test command: lint, format, types and every test, with what they need set up. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
NEEDS=test
source environment.sh

need() { # need COMMAND PACKAGE: install a Debian package where we may, else say which one is missing
  if command -v "$1" >/dev/null; then return; fi
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$2" >/dev/null
  else
    echo "error: the tests need $1; install it (apt-get install $2)." >&2
    exit 1
  fi
}
need java default-jre-headless
need chromium chromium

ruff check .
ruff format --check .
mypy
# Two processes, file by file: an engine or a simulator that starts keeps one core busy. They share the machine's cores.
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(((cores + 1) / 2))}
export OMP_WAIT_POLICY=PASSIVE # a thread that waits spinning keeps the other process from the core
python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
