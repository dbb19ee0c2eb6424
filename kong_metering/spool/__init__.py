"""What is accepted, kept on disk until it is delivered: opaque bytes in segment files, one process per directory."""
