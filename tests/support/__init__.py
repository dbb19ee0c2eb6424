"""What tests of several kinds need: a plugin server's process, Kong's part of the protocol, an ingest endpoint."""
