"""Who looks after the spool: one thread for each kind of work."""
