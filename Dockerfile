# CPU image of the command line:
#   docker build -t vlprune .
#   docker run --rm -v "$PWD/out:/data" vlprune compress blip-tiny --ratio 0.9 --export onnx --output run

# The operators for packed graphs need a C++ compiler; the image does not.
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM python:3.11-slim

# The same torch as make setup installs, from the index that has it without CUDA.
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu

COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir "$(ls /wheels/*.whl)[cpu]" && rm -rf /wheels \
    && python -c "from vlprune.runtime import operators; operators.isa()"

RUN useradd --create-home --uid 1000 vlprune && install -d -o vlprune /data
USER vlprune
WORKDIR /data
ENTRYPOINT ["vlprune"]
CMD ["--help"]
