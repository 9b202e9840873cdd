"""A Hugging Face model on packed tokens: loading, shared-prefix attention, the policy head, routing, adapters."""
