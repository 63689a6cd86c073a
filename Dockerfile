# vLLM's image with dspark in it: dumps, trainings and tools, on one node or many (docs/cluster.md).
FROM vllm/vllm-openai:v0.33.0
COPY . /src
RUN uv pip install --system "/src[remote,hub,ray]" && dspark-dump --version
ENTRYPOINT []
