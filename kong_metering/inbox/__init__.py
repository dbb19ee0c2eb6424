"""Where a log phase puts an event before it returns: shared memory that outlives the process."""
