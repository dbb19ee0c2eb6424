# The upstream and the collector of compose.yaml.
FROM python:3.12-slim
COPY . /src
RUN python3 -m venv /opt/kong-metering \
 && /opt/kong-metering/bin/pip install --no-cache-dir /src /src/sandbox \
 && rm -rf /src
USER nobody
