# docker build --tag bpt_dist .
# docker run --rm --volume bpt_runs:/runs bpt_dist -m torch.distributed.run --standalone --nproc-per-node 2 launcher/train.py --config configs/quickstart.yaml output=/runs
#
# A service; the token is one line, in a file that uid 1000 can read:
# docker build --target serve --tag bpt_serve .
# docker run --rm --publish 8000:8000 --volume ./exports:/exports:ro --volume ./token:/run/token:ro bpt_serve /exports --host 0.0.0.0 --token-file /run/token
FROM python:3.11-slim-bookworm AS base

# tini: as process 1 Python would neither pass signals on to the ranks nor reap them. The compiler is for packages without a wheel.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ tini \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/bpt_dist
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY bpt_dist bpt_dist
RUN pip install --no-cache-dir --constraint constraints.txt --editable ".[serve]"
COPY launcher launcher
COPY configs configs

# Runs belong into a volume, /runs. A named volume belongs to the user below; a folder of the host must be writable for uid 1000.
RUN useradd --uid 1000 --create-home bpt && mkdir /runs && chown bpt /runs
USER bpt
ENV PYTHONUNBUFFERED=1

# SIGTERM reaches the server, which answers what it has accepted: give it time (`docker stop --time 60`).
FROM base AS serve
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["tini", "-g", "--", "bpt-dist", "serve"]
CMD ["--help"]

FROM base AS train
ENTRYPOINT ["tini", "-g", "--", "python"]
CMD ["launcher/train.py", "--help"]
