"""The queues: where events wait, whose turn it is, which configuration rules, and who delivers."""
