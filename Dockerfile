# syntax=docker/dockerfile:1
# Four images from one file; docs/operations.md says how each is built and run.
#   server      (the last one, built by default) a bundle, the embedded server, CPU, no torch
#   server-gpu  the same on CUDA: the runtime's libraries come as wheels, the host brings the driver
#   export      the whole command line with torch, to make bundles
#   triton      NVIDIA's tritonserver over a repository that `utune-deploy triton` wrote

ARG PYTHON=3.11-slim-bookworm
# NVIDIA's release, and the Python inside it: wheels of that Python are carried over.
ARG TRITON=25.10-py3
ARG TRITON_PYTHON=3.12


# Where wheels are installed. The environment has no pip of its own: it holds what the bill of materials names.
FROM python:${PYTHON} AS build
WORKDIR /src
COPY requirements requirements
RUN python -m venv --without-pip /opt/utune \
 && python -m venv /opt/sbom \
 && /opt/sbom/bin/pip install --no-cache-dir -r requirements/sbom.txt

FROM build AS build-server
RUN pip --python /opt/utune install --no-cache-dir -c requirements/constraints.txt -r requirements/serving.txt
COPY . .
RUN pip --python /opt/utune install --no-cache-dir --no-deps . \
 && /opt/sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o sbom.cdx.json /opt/utune/bin/python

FROM build AS build-server-gpu
RUN pip --python /opt/utune install --no-cache-dir -c requirements/constraints.txt -r requirements/serving-gpu.txt
COPY . .
RUN pip --python /opt/utune install --no-cache-dir --no-deps . \
 && /opt/sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o sbom.cdx.json /opt/utune/bin/python

FROM build AS build-export
COPY . .
RUN pip --python /opt/utune install --no-cache-dir -c requirements/constraints.txt '.[transformers]' \
 && /opt/sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o sbom.cdx.json /opt/utune/bin/python

# numpy stays below 2 here, so this list carries its own pins.
FROM python:${TRITON_PYTHON}-slim-bookworm AS build-triton
WORKDIR /src
COPY requirements requirements
RUN python -m venv --without-pip /opt/utune \
 && python -m venv /opt/sbom \
 && /opt/sbom/bin/pip install --no-cache-dir -r requirements/sbom.txt \
 && pip --python /opt/utune install --no-cache-dir -r requirements/triton-image.txt \
 && /opt/sbom/bin/cyclonedx-py environment --output-reproducible -o sbom.cdx.json /opt/utune/bin/python


# What every image of ours has in common.
FROM python:${PYTHON} AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="utune-deploy" \
      org.opencontainers.image.description="Many small tuners over one frozen backbone, one engine." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# The user is a number, so that Kubernetes can see that it is not root. Its home is the one place that is
# written: tasks are kept there. The rest of the file system may be read-only.
RUN groupadd --gid 10001 utune \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/utune --shell /usr/sbin/nologin utune \
 && install -d -o 10001 -g 10001 -m 0750 /var/lib/utune
# ONNX Runtime's wheels report to their maker over the network, and keep an identifier in the home, unless this
# is set before they are loaded.
ENV PATH=/opt/utune/bin:$PATH \
    ORT_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /var/lib/utune
VOLUME /var/lib/utune
USER 10001:10001


FROM nvcr.io/nvidia/tritonserver:${TRITON} AS triton
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="utune-deploy on Triton" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# The Python backend takes the packages of the first python3 in PATH, and some releases of it ignore PYTHONPATH:
# so an environment of the image's own Python, into which the packages are laid.
ARG TRITON_PYTHON
RUN python3 -m venv --without-pip /opt/utune
COPY --from=build-triton /opt/utune/lib/python${TRITON_PYTHON}/site-packages /opt/utune/lib/python${TRITON_PYTHON}/site-packages
COPY --from=build-triton /src/sbom.cdx.json /usr/share/doc/utune-deploy/sbom.cdx.json
RUN /opt/utune/bin/python3 -c "import ml_dtypes, numpy, onnxruntime, safetensors"
ENV PATH=/opt/utune/bin:$PATH \
    ORT_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 1000:1000
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
  CMD ["curl", "--fail", "--silent", "http://127.0.0.1:8000/v2/health/ready"]
CMD ["tritonserver", "--model-repository=/models", "--exit-timeout-secs=30"]


FROM runtime AS export
COPY --from=build-export /opt/utune /opt/utune
COPY --from=build-export /src/sbom.cdx.json /usr/share/doc/utune-deploy/sbom.cdx.json
# A command that ends; there is nothing to ask whether it is ready.
HEALTHCHECK NONE
ENTRYPOINT ["utune-deploy"]
CMD ["--help"]


# SIGTERM: not ready from then on, what was taken is answered, for up to 30 seconds; then it ends with 0.
# Docker kills after 10 unless it is told otherwise (--stop-timeout 40).
FROM runtime AS serving
EXPOSE 8000 8001 8002
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/v2/health/ready', timeout=2)"]
ENTRYPOINT ["utune-deploy", "serve"]


FROM serving AS server-gpu
COPY --from=build-server-gpu /opt/utune /opt/utune
COPY --from=build-server-gpu /src/sbom.cdx.json /usr/share/doc/utune-deploy/sbom.cdx.json
CMD ["/bundle", "--host", "0.0.0.0", "--tasks", "/var/lib/utune/tasks", "--log-format", "json", "--provider", "cuda"]


FROM serving AS server
COPY --from=build-server /opt/utune /opt/utune
COPY --from=build-server /src/sbom.cdx.json /usr/share/doc/utune-deploy/sbom.cdx.json
CMD ["/bundle", "--host", "0.0.0.0", "--tasks", "/var/lib/utune/tasks", "--log-format", "json"]
