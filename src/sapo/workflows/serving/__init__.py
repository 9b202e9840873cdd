"""A model over HTTP, by the protocol that OpenAI's clients speak.

Prompts and text are the business of `served`, turns of `worker`, the protocol of `requests`, `answers` and `refusals`,
and routes of `application`. `web` binds, guards and stops, for other pages of ours too.
"""
