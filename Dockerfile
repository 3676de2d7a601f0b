# CPU image of the command line:
#   docker build -t vlprune .
#   docker run --rm -v "$PWD/out:/data" vlprune compress blip-tiny --ratio 0.9 --export onnx --output run
FROM python:3.11-slim

# The same torch as make setup installs, from the index that has it without CUDA.
RUN pip install --no-cache-dir torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu

COPY . /src
RUN pip install --no-cache-dir "/src[cpu]" && rm -rf /src

RUN useradd --create-home --uid 1000 vlprune && install -d -o vlprune /data
USER vlprune
WORKDIR /data
ENTRYPOINT ["vlprune"]
CMD ["--help"]
