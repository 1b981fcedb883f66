# The coordinator's: SuperLink, SuperExec and `consilium-server`. From the repository's root:
#   docker build -f deploy/server.Dockerfile -t consilium-coordinator:0.1.0 .
# It trains nothing, so --build-arg TORCH_INDEX=<address of PyTorch's CPU index> makes it 4 GB smaller and loses nothing.
# Behind a TLS inspection:   --secret id=ca,src=/path/to/your/ca-certificates.crt
FROM python:3.11-slim AS build
ARG TORCH_INDEX=""
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /opt/consilium
COPY pyproject.toml deploy/constraints.txt ./
RUN --mount=type=secret,id=ca \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi \
    && python3 -m venv /opt/venv \
    && if [ -n "$TORCH_INDEX" ]; then pip install -c constraints.txt --index-url "$TORCH_INDEX" torch torchvision; fi \
    && python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], 'setuptools>=77', sep='\n')" > /tmp/wanted \
    && pip install -c constraints.txt -r /tmp/wanted
RUN --mount=type=secret,id=ca \
    if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi \
    && pip install -c constraints.txt "psycopg[binary]"
COPY LICENSE README.md ./
COPY common common
# The app that a run is: what the centres approve by its fingerprint. Nothing of `client` is imported here.
COPY client client
COPY server server
COPY configs configs
COPY deploy deploy
RUN pip install --no-deps --no-build-isolation -e . && rm /opt/venv/bin/consilium-centre && mv deploy/image bin && rm bin/flwr-clientapp

FROM python:3.11-slim
COPY --from=build /opt/venv /opt/venv
COPY --from=build /opt/consilium /opt/consilium
# Where volumes come, for whichever user owns the secrets.
RUN mkdir -m 1777 /state /runs
ENV PATH=/opt/consilium/bin:/opt/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp USER=consilium FLWR_HOME=/tmp/flwr NO_PROXY=127.0.0.1,localhost,superlink,postgres \
    FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 \
    HF_HUB_DISABLE_TELEMETRY=1
USER 10001:10001
WORKDIR /tmp
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD ["healthy", "127.0.0.1:8081"]
CMD ["flower-superlink", "--help"]
