# docker build -t reef . && docker run reef
FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends make git g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /reef
COPY . .
# torch without CUDA; for GPUs: docker build --build-arg TORCH_INDEX= -t reef . && docker run --gpus all reef
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN make .venv/complete
CMD ["make", "demo"]
