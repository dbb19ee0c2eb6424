"""The logs of all queues and processes in one directory: who owns which, and what became a dead letter."""
