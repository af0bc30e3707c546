"""An S3 server on loopback whose objects are a checkpoint's files: a real server process, rclone's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Unavailable

BUCKET = "models"
_START_SECONDS = 30.0
_KEYS = ("glowplug", "only-for-benchmarks")


@dataclass(frozen=True, slots=True)
class Store:
    """A running server; `environment` has endpoint and keys under the names that every S3 library reads."""

    endpoint: str
    prefix: str
    environment: Mapping[str, str]

    @property
    def uri(self) -> str:
        return f"s3://{BUCKET}/{self.prefix}"

    def client(self) -> Any:
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=_KEYS[0],
            aws_secret_access_key=_KEYS[1],
            region_name="us-east-1",
            config=Config(signature_version="s3v4"),  # the older one signs URLs in a way that few servers still take
        )


@contextmanager
def store(model: Path) -> Iterator[Store]:
    """Serve the files of one directory below its name. Raises `Unavailable` where rclone is not installed."""
    beside = Path(sys.executable).parent / "rclone"
    program = str(beside) if beside.exists() else shutil.which("rclone")
    if program is None:
        raise Unavailable("there is no S3 server: install rclone")
    with tempfile.TemporaryDirectory(prefix="glowplug-bench-s3-") as root:
        (Path(root) / BUCKET).mkdir()
        (Path(root) / BUCKET / model.name).symlink_to(model)
        command = [program, "--config", os.devnull, "serve", "s3", "--addr", "127.0.0.1:0", "--copy-links"]
        # ETags are MD5 sums; they are computed with the first listing and kept.
        command += ["--read-only", "--dir-cache-time", "24h", "--auth-key", ",".join(_KEYS), root]
        log = Path(root) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            endpoint = _address(process, log)
            environment = {
                "AWS_ACCESS_KEY_ID": _KEYS[0],
                "AWS_SECRET_ACCESS_KEY": _KEYS[1],
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_REGION": "us-east-1",
                "AWS_ENDPOINT_URL": endpoint,
                "AWS_EC2_METADATA_DISABLED": "true",
                "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
            }
            made = Store(endpoint, model.name, environment)
            made.client().list_objects_v2(Bucket=BUCKET, Prefix=model.name + "/", Delimiter="/")
            yield made
        finally:
            process.terminate()
            process.wait()


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + _START_SECONDS
    while not (match := re.search(r"http://127\.0\.0\.1:\d+", log.read_text(errors="replace"))):
        if process.poll() is not None or time.monotonic() > deadline:
            raise Unavailable(f"the S3 server did not start: {log.read_text(errors='replace')[-300:]}")
        time.sleep(0.02)
    return match[0]
