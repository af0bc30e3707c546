# The packages that all functions share, for Knative: the locked base set and the runtime, without a watchdog and without
# a model. This image serves the OpenAI routes of the model that GLOWPLUG_MODEL names. With a handler:
#
#   FROM registry.example.com/glowplug/function:0.1.0
#   COPY --chown=root:root function/ /home/app/function/
#   RUN glowplug base install -r /home/app/function/requirements.txt --target /home/app/packages
#   ENV GLOWPLUG_HANDLER=/home/app/function
#
# with USER 0 before and USER 12000 after the steps that write.

ARG PYTHON_VERSION=3.11
ARG DEBIAN_OS=slim-bookworm

FROM python:${PYTHON_VERSION}-${DEBIAN_OS} AS build

RUN groupadd --gid 12000 app \
    && useradd --uid 12000 --gid app --create-home --home-dir /home/app app \
    && chmod 755 /home/app

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore

# The index for torch alone, for CPU builds or those of one CUDA version; empty: pip's own.
ARG TORCH_INDEX=
COPY runtime/base.lock /usr/src/base.lock
RUN if [ -n "${TORCH_INDEX}" ]; then \
        pip install --no-deps --index-url "${TORCH_INDEX}" "$(grep '^torch==' /usr/src/base.lock)"; \
    fi \
    && pip install -r /usr/src/base.lock

COPY pyproject.toml README.md LICENSE /usr/src/glowplug/
COPY cache_agent/ /usr/src/glowplug/cache_agent/
COPY runtime/ /usr/src/glowplug/runtime/
RUN pip install --no-deps "/usr/src/glowplug[model]" \
    && glowplug base check \
    && mkdir /home/app/packages \
    && chmod -R a+rX /home/app


# The entrypoint is a static program, which executes the runtime's Python shim where it does not suffice.
FROM build AS shim

RUN apt-get update -qy \
    && apt-get install -qy --no-install-recommends gcc libc6-dev \
    && python -P -m runtime.container.native /usr/src/glowplug-shim


FROM build AS ship

COPY --from=shim /usr/src/glowplug-shim /usr/local/bin/glowplug-shim
WORKDIR /home/app
USER 12000:12000
ENV GLOWPLUG_PACKAGES=/home/app/packages \
    PYTHONSAFEPATH=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HOME=/tmp/huggingface \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor
CMD ["glowplug-shim"]
