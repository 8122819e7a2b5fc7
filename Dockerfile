# syntax=docker/dockerfile:1
# A slim worker: no model inside. It looks on the network volume, and downloads there once if it has to.
#
#   docker build --platform linux/amd64 -t you/modelstore-worker .
#   docker build --platform linux/amd64 --build-arg EXTRA=worker,diffusion -t you/modelstore-diffusion .
#   docker build --platform linux/amd64 --build-arg EXTRA=worker,embedding -t you/modelstore-embedding .
#   docker build --platform linux/amd64 --build-arg EXTRA=vllm --build-arg BASE_IMAGE=vllm/vllm-openai:v0.32.0 \
#       --build-arg VLLM_PYTHON=/usr/bin/python3 -t you/modelstore-vllm .
#
# A release also names itself: --build-arg VERSION=0.1.0 --build-arg REVISION=$(git rev-parse HEAD)
# --build-arg SOURCE=https://github.com/you/repository. The torch of the constraints needs hosts with CUDA 13.
#
# scripts/build_image builds the same file without a Docker engine, runs its main job and tells its size.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
# What to serve with: worker (text), worker,adapters (text with LoRA), worker,diffusion, worker,embedding, or vllm, whose
# base image has vLLM in an environment of its own
ARG EXTRA=worker
# An index, a folder of wheels and a certificate for pip; without them its own defaults
ARG PIP_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_CERT
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# hadolint ignore=DL3008
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends binutils && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
COPY scripts/constraints.txt scripts/
# torch first and by itself: it is most of the image, and its layer stays while the rest changes
RUN [ "${EXTRA}" = vllm ] || /opt/venv/bin/pip install --no-compile -c scripts/constraints.txt torch
COPY pyproject.toml README.md ./
COPY modelstore modelstore
COPY handler handler
RUN /opt/venv/bin/pip install --no-compile -c scripts/constraints.txt ".[${EXTRA}]"
# What no worker uses: the cloud commands and the telemetry that FastAPI and the SDK bring, a transfer protocol that our
# downloads do not speak, what compiles extensions, Amazon's services but S3, the texts that transformers' model files are
# generated from, zstandard's second backend, the colours of languages but Python in tracebacks, tests, headers, types,
# and the symbols of libraries (not of torch's and numpy's, which do not bear it)
RUN /opt/venv/bin/pip uninstall --yes --quiet hf-xet uvloop watchfiles fastapi-cloud-cli sentry-sdk rignore fastar \
        email-validator dnspython inquirerpy prompt_toolkit pfzy rich-toolkit fastapi-cli \
        opentelemetry-exporter-otlp-proto-http \
        opentelemetry-exporter-otlp-proto-common opentelemetry-exporter-otlp-common \
        opentelemetry-exporter-http-transport opentelemetry-proto opentelemetry-sdk opentelemetry-semantic-conventions \
        googleapis-common-protos setuptools pip \
    && find /opt/venv -type d \( -name tests -o -name test -o -name include \) -path '*site-packages*' \
        -not -path '*/torch/*' -prune -exec rm -r {} + \
    && find /opt/venv/lib/python3*/site-packages -name '*.pyi' -not -path '*/torch/*' -delete \
    && find /opt/venv/lib/python3*/site-packages -path '*/transformers/models/*' -name 'modular_*.py' -delete \
    && find /opt/venv/lib/python3*/site-packages/zstandard -name '*_cffi.*' -delete \
    && find /opt/venv/lib/python3*/site-packages/pygments/lexers -name '*.py' -not -name __init__.py \
        -not -name _mapping.py -not -name python.py -not -name special.py -delete \
    && find /opt/venv/lib/python3*/site-packages/botocore/data -mindepth 1 -maxdepth 1 -type d -not -name 's3*' \
        -exec rm -r {} + \
    && find /opt/venv -name '*.so*' -type f -not -path '*/torch/*' -not -path '*/numpy*' -exec strip --strip-unneeded {} +
WORKDIR /tmp
# A start with a tiny random model: it shows that the image works, and leaves the byte-code of all that a start imports.
# A second one records the files that it opens: a later start asks the kernel for them ahead (handler/readahead.py)
RUN if [ "${EXTRA}" = vllm ]; then \
        exec /opt/venv/bin/python -c "import handler.engines.vllm_start, handler.health, \
            handler.http_server, handler.worker, runpod, modelstore.store"; \
    fi; \
    /opt/venv/bin/python -c "from pathlib import Path; from modelstore.bench.checkpoints import make_checkpoint; \
        make_checkpoint(Path('/tmp/tiny'), 2_000_000, 'float16')" \
    && MODEL_ID=file:///tmp/tiny MODELSTORE_ROOT=/tmp/store /opt/venv/bin/python -m handler \
        --test_input '{"input": {"prompt": "a", "max_tokens": 2}}' \
    && MODEL_ID=file:///tmp/tiny MODELSTORE_ROOT=/tmp/store /opt/venv/bin/python -m handler.readahead \
    && MODELSTORE_ROOT=/tmp/store /opt/venv/bin/modelstore ls \
    && /opt/venv/bin/python -c "import jinja2.ext, jinja2.sandbox, transformers.utils.chat_template_utils, \
        handler.health, handler.http_server, uvicorn.protocols.http.h11_impl, uvicorn.lifespan.off" \
    && rm -rf /tmp/tiny /tmp/store

FROM ${BASE_IMAGE}
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    MALLOC_ARENA_MAX=2
# MALLOC_ARENA_MAX: by default each thread gets an arena of its own, and under mixed jobs the process doubles in size
# The interpreter that has vLLM, in the base image
ARG VLLM_PYTHON=
ENV MODELSTORE_VLLM_PYTHON=${VLLM_PYTHON}
# The base image has no byte-code of vLLM and its libraries, and a worker may write none: each of vLLM's processes would
# compile for 7 s what it imports. Some files of libraries are no Python of this version, which compileall reports
RUN [ -z "${VLLM_PYTHON}" ] || PYTHONDONTWRITEBYTECODE='' "${VLLM_PYTHON}" -m compileall -q -j 0 \
        "$("${VLLM_PYTHON}" -c 'import importlib.util as u; print(u.find_spec("vllm").submodule_search_locations[0])')/.." \
    || true
ARG VERSION=0.1.0
ARG REVISION=
ARG SOURCE=
LABEL org.opencontainers.image.title="modelstore worker" \
    org.opencontainers.image.description="A serverless GPU worker that starts from a model on a network volume" \
    org.opencontainers.image.version="${VERSION}" \
    org.opencontainers.image.revision="${REVISION}" \
    org.opencontainers.image.source="${SOURCE}"
WORKDIR /worker
COPY --from=build /opt/venv /opt/venv
COPY handler/test_input.json .
# RunPod mounts the volume as root's, so the image starts as root; the worker becomes the account that owns the store's
# folder, if that is another one (handler/privileges.py).
# For your own machine; RunPod asks in its own way. A first download may take long
HEALTHCHECK --interval=10s --timeout=10s --start-period=30m CMD ["python", "-m", "handler.health"]
ENTRYPOINT []
CMD ["python", "-m", "handler"]
