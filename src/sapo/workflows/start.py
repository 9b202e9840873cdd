"""The policies a run starts from: the model, its adapter, and the reference of a KL penalty."""

from __future__ import annotations

from collections.abc import Callable

from sapo.config import RunConfig
from sapo.errors import ConfigError
from sapo.model.adapters import add_adapter
from sapo.model.loading import load_policy
from sapo.model.policy import Policy
from sapo.run.routing_replay import RoutingReplay
from sapo.utils.hashing import seed_for
from sapo.workflows.coldstart import ColdStartProgress, ensure_coldstart


def starting_policy(
    config: RunConfig, on_coldstart: Callable[[ColdStartProgress], None], should_stop: Callable[[], bool]
) -> Policy:
    """Load the policy a run starts from, with its adapter; a routing replay that cannot work is refused."""
    policy = starting_model(config, on_coldstart, should_stop)
    if (lora := config.model.lora) is not None:
        seed = seed_for(config.seed, "adapter")
        vision = config.model.vision.train
        add_adapter(policy, **lora.model_dump(), seed=seed, vision=vision)
    train_vision(config, policy)
    RoutingReplay.of(config, policy)  # refused before anything is written
    return policy


def starting_model(
    config: RunConfig, on_coldstart: Callable[[ColdStartProgress], None], should_stop: Callable[[], bool]
) -> Policy:
    """Load the model of a recipe: its cold start, or the one at model.path."""
    if config.model.coldstart is not None:
        path = ensure_coldstart(config, on_coldstart, should_stop)[0]
        most = config.model.vision.max_tokens_per_picture
        return load_policy(path, config.model.dtype, config.device, max_tokens_per_picture=most)
    assert config.model.path is not None
    policy = load_policy(config.model.path, config.model.dtype, config.device, **config.model.load_options)
    if policy.adapter is not None and config.model.lora is not None:
        raise ConfigError(f"{config.model.path} is an adapter already; leave model.lora out to train it further")
    return policy


def reference_policy(config: RunConfig, should_stop: Callable[[], bool]) -> Policy | None:
    """Load the policy that a KL penalty keeps close to; None without a penalty, or when switching an adapter off gives
    it."""
    kl = config.objective.kl
    if kl is None or (config.model.lora is not None and kl.reference is None):
        return None
    if kl.reference is not None:
        trusted = config.model.trust_remote_code
        reference = load_policy(
            kl.reference,
            config.model.dtype,
            config.device,
            trust_remote_code=trusted,
            max_tokens_per_picture=config.model.vision.max_tokens_per_picture,
            text_only=not config.model.vision.load,
        )
    else:
        reference = starting_model(config, lambda _: None, should_stop)
    for parameter in reference.model.parameters():
        parameter.requires_grad_(False)
    return reference


def train_vision(config: RunConfig, policy: Policy) -> None:
    """Choose what of a policy's vision part is trained; an adapter has chosen for itself."""
    if policy.vision is not None and policy.adapter is None:
        policy.vision.train(config.model.vision.train)


def check_same_tokens(policy: Policy, reference: Policy | None) -> None:
    """Refuse a reference whose ids stand for other text: log pi_ref would be of another completion."""
    if reference is not None and policy.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise ConfigError(
            f"objective.kl.reference must have the tokens of the trained model; {reference.source} has "
            f"{len(reference.tokenizer)} and the model {len(policy.tokenizer)}, or the same number of others"
        )
