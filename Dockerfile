# Two images from one file; see docs/docker.md:
#   docker build --target cpu -t vlprune:cpu .
#   docker build --target gpu -t vlprune:gpu .
# Behind a mirror: --build-arg PIP_INDEX_URL=..., and TORCH_INDEX for the CPU build of torch.
ARG PYTHON=python:3.11.14-slim-bookworm

FROM ${PYTHON} AS base
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
COPY docker/constraints.txt /etc/vlprune/constraints.txt
RUN useradd --create-home --uid 1000 vlprune && install --directory --owner=vlprune /data
WORKDIR /data

# The operators for packed graphs need a C++ compiler; the images do not.
FROM base AS build
ARG PIP_INDEX_URL=https://pypi.org/simple
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip wheel --no-deps --wheel-dir /wheels /src

# CUDA 13 and cuDNN 9 come with torch, as wheels of NVIDIA's; onnxruntime-gpu loads the same files. The driver is the host's.
FROM base AS gpu
ARG PIP_INDEX_URL=https://pypi.org/simple
RUN pip install --constraint /etc/vlprune/constraints.txt torch==2.13.0
COPY --from=build /wheels /wheels
RUN pip install --constraint /etc/vlprune/constraints.txt "$(ls /wheels/*.whl)[gpu]" \
    && python -c "from vlprune.runtime import operators; operators.isa()"
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER vlprune
ENTRYPOINT ["vlprune"]
CMD ["--help"]

# The last one: what `docker build .` makes. Its torch, from an index of its own, has no CUDA, which is gigabytes.
FROM base AS cpu
ARG PIP_INDEX_URL=https://pypi.org/simple
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --constraint /etc/vlprune/constraints.txt --extra-index-url "${TORCH_INDEX}" torch==2.13.0+cpu
COPY --from=build /wheels /wheels
RUN pip install --constraint /etc/vlprune/constraints.txt "$(ls /wheels/*.whl)[cpu]" \
    && python -c "from vlprune.runtime import operators; operators.isa()"
USER vlprune
ENTRYPOINT ["vlprune"]
CMD ["--help"]
