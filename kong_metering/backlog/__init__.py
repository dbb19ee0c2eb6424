"""Where the events of a queue wait until they are settled: on disk, and in memory."""
