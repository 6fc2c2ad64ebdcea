# One process serving the page and the REST API. The embedded weights are inside: no download, no GPU needed.
#
#   docker build -t gen-studio .
#   docker run --rm -p 127.0.0.1:7860:7860 -v gen-studio:/home/gen/data gen-studio
#   docker run --rm gen-studio list
#
# The standard package source gives the CUDA build of torch. For a small CPU image name the CPU source:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=<the CPU source named on pytorch.org> -t gen-studio .
FROM python:3.11-slim

LABEL org.opencontainers.image.title="gen-studio" \
      org.opencontainers.image.description="A studio for diffusion transformers: page, REST API and command line" \
      org.opencontainers.image.licenses="Apache-2.0"

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# uid 1000 is the user that Hugging Face Spaces run containers as.
RUN useradd --create-home --uid 1000 gen \
 && install --directory --owner=gen --group=gen /home/gen/data /home/gen/cache

# 1. The pins, without the tests' tools: this layer is rebuilt only when requirements.txt changes.
ARG PIP_EXTRA_INDEX_URL=""
WORKDIR /build
COPY requirements.txt ./
RUN sed '/^# --- Tests and tools/,$d' requirements.txt > run.txt \
 && python -m pip install --no-cache-dir --no-compile -r run.txt

# 2. The studio itself, as an installed package; nothing of the source tree stays.
COPY pyproject.toml README.md LICENSE ./
COPY weights weights
COPY pipelines pipelines
COPY gen gen
COPY app app
RUN python -m pip install --no-cache-dir --no-deps --no-build-isolation . \
 && rm -rf /build

# 3. How it runs: not as root, writing only below /home/gen, reachable from outside the container.
#    GEN_PUBLIC=1 says that serving beyond loopback without a token is meant: publish the port with care.
ENV GEN_HOME=/home/gen/data \
    HF_HOME=/home/gen/cache/huggingface \
    GRADIO_TEMP_DIR=/home/gen/cache/gradio \
    GRADIO_ANALYTICS_ENABLED=False \
    GEN_HOST=0.0.0.0 \
    GEN_PORT=7860 \
    GEN_PUBLIC=1 \
    PYTHONUNBUFFERED=1

USER 1000
WORKDIR /home/gen
VOLUME ["/home/gen/data"]
EXPOSE 7860

HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['GEN_PORT'] + '/api/health', timeout=4)"]

ENTRYPOINT ["gen"]
CMD ["serve"]
