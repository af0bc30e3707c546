# The cache agent, without torch. With other arguments the scheduler's extender or the webhook.
#   docker build -f knative/images/agent.Dockerfile -t registry.example.com/glowplug/agent:0.1.0 .

ARG PYTHON_VERSION=3.11
ARG DEBIAN_OS=slim-bookworm

FROM python:${PYTHON_VERSION}-${DEBIAN_OS} AS build

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
COPY pyproject.toml README.md LICENSE /usr/src/glowplug/
COPY cache_agent/ /usr/src/glowplug/cache_agent/
COPY runtime/ /usr/src/glowplug/runtime/
# The lock is a constraint: pip installs only the packages that the agent needs, in the lock's versions.
RUN python -m venv /opt/glowplug \
    && /opt/glowplug/bin/pip install -c /usr/src/glowplug/runtime/base.lock /usr/src/glowplug[metrics] \
    && /opt/glowplug/bin/python -m compileall -q /opt/glowplug/lib \
    && /opt/glowplug/bin/pip uninstall -qy pip setuptools


FROM python:${PYTHON_VERSION}-${DEBIAN_OS} AS ship

COPY --from=build /opt/glowplug /opt/glowplug
ENV PATH=/opt/glowplug/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONSAFEPATH=1 \
    PYTHONDONTWRITEBYTECODE=1
USER 65532:65532
ENTRYPOINT ["glowplug", "agent"]
CMD ["serve"]
