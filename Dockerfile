# syntax=docker/dockerfile:1
# A slim worker: no model inside. It looks on the network volume, and downloads there once if it has to.
#
#   docker build --platform linux/amd64 -t you/modelstore-worker .
#   docker build --platform linux/amd64 --build-arg EXTRA=worker,diffusion -t you/modelstore-diffusion .
#
# scripts/build_image builds the same file without a Docker engine, runs its main job and tells its size.
ARG BASE_IMAGE=python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS build
# What to serve with: worker (text), worker,diffusion
ARG EXTRA=worker
# A mirror or a folder of wheels, where the build does not reach PyPI
ARG PIP_INDEX_URL=https://pypi.org/simple
ARG PIP_FIND_LINKS
ARG PIP_CERT
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_COMPILE=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
RUN python3 -m venv /opt/venv
COPY scripts/constraints.txt scripts/
# torch first and by itself: it is most of the image, and its layer stays while the rest changes
RUN /opt/venv/bin/pip install -c scripts/constraints.txt torch
COPY pyproject.toml README.md ./
COPY modelstore modelstore
COPY handler handler
RUN /opt/venv/bin/pip install -c scripts/constraints.txt ".[${EXTRA}]" \
    && /opt/venv/bin/pip uninstall --yes pip \
    && find /opt/venv -type d \( -name tests -o -name test -o -name include \) -path '*site-packages*' \
        -not -path '*/torch/*' -prune -exec rm -r {} + \
    # byte-code of all that a start imports, so that no start compiles; the other models of transformers on first use
    && /opt/venv/bin/python -c "import handler.engines.text, handler.worker, modelstore.cli, modelstore.store, runpod" \
    && /opt/venv/bin/python -m compileall -q /opt/venv/lib/python3*/site-packages/modelstore \
        /opt/venv/lib/python3*/site-packages/handler /opt/venv/lib/python3*/site-packages/transformers/models/auto \
    && /opt/venv/bin/python -m compileall -q /opt/venv/lib/python3*/site-packages/transformers/models/*/configuration_*.py

FROM ${BASE_IMAGE}
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_DISABLE_TELEMETRY=1
WORKDIR /worker
COPY --from=build /opt/venv /opt/venv
COPY handler/test_input.json .
# RunPod mounts the volume as root's, and gives a worker no other way to write there: the user stays root.
CMD ["python", "-m", "handler"]
