"""vLLM's engine core in this process: started without weights, given them, put to sleep, ended.

Everything here leans on vLLM's insides and was tried with release 0.32.0 on its CPU build. Weights go through
`reload_weights`, never through the model's own `load_weights`: from its second call on that leaves fused experts as
they were (vLLM issue 42821). On a CPU two kinds of layer compute with packed copies of their weights, which a reload
leaves behind: `repack` makes them anew.
"""

from __future__ import annotations

import copy
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from sapo.config import VllmConfig
from sapo.data import Prompt
from sapo.errors import ConfigError, ModelError
from sapo.model.adapters import folded_weights
from sapo.model.policy import Policy
from sapo.rollout.engine import Weights
from sapo.rollout.vllm.adapter import Adapter
from sapo.rollout.vllm.pictures import Pictures, own_processing
from sapo.utils.text import first_line

GIB = 2**30
EXPERT_CHANNELS = 32
"""Alignment of the CPU build's kernel for fused experts."""
PREFILL_TOKENS = 8192
"""Prompt tokens of one prefill on a CPU, unless the longest sequence has more: bounds its memory."""

# Read when vLLM is imported or started. In process means: no process of its own, our threads, no port but on loopback,
# our log, no call home.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
DEFAULTS = {"VLLM_HOST_IP": "127.0.0.1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}


class VllmCore:
    """vLLM, running one model.

    Args:
        policy: whose architecture, precision and device it has.
        max_rows: sequences decoded together.
    """

    def __init__(self, policy: Policy, max_rows: int, settings: VllmConfig) -> None:
        _prepare_import()
        from vllm.platforms import current_platform as platform

        if platform.device_type != policy.device.type:
            raise ConfigError(
                f"rollout.engine=vllm draws on {platform.device_type}, which the installed build is for; got a policy "
                f"on {policy.device.type}; set device={platform.device_type}, or install the other build (docs/"
                "engines.md)"
            )
        self._on_cpu = platform.is_cpu()
        self._can_sleep = platform.is_sleep_mode_available()
        self._asleep = False
        self._adapter = Adapter(policy) if settings.lora_sync == "adapter" else None
        self._has_base = False
        self.pictures = Pictures(policy.vision, policy.dtype) if policy.vision is not None else None
        self._eager = self._on_cpu if settings.enforce_eager is None else settings.enforce_eager
        if self._on_cpu:
            check_head_size(_head_size(policy))
            _check_experts(policy)
        self.engine = self._start(policy, max_rows, settings)

    def _start(self, policy: Policy, max_rows: int, settings: VllmConfig) -> Any:
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        special = self._adapter.engine_options() if self._adapter else {}
        special |= self.pictures.engine_options() if self.pictures else {}
        gib = settings.kv_cache_gib or (1.0 if self._on_cpu else None)
        architecture = type(policy.model).__name__
        processing = own_processing(architecture) if self.pictures else nullcontext()
        with tempfile.TemporaryDirectory(prefix="sapo-vllm-") as directory, _process_kept(), processing:
            config = copy.deepcopy(policy.model.config)
            config.architectures = [architecture]
            if self.pictures:
                self.pictures.adapt(config)
            config.save_pretrained(directory)
            try:
                return LLMEngine.from_engine_args(
                    EngineArgs(
                        model=directory,
                        load_format="dummy",  # `set_weights` comes before the first draw
                        skip_tokenizer_init=True,  # prompts are token ids, and our stop rules read the text
                        generation_config="vllm",  # sampling is the recipe's alone
                        dtype=str(policy.dtype).removeprefix("torch."),
                        max_model_len=settings.max_model_len or -1,  # -1: the longest that fits the cache
                        max_num_seqs=max_rows,
                        **self._prefill_options(settings.max_model_len or policy.max_length),
                        gpu_memory_utilization=settings.gpu_memory_utilization,
                        kv_cache_memory_bytes=None if gib is None else int(gib * GIB),
                        enforce_eager=self._eager,
                        enable_sleep_mode=self._can_sleep,
                        logprobs_mode="processed_logprobs",  # of the distribution that was drawn from
                        distributed_executor_backend="uni",
                        **special,
                        disable_log_stats=True,
                    )
                )
            except (ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
                _end_process_group()
                raise ModelError(
                    f"vLLM cannot run {architecture} here: {_reason(error)}; rollout.vllm has its "
                    "settings, and rollout.engine=local runs every model"
                ) from error

    def _prefill_options(self, longest: int | None) -> dict[str, Any]:
        """Return how prompts are cut into batches: on a CPU never within one.

        Where a prompt is cut, vLLM turns the generator of its request back, which a CPU's cannot do ("CPU Generator
        does not use offset").
        """
        if not self._on_cpu:
            return {}
        return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(PREFILL_TOKENS, longest or 0)}

    @property
    def max_length(self) -> int:
        """Return the longest sequence it can hold."""
        return int(self.engine.model_config.max_model_len)

    def step(self) -> list[Any]:
        """Draw one more token of each sequence in the batch; return what vLLM says of them."""
        # vLLM compiles small helpers even where it was told to run eagerly: 25 s and a C++ compiler at the first step.
        with torch.compiler.set_stance("force_eager") if self._on_cpu and self._eager else nullcontext():
            found: list[Any] = self.engine.step()
            return found

    def prompt(self, prompt: Prompt) -> dict[str, Any]:
        """Return an encoded prompt as vLLM takes it, which needs no processing of vLLM's."""
        from vllm.inputs import tokens_input

        if not prompt.pictures:
            return dict(tokens_input(list(prompt.token_ids)))
        assert self.pictures is not None, "a model of text is asked about text"
        return self.pictures.prompt(prompt)

    @property
    def lora_request(self) -> Any:
        """Return what a request carries that is drawn with the adapter; None where it is folded into the weights."""
        return self._adapter and self._adapter.request

    @torch.no_grad()
    def load(self, policy: Policy, weights: Weights) -> None:
        """Take a policy's weights, and forget what was computed with those before.

        Args:
            policy: for the layers that its adapter is of, and their scale.
            weights: every parameter by the policy's own name.
        """
        if self._adapter is None:
            self._load_model(folded_weights(policy, weights))
        else:
            parts, base = self._adapter.split(weights)
            if self._has_base:
                for _ in base:  # frozen: vLLM has them
                    pass
            else:
                self._load_model(base)
                self._has_base = True
            self._adapter.load(self.engine, parts)
        self.engine.reset_prefix_cache()
        if self.pictures is not None:
            self.engine.reset_encoder_cache()

    def _load_model(self, weights: Weights) -> None:
        from vllm.config import set_current_vllm_config

        worker = self.engine.model_executor.driver_worker.worker
        with set_current_vllm_config(worker.vllm_config):
            named = self.pictures.as_saved(weights) if self.pictures else weights
            worker.model_runner.reload_weights(weights_iterator=named)
            if self._on_cpu:
                repack(worker.model_runner.get_model())

    def sleep(self) -> None:
        """Give back the memory of weights and cache, where the device can."""
        if self._can_sleep and not self._asleep:
            # 2: the weights are dropped, since new ones come before the next draw; 1: the model's move to the host.
            self.engine.sleep(level=2 if self._adapter is None else 1)
            self._asleep = True

    def wake(self) -> None:
        """Take the memory again."""
        if self._asleep:
            self.engine.wake_up()
            self._asleep = False

    def close(self) -> None:
        """End vLLM and the process group it has made."""
        if self.engine is None:
            return
        self.engine.engine_core.shutdown()
        self.engine = None
        _end_process_group()


def vllm_version() -> str:
    """Return the version of vLLM that is installed."""
    _prepare_import()
    import vllm

    return str(vllm.__version__)


def check_head_size(size: int) -> None:
    """Refuse a size of attention heads that vLLM's CPU build has no kernel for.

    Raises:
        ConfigError: with the sizes it has.
    """
    _prepare_import()
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    known = CPUAttentionBackend.get_supported_head_sizes()
    if size not in known:
        raise ConfigError(
            f"rollout.engine=vllm on a CPU needs attention heads of {', '.join(map(str, known))} channels; got {size} "
            "(hidden_size / heads); use rollout.engine=local, or a model of such heads, as recipe quickstart_vllm has"
        )


def _reason(error: Exception) -> str:
    """Return in one line why vLLM has refused: the first finding of a check of its settings, or the error's own."""
    findings: Any = getattr(error, "errors", lambda: [])()
    return str(findings[0]["msg"]).splitlines()[0] if findings else first_line(error)


def _end_process_group() -> None:
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


def _check_experts(policy: Policy) -> None:
    """Refuse experts that the CPU build pads: a reload then fails, since it expects the weights as they were."""
    width = getattr(policy.model.config.get_text_config(), "moe_intermediate_size", None)
    if width is not None and width % EXPERT_CHANNELS:
        raise ConfigError(
            f"rollout.engine=vllm on a CPU needs experts of a multiple of {EXPERT_CHANNELS} channels; got "
            f"moe_intermediate_size {width}; use rollout.engine=local"
        )


def _head_size(policy: Policy) -> int:
    config = policy.model.config.get_text_config()
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _prepare_import() -> None:
    os.environ.update(ENVIRONMENT)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


def repack(model: Any) -> None:
    """Make the packed weights of vLLM's CPU build anew: those of fused experts, and of a head tied to the embedding."""
    for module in model.modules():  # the decoder of a vision-language model has a head of its own
        head, config = getattr(module, "lm_head", None), getattr(module, "config", None)
        if head is not None and config is not None and config.get_text_config().tie_word_embeddings:
            head.quant_method.process_weights_after_loading(head)
    for module in model.modules():
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        experts = getattr(kernel, "fused_experts", None)
        if experts is not None and hasattr(experts, "process_weights_after_loading"):
            experts.process_weights_after_loading(module)


@contextmanager
def _process_kept() -> Iterator[None]:
    """Undo what vLLM's start changes for the whole process: the global generators, and a function of torch."""
    python, numpy, set_threads = random.getstate(), np.random.get_state(), torch.set_num_threads
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads = set_threads  # its CPU worker puts one there that ignores the number
        random.setstate(python)
        np.random.set_state(numpy)
