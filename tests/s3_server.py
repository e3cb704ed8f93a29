"""An S3 server on this machine, one for all tests: clients of s3fs are cached by their arguments, not by the server."""
import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@functools.cache
def _address() -> str:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)   # ends with this process
    server.start()
    host, port = server.get_host_and_port()
    return f"http://{host}:{port}"


@contextmanager
def bucket_named(name: str) -> Iterator[str]:
    """`s3://NAME`, empty; where the server is stands in the environment, as for any user."""
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        for variable, value in {"AWS_ENDPOINT_URL": _address(), "AWS_ACCESS_KEY_ID": "key",
                                "AWS_SECRET_ACCESS_KEY": "s3cret", "AWS_DEFAULT_REGION": "us-east-1"}.items():
            patch.setenv(variable, value)
        boto3.client("s3").create_bucket(Bucket=name)
        yield f"s3://{name}"
