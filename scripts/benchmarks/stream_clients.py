"""Clients that stream completions, for benchmarks of a server: a process of its own, a thread per request.

    python -m benchmarks.stream_clients PORT REQUESTS.json

The file holds a list of {"at": seconds after the start, "body": …}. The output is a list of {"at", "status",
"tokens", "first_s", "total_s"} as JSON; status 0 is a failed connection, or a stream without its end.
"""

from __future__ import annotations

import http.client
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

_LIMIT = 300.0


def main(port: int, file: str) -> None:
    requests = json.loads(Path(file).read_text())
    results: list[dict[str, float]] = [{} for _ in requests]
    begun = time.monotonic()
    threads = []
    for number, request in sorted(enumerate(requests), key=lambda pair: float(pair[1]["at"])):
        time.sleep(max(0.0, request["at"] - (time.monotonic() - begun)))
        threads.append(threading.Thread(target=_client, args=(port, request, results[number])))
        threads[-1].start()
    for thread in threads:
        thread.join()
    print(json.dumps(results))


def _client(port: int, request: dict[str, Any], result: dict[str, float]) -> None:
    begun = time.monotonic()
    result |= {"at": request["at"], "status": 0, "tokens": 0, "first_s": 0.0, "total_s": 0.0}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_LIMIT)
    try:
        body = json.dumps({**request["body"], "stream": True, "stream_options": {"include_usage": True}})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        status, ended = response.status, response.status != 200
        for line in response:
            if line.startswith(b'data: {"error"'):
                break
            if line.startswith(b"data: {"):
                result["first_s"] = result["first_s"] or time.monotonic() - begun
                if b'"usage":{' in line:
                    result["tokens"] = json.loads(line[6:])["usage"]["completion_tokens"]
            ended = ended or line.startswith(b"data: [DONE]")
        result["status"] = status if ended else 0
    except (OSError, http.client.HTTPException):
        pass
    finally:
        connection.close()
        result["total_s"] = time.monotonic() - begun


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
