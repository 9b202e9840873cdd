"""Worker processes that run verifiers under deadlines."""
