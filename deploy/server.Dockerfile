# The coordinator's: SuperLink, SuperExec and `consilium-server`. From the repository's root:
#   docker build -f deploy/server.Dockerfile -t consilium-coordinator:0.2.0 .
# It trains nothing, so --build-arg TORCH_INDEX=<address of PyTorch's CPU index> makes it some 4 GB smaller and loses nothing.
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
# Up to here as the client's, so that packages are installed, kept and sent once for both; what only the coordinator has lies above them.
FROM build AS more
RUN --mount=type=secret,id=ca \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi \
    && python -c "import tomllib; of = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
        print(*of['postgresql'], *of['onnx'], *of['tensorboard'], sep='\n')" > wanted.txt \
    && pip freeze > before.txt \
    && pip install -c constraints.txt -r wanted.txt \
    && pip freeze | grep -vxFf before.txt > added.txt \
    && pip install --no-deps --target /opt/more -r added.txt \
    && /tmp/sbom/bin/cyclonedx-py environment /opt/venv/bin/python --output-reproducible -o /opt/sbom.json

FROM python:3.11-slim
COPY --from=build /opt/venv /opt/venv
COPY --from=more /opt/more /opt/venv/lib/python3.11/site-packages
COPY --from=more /opt/sbom.json /opt/venv/sbom.json
# The app that a run is: its fingerprint is what the centres approve. Nothing of `client` is imported here.
COPY LICENSE pyproject.toml /opt/consilium/
COPY common /opt/consilium/common
COPY client /opt/consilium/client
COPY server /opt/consilium/server
COPY configs /opt/consilium/configs
COPY deploy /opt/consilium/deploy
COPY deploy/image/healthy deploy/image/consilium-server deploy/image/flower-superlink /opt/consilium/bin/
RUN python3 -m compileall -q --invalidation-mode unchecked-hash /opt/consilium
# Where volumes come, for whichever user owns the secrets.
RUN mkdir -m 1777 /state /runs
# The last one: memory of large arrays goes back to the system as soon as they are gone; a round needs 2.5 models, not 3.3 (tests/benchmarks/README.md).
ENV PATH=/opt/consilium/bin:/opt/venv/bin:/usr/local/bin:/usr/bin:/bin PYTHONPATH=/opt/consilium \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp USER=consilium FLWR_HOME=/tmp/flwr NO_PROXY=127.0.0.1,localhost,superlink,postgres \
    FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 \
    HF_HUB_DISABLE_TELEMETRY=1 MALLOC_MMAP_THRESHOLD_=131072
USER 10001:10001
WORKDIR /tmp
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["healthy", "127.0.0.1:8081"]
CMD ["consilium-server", "--help"]
