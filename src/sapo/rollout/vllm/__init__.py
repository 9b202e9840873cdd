"""The engine `vllm`: vLLM in this process, its weights streamed from the trainer.

`engine.py` speaks the protocol of engines, `drawing.py` is one call of generate, and `core.py` is all that knows vLLM's
insides: how it is started, how it takes weights, how it ends. vLLM is imported when an engine is made, not before.
"""
