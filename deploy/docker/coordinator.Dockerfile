# The coordinator and the commands that drive it. From the root of the repository:
#     docker build -f deploy/docker/coordinator.Dockerfile -t arcface-coordinator:0.1.0 .
FROM rust:1.95.0-slim-bookworm AS build
# The messages of etcd's client are compiled by protoc. Debian keeps one version of a package in a release.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends protobuf-compiler libprotobuf-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release --locked --package arcface-coordinator \
    && strip --strip-debug -o /usr/local/bin/arcface-coordinator target/release/arcface-coordinator

FROM debian:12.15-slim
LABEL org.opencontainers.image.title="arcface-coordinator" \
      org.opencontainers.image.description="Coordinator of an ArcFace cluster, and the commands that drive it" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 arcface \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin arcface \
    && install -d -o arcface -g arcface -m 0750 /var/lib/arcface
COPY --from=build /usr/local/bin/arcface-coordinator /usr/local/bin/
# By number: Kubernetes cannot tell from a name that it is not root.
USER 10001:10001
# Shows now, not in a cluster, that every library is there.
RUN ["arcface-coordinator", "--version"]
EXPOSE 1234 9464
STOPSIGNAL SIGTERM
# The image has no HTTP client; bash opens the connection. A standby is well, too.
HEALTHCHECK --interval=5s --timeout=3s --start-period=5s --retries=3 CMD ["bash", "-c", \
    "exec 3<>/dev/tcp/127.0.0.1/9464 && printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3 && read -r line <&3 && [[ $line == *' 200 '* ]]"]
ENTRYPOINT ["arcface-coordinator"]
CMD ["serve", "--listen", "0.0.0.0:1234", "--metrics", "0.0.0.0:9464", "--store", "embedded:/var/lib/arcface"]
