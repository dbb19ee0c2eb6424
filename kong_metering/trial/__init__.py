"""What is sent next, and whose fault a failure is: pure decisions, over events that may be anything."""
