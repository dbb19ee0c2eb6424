"""The queues: where events wait, which configuration rules, and who delivers."""
