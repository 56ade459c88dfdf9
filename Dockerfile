# The endpoint, with the libraries of constraints.txt; docs/deploy.md says how to run it.
#   docker build -t diffguard .                                   for a processor; a bundle is mounted at /detector
#   docker build -t diffguard --build-arg TORCH_BACKEND= .        for a GPU: PyPI's build of torch, which has CUDA
#   docker build -t diffguard --target baked --build-arg BUNDLE=data/digits/detector .    the bundle is in the image
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
# cpu, cu130, … of uv's --torch-backend.
ARG TORCH_BACKEND=cpu
# Of pyproject.toml: models and mlflow, for bundles and names that need them.
ARG EXTRAS=serve
ENV UV_LINK_MODE=copy UV_NO_CACHE=1 UV_PYTHON_DOWNLOADS=never
RUN pip install --no-cache-dir --disable-pip-version-check "uv>=0.9,<1"
WORKDIR /build
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY diffguard diffguard
RUN uv venv /opt/diffguard && \
    uv pip install --python /opt/diffguard/bin/python --compile-bytecode -c constraints.txt \
    ${TORCH_BACKEND:+--torch-backend=${TORCH_BACKEND}} ".[${EXTRAS}]"

FROM python:${PYTHON}-slim AS base
COPY --from=build /opt/diffguard /opt/diffguard
# /tmp is all that is written: the rest may be read-only.
ENV PATH=/opt/diffguard/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp DIFFGUARD_CACHE=/tmp/diffguard DIFFGUARD_DETECTOR=/detector
WORKDIR /tmp

# What a Prefect worker needs to run the project that is mounted: EXTRAS=pipeline,models
FROM base AS worker
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*
USER 10001:10001
CMD ["prefect", "worker", "start", "--pool", "diffguard", "--type", "process"]

FROM base AS endpoint
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=8)"]
CMD ["diffguard", "serve", "--host", "0.0.0.0", "--port", "8000"]

FROM endpoint AS baked
ARG BUNDLE=data/digits/detector
COPY ${BUNDLE} /detector

FROM endpoint AS mounted
