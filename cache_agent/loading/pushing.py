"""Owns the way of a model's directory into an S3 bucket: `push`.

Large files go as multipart uploads, which a later push goes on with. Each object carries its SHA-256 as metadata
(`glowplug-sha256`): a later push need not read it to know it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cache_agent.errors import BadModelURI, ModelNotFound, OriginChanged
from cache_agent.loading.checkpoint import describe
from cache_agent.loading.copying import (
    PARALLEL,
    STEP,
    Copied,
    Report,
    hash_file,
    hash_origin,
    local_error,
    revision,
    wanted,
)
from cache_agent.manifest import SourceFile
from cache_agent.model.uri import ModelURI, parse_uri
from cache_agent.tiers.origin import FileOrigin
from cache_agent.tiers.s3 import S3, S3Origin

_METADATA = "glowplug-sha256"
_MOST_PARTS = 10_000  # S3's


def push(directory: Path, uri: ModelURI, s3: S3, report: Report) -> Copied:
    """Copies the model in `directory` to `uri`. Raises what `describe` does for what is no checkpoint to serve,

    `BadModelURI` for a place that is no bucket, and what the store does.
    """
    if uri.scheme != "s3" or uri.revision:
        raise BadModelURI(f"{uri.text}: models are pushed to s3://bucket/prefix, without a revision")
    try:
        return _Push(directory, uri, s3, report).run()
    except OSError as error:
        raise local_error(error, directory) from error


class _Push:
    def __init__(self, directory: Path, uri: ModelURI, s3: S3, report: Report) -> None:
        self._directory = directory.absolute()
        self._source = FileOrigin(parse_uri(f"file://{quote(str(self._directory))}"), [Path("/")])
        self._target = S3Origin(uri, s3)
        self._report = report
        self._moved = 0

    def run(self) -> Copied:
        description = describe(self._source)
        files = wanted(self._source.files(), description)
        size = sum(file.size for file in files)
        digests = {
            file.name: hash_file(self._directory / file.name, file.size, lambda n: self._report("reading", n, size))
            for file in files
        }
        there = self._there()
        skipped = 0
        for file in files:
            if self._equal(there.get(file.name), file, digests[file.name]):
                skipped += 1
                self._report("sending", file.size, size)
                continue
            self._send(file, digests[file.name], lambda n: self._report("sending", n, size))
            self._check(file, digests[file.name])
        return Copied(revision(description, digests), len(files), size, self._moved, skipped)

    def _there(self) -> dict[str, SourceFile]:
        try:
            return {file.name: file for file in self._target.files()}
        except ModelNotFound:
            return {}

    def _equal(self, remote: SourceFile | None, file: SourceFile, digest: str) -> bool:
        if remote is None or remote.size != file.size:
            return False
        head = self._call("head_object", "looking at it", Key=self._target.key(file.name))
        if told := head.get("Metadata", {}).get(_METADATA):
            return bool(told == digest)
        return hash_origin(self._target, remote, lambda _: None) == digest

    def _check(self, file: SourceFile, digest: str) -> None:
        """Reads back what was sent."""
        remote = self._there().get(file.name)
        if remote is None or remote.size != file.size:
            found = "nothing" if remote is None else f"{remote.size} bytes"
            raise OriginChanged(f"{self._target.uri}: of {file.name} the store has {found}, {file.size} were sent")
        found = hash_origin(self._target, remote, lambda n: self._report("checking", n, file.size))
        if found != digest:
            raise OriginChanged(
                f"{self._target.uri}: {file.name} in the store is not the file in {self._directory}: does "
                "somebody else write there, or did the file change? Push again"
            )

    def _send(self, file: SourceFile, digest: str, report: Callable[[int], None]) -> None:
        key, metadata = self._target.key(file.name), {_METADATA: digest}
        if file.size <= 2 * STEP:
            data = (self._directory / file.name).read_bytes()
            self._call("put_object", f"sending {file.name}", Key=key, Body=data, Metadata=metadata)
            self._moved += len(data)
            report(len(data))
            return
        part_size = max(STEP, -(-file.size // _MOST_PARTS))
        upload, there = self._begun(key)
        if not upload:
            started = self._call("create_multipart_upload", f"sending {file.name}", Key=key, Metadata=metadata)
            upload = started["UploadId"]

        def send(number: int) -> dict[str, Any]:
            with (self._directory / file.name).open("rb") as source:
                source.seek((number - 1) * part_size)
                data = source.read(part_size)
            etag = there.get((number, len(data)), "")
            if etag.strip('"') != hashlib.md5(data, usedforsecurity=False).hexdigest():
                what = f"sending part {number} of {file.name}"
                reply = self._call("upload_part", what, Key=key, UploadId=upload, PartNumber=number, Body=data)
                etag = reply["ETag"]
                self._moved += len(data)
            report(len(data))
            return {"PartNumber": number, "ETag": etag}

        with ThreadPoolExecutor(PARALLEL, thread_name_prefix="push") as pool:
            try:
                parts = list(pool.map(send, range(1, -(-file.size // part_size) + 1)))
            except BaseException:  # the upload stays, and the next push goes on with it
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        self._call(
            "complete_multipart_upload",
            f"completing {file.name}",
            Key=key,
            UploadId=upload,
            MultipartUpload={"Parts": parts},
        )

    def _begun(self, key: str) -> tuple[str, dict[tuple[int, int], str]]:
        """An upload of this object that was interrupted: its id, and its parts as (number, size) -> ETag."""
        with suppress(Exception):  # not every store lists uploads; then it begins anew
            uploads = self._call("list_multipart_uploads", "looking for uploads", Prefix=key).get("Uploads", ())
            for upload in sorted((u for u in uploads if u["Key"] == key), key=lambda u: u["Initiated"], reverse=True):
                found: dict[tuple[int, int], str] = {}
                marker = 0
                while True:
                    what, place = "looking at an upload", {"Key": key, "UploadId": upload["UploadId"]}
                    page = self._call("list_parts", what, **place, PartNumberMarker=marker)
                    found |= {(part["PartNumber"], part["Size"]): part["ETag"] for part in page.get("Parts", ())}
                    if not page.get("IsTruncated"):
                        return str(upload["UploadId"]), found
                    marker = page["NextPartNumberMarker"]
        return "", {}

    def _call(self, operation: str, what: str, **arguments: Any) -> Any:
        return self._target.call(operation, what, **arguments)
