# Sana for people who want pictures: docker build . -t sana; how to run it stands in asset/docs/docker.md.
#
# NVIDIA's base image holds no CUDA libraries beyond the runtime: PyTorch's wheels bring their own. What it adds to plain
# Ubuntu is what `--gpus all` looks at: which driver CUDA 13.0 needs, and which parts of it a container gets.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

LABEL org.opencontainers.image.title="Sana" \
      org.opencontainers.image.description="Text-to-image with linear diffusion transformers: web app, server, command line" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"

# Triton and torch.compile need a C++ compiler and Python's headers on the machine where they run. tini is process 1: it
# hands signals on and ends what is left behind.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates g++ python3-dev python3-venv tini \
    && rm -rf /var/lib/apt/lists/*

# HOME is /root although the user is not root: there people mount their cache, and there libraries look for it.
ENV HOME=/root \
    USER=sana \
    PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    DEMO_PORT=15432
WORKDIR /opt/sana

# Packages change seldom, so they stand below the code. docker build --build-arg EXTRAS="gradio serve ray" chooses others.
ARG EXTRAS="gradio serve bitsandbytes torchao"
COPY pyproject.toml requirements.lock docker/requirements.py /opt/packages/
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv /opt/venv \
    && python /opt/packages/requirements.py /opt/packages $EXTRAS \
    && pip install --disable-pip-version-check -r /opt/packages/requirements.txt -c /opt/packages/constraints.txt

# Ubuntu's image has a user of number 1000, the number that the first person of most Linux machines has. The code belongs
# to root. Whoever --user names may write into its home and into output.
RUN if id ubuntu >/dev/null 2>&1; then userdel --remove ubuntu; fi \
    && useradd --uid 1000 --user-group --no-create-home --home-dir /root --shell /bin/bash sana \
    && mkdir -p /root/.cache output \
    && chmod 1777 /root /root/.cache output

COPY . .
RUN pip install --disable-pip-version-check --no-cache-dir --no-deps --no-build-isolation -e . \
    && python -m compileall -q app sana scripts tools train_scripts

# By number, so that Kubernetes can see that it is not root.
USER 1000:1000
EXPOSE 15432
HEALTHCHECK --interval=15s --timeout=10s --start-period=5m --retries=4 CMD ["python", "/opt/sana/docker/healthcheck.py"]
ENTRYPOINT ["tini", "--", "sh", "/opt/sana/docker/entrypoint.sh"]
CMD ["sana", "app", "--host=0.0.0.0"]
