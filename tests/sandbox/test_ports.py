"""A port that is reserved: for its server, and for nobody else."""

from __future__ import annotations

import errno
import socket
from contextlib import closing

import pytest

from kong_metering_sandbox.ports import port_of, reserve_port


def is_taken(port: int) -> bool:
    """Whether the system refuses the port to one who asks for it as for any free one."""
    with socket.socket() as other:
        try:
            other.bind(("127.0.0.1", port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


def test_nobody_is_there_and_nobody_else_gets_it() -> None:
    with reserve_port() as reserved:
        port = port_of(reserved)
        assert is_taken(port)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))
    assert not is_taken(port)


def test_its_server_serves_there_and_starts_again() -> None:
    with reserve_port() as reserved:
        for _ in range(2):
            with (
                socket.create_server(("127.0.0.1", port_of(reserved))) as server,
                socket.create_connection(server.getsockname()) as client,
                closing(server.accept()[0]) as connection,
            ):
                connection.sendall(b"x")
                assert client.recv(1) == b"x"
