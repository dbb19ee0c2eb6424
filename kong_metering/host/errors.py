"""What can go wrong between Kong and the host."""


class ProtocolError(Exception):
    """Bytes that are not the protocol; whoever sent them loses the connection."""


class RPCError(Exception):
    """An RPC that cannot be done; Kong gets the text, where its protocol has a place for one."""


class ConnectionEnd(Exception):  # noqa: N818 - it is how Kong is told to begin anew, not an error
    """The connection is to be closed, once what was written before is."""
