# An image that serves a PyTorch model under guard; without arguments, the embedded demo model.
#
#   docker build --build-arg PIP_EXTRA_INDEX_URL=<index of PyTorch's CPU wheels> --tag guardserve .
#   docker run --publish 127.0.0.1:8000:8000 guardserve
#   docker run --publish 127.0.0.1:8000:8000 --volume ./models:/models:ro --env GUARDSERVE_API_KEYS guardserve serve net.pt2
#
# constraints.txt says which release of torch is installed, TORCH_BUILD which build of it:
#   cpu (default)  the CPU wheel, "+cpu" in its version. Python's default package index does not carry it: give the
#                  address from PyTorch's installation page as PIP_EXTRA_INDEX_URL, or a pip configuration that has it
#                  as the secret "pip" (--secret id=pip,src=pip.conf), which leaves no trace in the image. Without
#                  either the build stops at once rather than take the CUDA build, several times as large, unasked.
#   cuda           the wheel of the default package index, which is a CUDA build on x86-64; needs no further index.
#   cu130, ...     that CUDA build, from PyTorch's index for it.
# A CUDA image takes the driver from the host: docker run --gpus all. The CUDA libraries come with the wheels.
#
# The server needs no writable file system: docker run --read-only --tmpfs /tmp --cap-drop ALL
# Settings are environment variables (GUARDSERVE_PORT, ...): set the port there and not as --port, so that the health
# check finds it too.

# pip's cache is a mount of the build, in no layer:
# hadolint global ignore=DL3042
ARG PYTHON=3.11
ARG DEBIAN=bookworm

# not the slim one: a part of guardserve is compiled
FROM python:${PYTHON}-${DEBIAN} AS build
ENV PIP_CACHE_DIR=/var/cache/pip PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
RUN python -m venv --without-pip /venv

# Dependencies go to /venv and the package to /package, from the most to the least stable: a change of code neither
# installs torch again nor changes the image layer that holds it.
ARG TORCH_BUILD=cpu
ARG PIP_EXTRA_INDEX_URL
COPY constraints.txt ./
RUN case "${TORCH_BUILD}" in \
      cuda) sed -i 's/^torch==/torch===/' constraints.txt ;; \
      *) sed -i "s/^torch==.*/&+${TORCH_BUILD}/" constraints.txt ;; \
    esac
RUN --mount=type=cache,target=/var/cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip --python /venv/bin/python install --constraint constraints.txt torch \
    || { echo "No torch for TORCH_BUILD=${TORCH_BUILD}: see the top of the Dockerfile for the index it needs" >&2; exit 1; }

COPY pyproject.toml ./
RUN --mount=type=cache,target=/var/cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      > requirements.txt \
    && pip --python /venv/bin/python install --constraint constraints.txt --requirement requirements.txt

COPY README.md LICENSE setup.py ./
COPY native native
COPY guardserve guardserve
RUN --mount=type=cache,target=/var/cache/pip --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip --python /venv/bin/python install --no-deps --prefix /package .


FROM python:${PYTHON}-slim-${DEBIAN}
LABEL org.opencontainers.image.title="guardserve" \
      org.opencontainers.image.description="Serves a PyTorch model with BatchNorm under guard, and watches it." \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin guardserve \
    && mkdir /models
COPY docker/healthcheck.py /healthcheck.py
COPY --from=build /venv /venv
COPY --from=build /package /venv

# The server listens beyond loopback here because a container is reached from outside only through published ports. It
# wants API keys for that; only the demo, when nothing else is asked for, answers everybody.
ENV PATH=/venv/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    GUARDSERVE_HOST=0.0.0.0 \
    GUARDSERVE_PORT=8000
WORKDIR /models
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "/healthcheck.py"]
ENTRYPOINT ["guardserve"]
CMD ["serve", "demo", "--allow-anonymous"]
