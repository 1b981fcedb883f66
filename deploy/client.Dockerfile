# One per hospital. From the repository's root:
#   docker build -f deploy/client.Dockerfile -t consilium-centre:0.2.0 .
# CPU only:                  --build-arg TORCH_INDEX=<address of PyTorch's CPU index>
# Behind a TLS inspection:   --secret id=ca,src=/path/to/your/ca-certificates.crt
FROM python:3.11-slim AS build
ARG TORCH_INDEX=""
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /tmp/build
COPY pyproject.toml deploy/constraints.txt ./
RUN --mount=type=secret,id=ca \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi \
    && python3 -m venv /opt/venv \
    && if [ -n "$TORCH_INDEX" ]; then pip install -c constraints.txt --index-url "$TORCH_INDEX" torch torchvision; fi \
    && python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > wanted.txt \
    && pip install -c constraints.txt -r wanted.txt \
    && python3 -m venv /tmp/sbom && /tmp/sbom/bin/pip install -q cyclonedx-bom==7.5.0 \
    && /tmp/sbom/bin/cyclonedx-py environment /opt/venv/bin/python --output-reproducible -o /opt/venv/sbom.json

FROM python:3.11-slim
COPY --from=build /opt/venv /opt/venv
# The code after the packages: an upgrade of ours sends a hospital some hundred kilobytes, not PyTorch again.
COPY LICENSE /opt/consilium/
COPY common /opt/consilium/common
COPY client /opt/consilium/client
COPY configs /opt/consilium/configs
COPY deploy/image/healthy deploy/image/flower-supernode deploy/image/flwr-clientapp deploy/image/consilium-centre /opt/consilium/bin/
# Nothing can be written there later, and each message starts a process.
RUN python3 -m compileall -q --invalidation-mode unchecked-hash /opt/consilium
# HOME and FLWR_HOME lie on a tmpfs: the root file system is read-only. NO_PROXY: the parts inside talk to each other over the loopback.
ENV PATH=/opt/consilium/bin:/opt/venv/bin:/usr/local/bin:/usr/bin:/bin PYTHONPATH=/opt/consilium \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp USER=consilium FLWR_HOME=/tmp/flwr NO_PROXY=127.0.0.1,localhost \
    FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 \
    HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1
USER 10001:10001
WORKDIR /tmp
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["healthy", "127.0.0.1:8081"]
ENTRYPOINT ["flower-supernode"]
