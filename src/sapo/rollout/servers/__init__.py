"""The engine `vllm` on servers: vLLM in processes of its own, spoken to over HTTP, its weights sent over gloo.

In the process that trains: `engine.py` speaks the protocol of engines, `fleet.py` knows which servers live and hold the
weights, `spread.py` draws a batch over them, `client.py` is the HTTP of one server and `processes.py` the servers that
are started here. In the process of a server: `serve.py` starts vLLM's own server, `guard.py` asks every request for the
token and `worker.py` takes the weights. `transfer.py` is both ends of the way of the weights. No module but worker.py
imports vLLM, so that the process that trains can do without it where the servers run already.
"""
