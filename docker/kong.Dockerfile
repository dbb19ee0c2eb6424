# Kong's official image with kong-metering in a virtual environment of its own, for a Kong that starts the plugin server
# itself (docs/running.md says what does not work then).
# Build from the repository's root:  docker build -f docker/kong.Dockerfile -t kong-with-metering .
FROM kong:3.9.1

USER root
# Whatever Python the image's distribution has now.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN python3 -m venv /opt/kong-metering \
 && /opt/kong-metering/bin/pip install --no-cache-dir /src \
 && rm -rf /src
# A volume that is mounted here takes over whose it is.
RUN install --directory --mode 0700 --owner kong --group kong /usr/local/kong/metering-spool
ENV KONG_PLUGINS=bundled,metering-and-billing \
    KONG_PLUGINSERVER_NAMES=metering \
    KONG_PLUGINSERVER_METERING_SOCKET=/usr/local/kong/metering-and-billing.sock \
    KONG_PLUGINSERVER_METERING_START_CMD="/opt/kong-metering/bin/kong-metering-plugin-server --kong-prefix /usr/local/kong" \
    KONG_PLUGINSERVER_METERING_QUERY_CMD="/opt/kong-metering/bin/kong-metering-plugin-server --kong-prefix /usr/local/kong --dump"
USER kong
