"""Worker processes that run verifiers with deadlines."""
