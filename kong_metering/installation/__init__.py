"""Putting the plugin server beside a Kong on a host, as a service of systemd's, and taking it away again."""
