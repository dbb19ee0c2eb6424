"""When a batch may leave, what is sent next, and whose fault a failure is: pure decisions, over any events."""
