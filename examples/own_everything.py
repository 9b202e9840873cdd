"""Train your own model on your own rows, with your own rewards and a callback that stops the run."""

import sapo
from sapo.model.tiny import character_tokenizer, tiny_model

tokenizer = character_tokenizer("0123456789+=")
ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
model = tiny_model("qwen3", len(tokenizer), seed=0, hidden_size=32, layers=2, **ends)  # any model of transformers


async def share(completion, wanted):  # of one completion; a column of the rows comes by its name
    return completion.count(wanted) / 8


# ---- ten lines
rows = [{"prompt": f"{i}+{i}=", "wanted": "7"} for i in range(40)]
brevity = lambda completions, **columns: [1 - len(text) / 12 for text in completions]  # noqa: E731 (of a batch)
good_enough = lambda step, metrics: metrics["reward/mean"] > 0.3  # noqa: E731 (True stops the run)
run = sapo.train(
    model=(model, tokenizer), rows=rows, tasks={"score_truncated": True},
    rewards=[(share, 0.9), (brevity, 0.1)], callbacks=good_enough,
    steps=30, learning_rate=3e-3, max_new_tokens=8, prompts_per_step=4, eval__problems=4, run_dir="runs/own",
)  # fmt: skip
print(run.metrics()[["step", "reward/mean", "update/entropy"]].tail())
print(run.samples()[["prompt", "text", "reward"]].head())
