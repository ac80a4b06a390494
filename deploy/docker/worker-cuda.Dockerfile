# The worker with libtorch and its CUDA libraries (5 GB), for NVIDIA GPUs with driver 580 or newer. From the root of the repository:
#     docker build -f deploy/docker/worker-cuda.Dockerfile -t arcface-worker-cuda:0.1.0 .
#     docker run --gpus all ... arcface-worker-cuda:0.1.0 --join HOST:1234
FROM rust:1.95.0-slim-bookworm AS build
# libtorch goes where the final image has it, since its folder becomes the executable's run path.
ENV ARCFACE_CACHE=/opt/arcface
WORKDIR /src
COPY scripts scripts
RUN scripts/setup.sh libtorch && rm -rf /var/lib/apt/lists/*
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    . scripts/env.sh \
    && cargo build --release --locked --package arcface-worker \
    && strip --strip-debug -o /usr/local/bin/arcface-worker target/release/arcface-worker

# The wheel of the libtorch that was built against, with what it needs: CUDA, cuDNN, NCCL, NVRTC. Of these, shared libraries alone
# are kept, in one folder.
FROM python:3.11-slim-bookworm AS cuda
RUN pip install --no-cache-dir --target /wheels torch==2.11.0 \
    && install -d /libraries \
    && find /wheels/torch/lib /wheels/nvidia -name 'lib*.so*' -exec cp -n {} /libraries/ \;

FROM debian:12.15-slim
LABEL org.opencontainers.image.title="arcface-worker-cuda" \
      org.opencontainers.image.description="Worker of an ArcFace cluster on GPUs, and the offline tools" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# /data is what jobs read, /train where they write. New volumes mounted there take the owner from here.
RUN groupadd --gid 10001 arcface \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin arcface \
    && install -d -o arcface -g arcface -m 0750 /data /train
# Where the executable looks: its run path is that of the build.
COPY --from=cuda /libraries /opt/arcface/libtorch-2.11.0/lib
COPY --from=build /usr/local/bin/arcface-worker /usr/local/bin/
USER 10001:10001
# Shows now, not in a cluster, that every library is there.
RUN ["arcface-worker", "networks"]
# The driver's libraries come from the host: the container toolkit reads the NVIDIA variables. Libraries that are opened at run time are
# looked for along LD_LIBRARY_PATH; compiled kernels are kept where it may write.
ENV ARCFACE_DEVICE=cuda \
    LD_LIBRARY_PATH=/opt/arcface/libtorch-2.11.0/lib \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    XDG_CACHE_HOME=/tmp \
    ARCFACE_OUTPUT_ROOT=/train \
    ARCFACE_WORKER_METRICS=0.0.0.0:9465 \
    ARCFACE_LOG_FORMAT=json
WORKDIR /train
EXPOSE 9465
# The agent tells the coordinator, jobs make a checkpoint, and only then it ends: give it 60 s (docker stop --time 60).
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=3s --start-period=10s --retries=3 CMD ["bash", "-c", \
    "exec 3<>/dev/tcp/127.0.0.1/9465 && printf 'GET /metrics HTTP/1.0\\r\\n\\r\\n' >&3 && read -r line <&3 && [[ $line == *' 200 '* ]]"]
ENTRYPOINT ["arcface-worker"]
CMD ["--data-root", "/data", "--data-root", "/train"]
