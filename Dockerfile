# sapo for CPUs, or for CUDA:
#   docker build -t sapo .
#   docker build -t sapo:cuda --build-arg BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 --build-arg TORCH=https://download.pytorch.org/whl/cu130 .
# Runs and the cache of cold starts and kernels stay on the machine, and are owned by whoever starts the container:
#   mkdir -p runs cache
#   docker run --rm --user "$(id -u):$(id -g)" -e HOME=/tmp -v "$PWD/runs:/work/runs" -v "$PWD/cache:/cache" sapo train quickstart
ARG BASE=ubuntu:24.04

FROM ${BASE} AS build
ARG TORCH=https://download.pytorch.org/whl/cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-pip \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/sapo
WORKDIR /src
# torch first and alone: a resolver that meets it as a dependency may take another build.
COPY constraints.txt ./
RUN /opt/sapo/bin/pip install --no-cache-dir -c constraints.txt --extra-index-url "${TORCH}" torch
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
COPY recipes ./recipes
RUN /opt/sapo/bin/pip install --no-cache-dir -c constraints.txt '.[all]'

FROM ${BASE}
# gcc compiles the kernels of decoding at first use, on the machine's own processor. bubblewrap is the sandbox of programs.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 gcc libc6-dev libgomp1 bubblewrap \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home sapo \
    && mkdir -m 1777 /work /cache
COPY --from=build /opt/sapo /opt/sapo
ENV PATH=/opt/sapo/bin:$PATH \
    SAPO_CACHE=/cache
USER 10001
WORKDIR /work
ENTRYPOINT ["sapo"]
CMD ["--help"]
