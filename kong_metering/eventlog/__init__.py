"""One queue's events on disk, in the order in which they came: opaque bytes in segment files."""
