# lm in a container: two targets from this file.
#
#   docker build -t lm:cpu .                     the default, small: torch's CPU wheels
#   docker build -t lm:cuda --target cuda .      torch's CUDA wheels, which bring NVIDIA's libraries: no CUDA image needed
#
# docs/container.md says how to run them, and how to build them behind a mirror. Nothing of pip's settings stays in an
# image: they come in as the secret pip.conf.
ARG BASE_IMAGE=python:3.11-slim-bookworm

# ---- what all stages begin with, and all that an image says of itself
FROM ${BASE_IMAGE} AS base
# HOME and USER: a user whom /etc/passwd does not know has neither, and torch and getpass ask for both.
# hadolint takes tiktoken's folder for a secret:
# hadolint ignore=DL3064
ENV PATH=/opt/lm/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    USER=lm \
    LM_DATA_HOME=/data \
    TIKTOKEN_CACHE_DIR=/opt/lm/tiktoken \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor
LABEL org.opencontainers.image.title="lm" \
      org.opencontainers.image.description="Train every language model from a bigram table to GPT-2" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="MIT"
# anybody may write here, as in /tmp: `--user` takes any number, such as that of the owner of what is mounted
RUN install -d -m 1777 /app/checkpoints /app/logs /data
VOLUME ["/app/checkpoints", "/app/logs", "/data"]
WORKDIR /app
# lm is process 1: SIGTERM reaches it, it saves and exits 143; docker stop -t 120 gives it the time
STOPSIGNAL SIGTERM
ENTRYPOINT ["lm"]
CMD ["--help"]

# ---- lm itself, without what it depends on: all that a change of the source builds again
FROM base AS app
RUN python -m venv --without-pip /opt/lm
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY lm lm
# the constraints are for the tools that build the wheel; newer releases of pip read the second variable
RUN --mount=type=secret,id=pip.conf \
    PIP_CONFIG_FILE=/run/secrets/pip.conf PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
    pip --python /opt/lm/bin/python install --no-cache-dir --no-deps .

# ---- dependencies, checked against the hashes of a lock
FROM base AS dependencies-cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m venv --without-pip /opt/lm
COPY requirements.lock /opt/lm/
RUN --mount=type=secret,id=pip.conf \
    PIP_CONFIG_FILE=/run/secrets/pip.conf PIP_EXTRA_INDEX_URL=$TORCH_INDEX \
    pip --python /opt/lm/bin/python install --no-cache-dir --no-deps --require-hashes -r /opt/lm/requirements.lock

FROM base AS dependencies-cuda
RUN python -m venv --without-pip /opt/lm
COPY requirements-cuda.lock /opt/lm/requirements.lock
RUN --mount=type=secret,id=pip.conf \
    PIP_CONFIG_FILE=/run/secrets/pip.conf \
    pip --python /opt/lm/bin/python install --no-cache-dir --no-deps --require-hashes -r /opt/lm/requirements.lock

# ---- the images
FROM base AS cuda
# torch.compile builds launchers of its GPU kernels by a C compiler; nothing else needs it
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=dependencies-cuda /opt/lm /opt/lm
COPY --from=app /opt/lm /opt/lm
COPY configs configs
COPY cluster cluster
RUN ["python", "-c", "from lm.tokenizers.published import main; main()"]
USER 1000:1000

FROM base AS cpu
COPY --from=dependencies-cpu /opt/lm /opt/lm
COPY --from=app /opt/lm /opt/lm
COPY configs configs
COPY cluster cluster
# GPT-2's ranks, where they can be downloaded: the image then needs no network for them
RUN ["python", "-c", "from lm.tokenizers.published import main; main()"]
USER 1000:1000
