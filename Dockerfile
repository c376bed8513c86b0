# cabochon as a server, for a GPU or without one:
#   docker build --target cuda --tag cabochon .
#   docker build --target cpu --build-arg TORCH_INDEX=ADDRESS --tag cabochon .
# TORCH_INDEX is where torch's CPU wheels are; without it, torch brings CUDA along.
# What the container does, and which variables it reads, is said in src/cabochon/deploy/container.py.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim AS base
ENV PATH=/opt/cabochon/bin:$PATH PYTHONUNBUFFERED=1

FROM base AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# For the kernels, which are C.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY constraints.txt ./
RUN python -m venv /opt/cabochon
ARG TORCH_INDEX=
RUN pip install --no-cache-dir --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
# torch has brought setuptools, so the package is built with what is pinned. Dependencies first: they change rarely.
COPY pyproject.toml README.md LICENSE ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
    > requirements.txt && pip install --no-cache-dir --constraint constraints.txt --requirement requirements.txt
COPY src src
RUN pip install --no-cache-dir --no-build-isolation --no-deps .

FROM base AS cpu
RUN useradd --uid 10001 --create-home cabochon
COPY --from=build /opt/cabochon /opt/cabochon
USER 10001
EXPOSE 8080
HEALTHCHECK --start-period=10m CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + (os.environ.get('AIP_HTTP_PORT') or os.environ.get('PORT') or '8080') + '/health')"]
ENTRYPOINT ["python", "-m", "cabochon.deploy.container"]

FROM cpu AS cuda
# Triton compiles a little C when a kernel is first used.
USER 0
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
USER 10001
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility TRITON_CACHE_DIR=/tmp/triton
