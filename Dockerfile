FROM python:3.12-slim

# torch.compile needs a compiler
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

# cpu, or a CUDA version of PyTorch's packages, for example cu128
ARG TORCH=cpu
RUN pip install --no-cache-dir torch torchvision --index-url "https://download.pytorch.org/whl/${TORCH}"

COPY pyproject.toml README.md LICENSE /source/
COPY condense /source/condense
COPY methods /source/methods
COPY buffers /source/buffers
COPY eval /source/eval
RUN pip install --no-cache-dir /source

ENV CONDENSE_CACHE=/data/.cache
WORKDIR /data
ENTRYPOINT ["condense"]
CMD ["--help"]
