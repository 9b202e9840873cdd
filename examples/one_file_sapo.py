"""Soft Adaptive Policy Optimization in one file: read it from top to bottom and you have seen the whole method.

A tiny decoder that adds four-digit numbers right about three times in ten learns, from its own attempts alone, to do so
eight times in ten (250 steps of about 0.3 s on one core). The library makes the starting weights:

    sapo coldstart quickstart                            # prints the model directory
    python examples/one_file_sapo.py MODEL_DIRECTORY

Equation numbers are those of the paper, https://arxiv.org/abs/2511.20347. Where this file departs from it: the
standard deviation in (2) divides by G - 1, and log r is bounded before exp(). Where it departs from the library: padded
batches and autograd instead of packed ones and closed-form slopes, torch's random numbers, and no held-out problems,
evaluation or checkpoints.

Suffixes of tensors: P prompts, G samples of one prompt, B = P x G sequences (those of a prompt side by side), T tokens,
V vocabulary, H hidden size, A attention heads, D the size of one head.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

# ---- The task: addition with the carries written out. To `1234+5678=` the right response is
# `4+8+0=12;3+7+1=11;2+6+1=09;1+5+0=06;#6912`: digit + digit + carry = total, from the right, then the answer.

ALPHABET = "0123456789+-*%=;#"  # token ids 0..16; the next id ends a response, the last one is padding
END, PAD = len(ALPHABET), len(ALPHABET) + 1


def draw_prompts(count: int, generator: torch.Generator) -> list[str]:
    return [f"{a}+{b}=" for a, b in torch.randint(1000, 10000, (count, 2), generator=generator).tolist()]


def score(prompt: str, response: str, finished: bool) -> float:
    """1 when the integer after the last `#` is right. The working is not judged; a response that was cut earns 0."""
    a, b = prompt.rstrip("=").split("+")
    _, mark, answer = response.rpartition("#")
    return float(finished and mark == "#" and answer.strip() == str(int(a) + int(b)))


def encode(texts: list[str]) -> Tensor:
    """Token ids (B, T) of texts of one length, as all prompts are: so none needs padding on the left."""
    return torch.tensor([[ALPHABET.index(character) for character in text] for text in texts])


def decode(token_ids: list[int]) -> str:
    return "".join(ALPHABET[i] for i in token_ids if i < END)


# ---- The policy: a decoder like Qwen3, as one function of its checkpoint's tensors.


class Policy:
    """The weights of a model directory, trainable, and the log-probabilities they give."""

    def __init__(self, model_dir: str | Path) -> None:
        self.config = json.loads((Path(model_dir) / "config.json").read_text())
        if (got := (self.config["model_type"], self.config["vocab_size"])) != ("qwen3", PAD + 1):
            raise ValueError(f"the model must be qwen3 of {PAD + 1} tokens; got {got}; try `sapo coldstart quickstart`")
        self.weights = load_file(Path(model_dir) / "model.safetensors")
        for weight in self.weights.values():
            weight.requires_grad_()

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.config["rms_norm_eps"])

    def logprobs(self, token_ids_BT: Tensor, cache: dict[int, tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """(B, T, V) of each next token. Given a cache (keys and values by layer), the text in it goes on with these."""
        cache = {} if cache is None else cache
        size, theta = self.config["head_dim"], self.config["rope_parameters"]["rope_theta"]
        start = cache[0][0].shape[2] if cache else 0
        position_T = torch.arange(start, start + token_ids_BT.shape[1])
        angle_TD = position_T[:, None] * theta ** -(torch.arange(0, size, 2) / size).repeat(2)

        def split(x: Tensor) -> Tensor:  # (B, T, A x D) -> (B, A, T, D)
            return x.unflatten(-1, (-1, size)).transpose(1, 2)

        def rotate(x: Tensor) -> Tensor:  # coordinates d and d + D/2 are a point in the plane, turned by its position
            left, right = x.chunk(2, dim=-1)
            return x * angle_TD.cos() + torch.cat([-right, left], dim=-1) * angle_TD.sin()

        hidden_BTH = F.embedding(token_ids_BT, self.weights["model.embed_tokens.weight"])
        for i in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{i}"
            x_BTH = self.norm(f"{layer}.input_layernorm", hidden_BTH)
            query, key, value = (split(self.linear(f"{layer}.self_attn.{kind}_proj", x_BTH)) for kind in "qkv")
            query = rotate(self.norm(f"{layer}.self_attn.q_norm", query))
            key = rotate(self.norm(f"{layer}.self_attn.k_norm", key))
            if start:
                key, value = torch.cat([cache[i][0], key], dim=2), torch.cat([cache[i][1], value], dim=2)
            cache[i] = key, value
            # After the first pass tokens come one at a time, and a single query may look at every key there is.
            mixed_BATD = F.scaled_dot_product_attention(query, key, value, is_causal=not start, enable_gqa=True)
            hidden_BTH = hidden_BTH + self.linear(f"{layer}.self_attn.o_proj", mixed_BATD.transpose(1, 2).flatten(2))
            x_BTH = self.norm(f"{layer}.post_attention_layernorm", hidden_BTH)
            gated = F.silu(self.linear(f"{layer}.mlp.gate_proj", x_BTH)) * self.linear(f"{layer}.mlp.up_proj", x_BTH)
            hidden_BTH = hidden_BTH + self.linear(f"{layer}.mlp.down_proj", gated)
        return self.linear("lm_head", self.norm("model.norm", hidden_BTH)).log_softmax(-1)


# ---- The rollout: sample with the weights as they are.


@torch.no_grad()
def sample(policy: Policy, prompt_BT: Tensor, max_new_tokens: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """One response to each prompt: its tokens, padded on the right, which of them count, and log pi_old of each.

    Drawn at temperature 1 from all of the vocabulary: so the sampler's log-probabilities are those of the policy, and
    no second pass has to recompute them. The end token counts, for the policy chose it.
    """
    cache: dict[int, tuple[Tensor, Tensor]] = {}
    running_B = torch.ones(len(prompt_BT), dtype=torch.bool)
    inputs_BT, columns = prompt_BT, list[tuple[Tensor, Tensor, Tensor]]()
    while len(columns) < max_new_tokens and running_B.any():
        logp_BV = policy.logprobs(inputs_BT, cache)[:, -1]
        token_B = torch.multinomial(logp_BV.exp(), 1, generator=generator)[:, 0]
        token_B[~running_B] = PAD  # computed in vain: simpler than taking rows that have ended out of the cache
        columns.append((token_B, running_B.float(), logp_BV.gather(1, token_B[:, None])[:, 0]))
        running_B = running_B & (token_B != END)
        inputs_BT = token_B[:, None]
    return tuple(torch.stack(column, dim=1) for column in zip(*columns, strict=True))


# ---- The objective.


def group_advantages(rewards_PG: Tensor) -> Tensor:
    """(2): how much better than the other attempts at the same prompt. A zero-variance group: 0."""
    std_P1, mean_P1 = torch.std_mean(rewards_PG, dim=1, keepdim=True)
    return torch.where(std_P1 > 0, (rewards_PG - mean_P1) / std_P1, 0.0)


def sapo_loss(
    logp_BT: Tensor, logp_old_BT: Tensor, advantages_B: Tensor, mask_BT: Tensor, *, tau_pos: float, tau_neg: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(5)-(8): the loss to minimise, and of each token its ratio r and its gate weight f'(r), for the log."""
    # How much likelier a token has become since it was sampled; bounded, so that a mismatch cannot overflow exp().
    ratio_BT = (logp_BT - logp_old_BT).clamp(-20, 20).exp()
    # Tokens of bad responses fade faster (tau_neg > tau_pos): pushing one down lifts all the rest of the vocabulary.
    tau_B1 = torch.full_like(advantages_B, tau_neg).masked_fill(advantages_B > 0, tau_pos)[:, None]
    # A clip would cut the gradient off at some distance from r = 1. The sigmoid lets it fade: f' is the weight
    # 4 p (1 - p) = sech^2(tau (r - 1) / 2), which is 1 on policy whatever tau is, and falls off smoothly on both sides.
    p_BT = torch.sigmoid(tau_B1 * (ratio_BT - 1))
    value_BT = 4 / tau_B1 * p_BT * advantages_B[:, None]
    weight_BT = 4 * p_BT * (1 - p_BT)
    # Mean over sequences of their token means: a long response counts as much as a short one.
    mean_B = (value_BT * mask_BT).sum(1) / mask_BT.sum(1)
    return -mean_B.mean(), ratio_BT.detach(), weight_BT.detach()


# ---- The loop.


def train(
    model_dir: str | Path,
    steps: int,
    *,
    seed: int = 0,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    num_prompts: int = 32,
    num_samples: int = 8,
    num_minibatches: int = 4,
    learning_rate: float = 1e-4,
    warmup_steps: int = 10,
    max_new_tokens: int = 64,
    log: Callable[[str], None] = print,
) -> list[float]:
    """Train the weights of a model directory, which itself is left alone; the mean reward of each step."""
    generator = torch.Generator().manual_seed(seed)
    policy = Policy(model_dir)
    optimizer = torch.optim.AdamW(policy.weights.values(), betas=(0.9, 0.95), weight_decay=0.0)
    curve = []
    for step in range(steps):
        started = time.perf_counter()
        # A group of responses to each prompt, scored, and compared within the group.
        prompts = [prompt for prompt in draw_prompts(num_prompts, generator) for _ in range(num_samples)]
        prompt_BT = encode(prompts)
        response_BT, mask_BT, logp_old_BT = sample(policy, prompt_BT, max_new_tokens, generator)
        finished_B = (response_BT == END).any(1)
        rewards_B = torch.tensor([*map(score, prompts, map(decode, response_BT.tolist()), finished_B.tolist())])
        advantages_B = group_advantages(rewards_B.view(num_prompts, num_samples)).flatten()
        curve.append(rewards_B.mean().item())

        # Several updates from one rollout batch: at the first r = 1, at the others the policy is no longer the one that
        # sampled. Whole groups are dealt like cards: mini-batch i gets prompts i, i + num_minibatches, ...
        decay = 1.0 - (step - warmup_steps) / max(1, steps - warmup_steps)
        optimizer.param_groups[0]["lr"] = learning_rate * min((step + 1) / max(1, warmup_steps), decay, 1.0)
        row_PG = torch.arange(len(prompts)).view(num_prompts, num_samples)
        drifts, weights = [], []
        for row_B in (row_PG[i::num_minibatches].flatten() for i in range(num_minibatches)):
            prompt, response, mask, advantages = (x[row_B] for x in (prompt_BT, response_BT, mask_BT, advantages_B))
            if not advantages.any():  # all groups without spread: momentum alone must not move the weights
                continue
            # A token is predicted one place before it stands. Causal attention needs no mask: padding comes after.
            logp_BTV = policy.logprobs(torch.cat([prompt, response[:, :-1]], dim=1))[:, prompt.shape[1] - 1 :]
            logp_BT = logp_BTV.gather(2, response[:, :, None])[:, :, 0]
            temperatures = {"tau_pos": tau_pos, "tau_neg": tau_neg}
            loss, ratio_BT, weight_BT = sapo_loss(logp_BT, logp_old_BT[row_B], advantages, mask, **temperatures)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.weights.values(), 1.0, error_if_nonfinite=True)
            optimizer.step()
            taught_BT = mask.bool() & (advantages != 0)[:, None]
            drifts.append((ratio_BT - 1).abs()[taught_BT])
            weights.append(weight_BT[taught_BT])

        # EUR, the effective update ratio: the mean gate weight, the share of the update that the gate let through.
        moved = f"  |r-1| {torch.cat(drifts).mean():.4f}  EUR {torch.cat(weights).mean():.5f}" if drifts else ""
        log(f"step {step + 1:4d}  reward {curve[-1]:.3f}{moved}  {time.perf_counter() - started:.2f} s")
    return curve


def main() -> None:
    parser = argparse.ArgumentParser(description="SAPO on four-digit addition, in one file.")
    parser.add_argument("model_dir", help="what `sapo coldstart quickstart` printed")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tau-pos", type=float, default=1.0, help="temperature of the gate where A > 0")
    parser.add_argument("--tau-neg", type=float, default=1.05, help="temperature of the gate where A <= 0")
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
