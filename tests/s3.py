"""A local S3 server for tests: a bucket is a folder, its requests are listed, and it can be made to fail."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from pathlib import Path

import localbucket

# Here, because Ray's workers inherit what is set before Ray starts. The server accepts any key.
os.environ.setdefault("AWS_ACCESS_KEY_ID", "test")
os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "test")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")


class S3:
    """A bucket and its server.

    Attributes:
        folder: that holds the bucket's files.
        endpoint: host and port of the server.
        requests: method and path of each one so far.
        failures: so many of the next requests are refused, with a status that the client does not try again by itself.
        delay_s: seconds before each answer.
    """

    def __init__(self, folder: Path):
        self.folder = folder / "bucket"
        self.folder.mkdir()
        self.requests: list[str] = []
        self.failures = 0
        self.delay_s = 0.0
        outer = self

        class Handler(localbucket.S3Handler):
            data_root = folder
            disable_nagle_algorithm = True

            def _dispatch(self, action):
                outer.requests.append(f"{self.command} {self.path}")
                time.sleep(outer.delay_s)
                if outer.failures > 0:
                    outer.failures -= 1
                    self._read_body()
                    self._send_error(localbucket.S3Error(HTTPStatus.FORBIDDEN, "AccessDenied", "not now"))
                    return
                if self.command == "PUT" and self.path.partition("?")[0].endswith("/"):  # what pyarrow has for folders
                    self._read_body()
                    self.send_response(HTTPStatus.OK)
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                super()._dispatch(action)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"127.0.0.1:{self.server.server_address[1]}"

    def uri(self, path: str = "") -> str:
        """Address of a folder in the bucket, for raydet."""
        return f"s3://bucket/{path}?endpoint_override={self.endpoint}&scheme=http"


@contextmanager
def serve(folder: Path) -> Iterator[S3]:
    """Serve an empty bucket that lies in `folder`."""
    s3 = S3(folder)
    thread = threading.Thread(target=s3.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield s3
    finally:
        s3.server.shutdown()
        s3.server.server_close()
        thread.join()
