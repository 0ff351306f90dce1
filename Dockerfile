# An image that serves an artifact:
#
#     docker build -t sirius .
#     docker run -p 8000:8000 -v /models:/models:ro sirius /models/model.sirius
#
# For CUDA, another base, and Triton for its kernels:
#
#     docker build -t sirius:cuda --build-arg BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04 .
#     docker run --gpus all -p 8000:8000 -v /models:/models:ro sirius:cuda /models/model.sirius
#
# PIP_INDEX_URL and PIP_EXTRA_INDEX_URL are pip's own: an index of CPU builds of PyTorch makes the
# image 5 GB smaller.
ARG BASE=debian:bookworm-slim
FROM ${BASE}

# g++ builds the CPU kernels, once; Triton needs Python's headers.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv python3-dev g++ curl \
    && rm -rf /var/lib/apt/lists/*

ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ENV PATH=/opt/sirius/bin:$PATH PYTHONUNBUFFERED=1 SIRIUS_CACHE=/var/cache/sirius
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY sirius_compile sirius_compile
COPY passes passes
COPY runtime runtime
# The user's home is the cache, so that what others keep there (Triton's kernels) has a place too.
RUN python3 -m venv /opt/sirius \
    && pip install --no-cache-dir ".[serve]" \
    && useradd --system --home-dir /var/cache/sirius sirius \
    && install -d -o sirius -m 700 /var/cache/sirius

USER sirius
WORKDIR /
VOLUME /var/cache/sirius
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD curl -fs http://127.0.0.1:8000/health
# Exec form: signals reach the server, which drains.
ENTRYPOINT ["sirius", "serve", "--host", "0.0.0.0"]
