"""The GPU of this machine, and which kernel is the fastest on it: timed once per problem, remembered on disk."""
