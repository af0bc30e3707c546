"""Owns the reading of models from S3-compatible stores: boto3 signs and retries, bodies go straight into the segments.

boto3 is imported with the first S3 model, so that an agent without one starts sooner.
"""

from __future__ import annotations

from threading import Lock
from typing import Any

from cache_agent.errors import AccessDenied, AgentError, BadModelURI, ModelNotFound, OriginChanged, OriginUnavailable
from cache_agent.model.manifest import SourceFile
from cache_agent.model.uri import ModelURI
from cache_agent.tiers.origin import ReadScattered

_MISSING = {"NoSuchBucket", "NoSuchKey", "404", "NotFound"}
_DENIED = {"AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"}
_SKEWED = {"RequestTimeTooSkewed", "RequestExpired", "RequestInTheFuture"}
_CHANGED = {"PreconditionFailed", "412", "InvalidRange", "416"}

PATIENCE = 10.0


class S3:
    """The connection pool and the credentials that all models of an agent share; made on first use."""

    def __init__(
        self, *, endpoint: str = "", anonymous: bool = False, connections: int = 64, patience: float = PATIENCE
    ) -> None:
        """Give up, and ask again, a server that sends next to nothing for `patience` seconds."""
        self.patience = patience
        self._endpoint = endpoint
        self._anonymous = anonymous
        self._connections = connections
        self._client: Any = None
        self._lock = Lock()

    def client(self) -> Any:
        with self._lock:
            if self._client is None:
                import boto3
                import botocore
                from botocore.config import Config

                settings: dict[str, Any] = {"signature_version": botocore.UNSIGNED} if self._anonymous else {}
                self._client = boto3.session.Session().client(
                    "s3",
                    endpoint_url=self._endpoint or None,
                    config=Config(
                        max_pool_connections=self._connections,
                        connect_timeout=5,
                        read_timeout=self.patience,
                        retries={"mode": "standard", "total_max_attempts": 3},
                        # A checksum of the whole object says nothing about a range, and would buffer the body.
                        response_checksum_validation="when_required",
                        # Every S3-compatible store knows Content-MD5 of uploads; not all know trailing checksums.
                        request_checksum_calculation="when_required",
                        **settings,
                    ),
                )
            return self._client


class S3Origin(ReadScattered):
    """The objects directly below one prefix."""

    def __init__(self, uri: ModelURI, s3: S3) -> None:
        self.uri = uri.text
        bucket, _, prefix = uri.place.partition("/")
        if not bucket or not prefix.strip("/"):
            raise BadModelURI(f"{uri.text}: name a bucket and a prefix, like s3://models/llama-1b")
        self._bucket = bucket
        self._prefix = prefix.strip("/") + "/"
        self._s3 = s3
        self.patience = s3.patience

    def files(self) -> list[SourceFile]:
        found: list[SourceFile] = []
        try:
            pages = self._s3.client().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=self._prefix, Delimiter="/"):
                for item in page.get("Contents", ()):
                    name = item["Key"][len(self._prefix) :]
                    if name:
                        found.append(SourceFile(name, item["Size"], _quoted(item["ETag"])))
        except Exception as error:
            raise self._translate(error, "listing it") from error
        if not found:
            raise ModelNotFound(f"{self.uri}: no object has this prefix; check bucket, prefix and endpoint")
        return found

    def _fetch(self, file: SourceFile, start: int, end: int) -> tuple[Any, Any]:
        response = self._s3.client().get_object(
            Bucket=self._bucket, Key=self._prefix + file.name, Range=f"bytes={start}-{end}", IfMatch=file.etag
        )
        return response, response["Body"]._raw_stream

    def key(self, name: str) -> str:
        """Return the key, in the bucket, of a file of the model."""
        return self._prefix + name

    def call(self, operation: str, what: str, **arguments: Any) -> Any:
        """Call another operation on the bucket, like a write; `what` names it in errors. Raises `AgentError`."""
        try:
            return getattr(self._s3.client(), operation)(Bucket=self._bucket, **arguments)
        except Exception as error:
            raise self._translate(error, what) from error

    def _check(self, response: dict[str, Any], file: SourceFile, start: int, end: int) -> None:
        """Compare ETag, range and length, because some servers answer a range with status 200."""
        if _quoted(response.get("ETag", "")) != file.etag:
            raise OriginChanged(f"{self.uri}: {file.name} was overwritten while it was read")
        whole = start == 0 and end + 1 == file.size
        expected = f"bytes {start}-{end}/{file.size}"
        if response.get("ContentRange", expected if whole else "") != expected:
            raise OriginUnavailable(
                f"{self.uri}: the server answered another range of {file.name} than the one asked for "
                f"({response.get('ContentRange')} instead of {expected}); it must support ranged GET"
            )
        if response.get("ContentLength") != end - start + 1:
            raise OriginUnavailable(f"{self.uri}: the server announced {response.get('ContentLength')} bytes")

    def _translate(self, error: Exception, what: str) -> AgentError:
        if isinstance(error, AgentError):
            return error
        from botocore.exceptions import ClientError, NoCredentialsError, ParamValidationError, PartialCredentialsError

        if isinstance(error, (NoCredentialsError, PartialCredentialsError)):
            return AccessDenied(
                f"{self.uri}: the agent has no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for it, "
                "give it a role, or start it with --s3-anonymous"
            )
        if isinstance(error, ParamValidationError):
            return BadModelURI(f"{self.uri}: {self._bucket!r} is no name of a bucket; use s3://bucket/prefix")
        if isinstance(error, ClientError):
            code = str(error.response.get("Error", {}).get("Code", ""))
            message = error.response.get("Error", {}).get("Message", "")
            if code in _MISSING:
                return ModelNotFound(f"{self.uri}: {what} found nothing ({code}); check bucket and prefix")
            if code in _DENIED:
                return AccessDenied(f"{self.uri}: the store refuses the agent's credentials ({code}: {message})")
            if code in _SKEWED:
                return OriginUnavailable(
                    f"{self.uri}: the store takes no request because this node's clock is wrong ({code}: {message}); "
                    "set the clock"
                )
            if code in _CHANGED:
                return OriginChanged(f"{self.uri}: overwritten or removed while it was read ({code})")
            return OriginUnavailable(f"{self.uri}: {what} failed ({code}: {message})")
        return OriginUnavailable(f"{self.uri}: {what} failed ({type(error).__name__}: {error})")


def _quoted(etag: str) -> str:
    """Return an ETag as HTTP spells it; some stores leave the quotes out in lists."""
    return etag if etag.startswith(('"', "W/")) else f'"{etag}"'
