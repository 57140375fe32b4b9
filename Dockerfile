# One image for every part: `up` (the default), `node`, `proxy`, `status`.
#   docker build -t walship . && docker run -p 8080:8080 -v walship:/data walship
# The base can be any image with python3 >= 3.11 and its venv module.
ARG BASE=python:3.12-slim

FROM ${BASE} AS build
WORKDIR /src
COPY pyproject.toml README.md ./
COPY walship walship
COPY proxy proxy
RUN python3 -m venv /opt/walship \
 && /opt/walship/bin/pip install --no-cache-dir --disable-pip-version-check . \
 && /opt/walship/bin/pip uninstall --yes --quiet pip setuptools

FROM ${BASE}
RUN groupadd --gid 10001 walship \
 && useradd --uid 10001 --gid walship --no-create-home --home-dir /data --shell /usr/sbin/nologin walship \
 && install -d -o walship -g walship /data /locks
COPY --from=build /opt/walship /opt/walship
# All that is written is under /data, SQLite's large sorts included: the root may be read-only. Containers of one host may
# share a volume at /locks, with TMPDIR=/locks: then each can prove that a killed one is dead.
ENV PATH=/opt/walship/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    TMPDIR=/data \
    SQLITE_TMPDIR=/data \
    WALSHIP_HEALTH=http://127.0.0.1:8080/health
# By number: Kubernetes' runAsNonRoot does not trust a name.
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8080
STOPSIGNAL SIGTERM
# Another --listen needs another WALSHIP_HEALTH. SIGTERM drains; a node that leads hands the lead over first.
HEALTHCHECK --interval=5s --timeout=3s --start-period=20s --retries=3 \
  CMD ["python3", "-c", "import os, urllib.request; urllib.request.urlopen(os.environ['WALSHIP_HEALTH'], timeout=2)"]
ENTRYPOINT ["walship"]
CMD ["up", "--data", "/data", "--listen", "0.0.0.0:8080"]
