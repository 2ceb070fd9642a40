"""Where it runs: the Ray session, job submission, cluster files."""
