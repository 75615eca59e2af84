# docker build --tag bpt_dist .
# docker run --rm --volume bpt_runs:/runs bpt_dist -m torch.distributed.run --standalone --nproc-per-node 2 launcher/train.py --config configs/quickstart.yaml output=/runs
FROM python:3.11-slim-bookworm

# tini: as process 1 Python would neither pass signals on to the ranks nor reap them. The compiler is for packages without a wheel.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ tini \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/bpt_dist
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY bpt_dist bpt_dist
RUN pip install --no-cache-dir --constraint constraints.txt --editable .
COPY launcher launcher
COPY configs configs

# Runs belong into a volume, /runs. A named volume belongs to the user below; a folder of the host must be writable for uid 1000.
RUN useradd --uid 1000 --create-home bpt && mkdir /runs && chown bpt /runs
USER bpt
ENV PYTHONUNBUFFERED=1
ENTRYPOINT ["tini", "-g", "--", "python"]
CMD ["launcher/train.py", "--help"]
