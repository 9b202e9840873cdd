"""Steps that never ask the host, against decoding that looks at every token; and what a CUDA graph may rely on.

There is no graph without a GPU. In its place stands a trace: the operations of one step, taken down while every number
is unknown, so that one which the host would have to read is an error, and then repeated on the same tensors.
"""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from sapo.data import Prompt
from sapo.errors import ModelError
from sapo.rollout.engine import Request
from sapo.rollout.local import device_steps
from sapo.rollout.local.device_steps import DeviceSteps, StepShape, size_for
from sapo.rollout.local.engine import LocalEngine
from sapo.rollout.local.sampling import sample_tokens, truncate
from sapo.rollout.params import SamplingParams
from support.engine_cases import flat, params, ragged_requests, random_ids, request
from support.tracing import Tracing, assert_all_same, trace


@pytest.mark.parametrize("max_rows", [1, 5, 7, 9, 256])
def test_device_steps_draw_what_decoding_step_by_step_draws(policy, max_rows):
    # Groups of 1 to 5 rows end at different tokens; with few rows the others wait for their places.
    requests = ragged_requests()
    device = LocalEngine(policy, max_rows, "eager").generate(requests, params())
    assert_all_same(device, LocalEngine(policy, max_rows, False).generate(requests, params()))
    assert len({len(c) for c in flat(device)}) > 4


@pytest.mark.parametrize("look_every", [1, 3, 100])
def test_it_changes_nothing_how_often_the_host_looks(policies, monkeypatch, look_every):
    policy, requests = policies("qwen3"), ragged_requests()
    expected = LocalEngine(policy, 9, False).generate(requests, params())
    monkeypatch.setattr(device_steps, "LOOK_EVERY", look_every)
    assert_all_same(LocalEngine(policy, 9, "eager").generate(requests, params()), expected)


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, {"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 3}, {"min_p": 0.2}, {"max_new_tokens": 1}],
    ids=str,
)
def test_every_way_of_drawing_is_the_same_in_device_steps(policies, options):
    policy, requests = policies("llama"), ragged_requests()
    ours = LocalEngine(policy, 9, "eager").generate(requests, params(**options))
    assert_all_same(ours, LocalEngine(policy, 9, False).generate(requests, params(**options)))


def test_rows_that_linger_keep_their_prompts_in_device_steps(policies):
    policy, settings = policies("qwen3"), params(stop_token_ids=frozenset())
    requests = [Request(Prompt(i, "t", "", random_ids(5, seed=i)), 4, limits=(16, 1, 2, 9)) for i in range(12)]
    expected = LocalEngine(policy, 9, False).generate(requests, settings)
    assert_all_same(LocalEngine(policy, 9, "eager").generate(requests, settings), expected)
    assert [[len(c) for c in group] for group in expected] == [[16, 1, 2, 9]] * 12


@pytest.mark.parametrize("preamble", [0, 20])
def test_prompts_of_several_pools_and_a_preamble_serve_device_steps(policies, preamble):
    policy = policies("mistral")  # whose window of 6 is shorter than most prompts
    shared = random_ids(preamble, 7)
    lengths = (90, 3, 40, 1, 85, 7)  # two pools: see test_cache.py
    requests = [request((*shared, i, *random_ids(n, i)), 2, prompt_id=i) for i, n in enumerate(lengths)]
    ours = LocalEngine(policy, 4, "eager").generate(requests, params())
    assert_all_same(ours, LocalEngine(policy, 4, False).generate(requests, params()))


def test_a_stop_string_of_several_tokens_ends_a_row_that_waited_for_the_host(policies, monkeypatch):
    policy, settings = policies("qwen3"), params(max_new_tokens=40, stop_token_ids=frozenset())
    free = flat(LocalEngine(policy, 256, False).generate(ragged_requests(), settings))
    # Two characters that some completion has side by side in its middle: no token holds both.
    string = max(free, key=lambda c: len(set(c.token_ids))).text[10:12]
    assert len(string) == 2
    requests = [replace(r, prompt=replace(r.prompt, stop=(string,))) for r in ragged_requests()]
    looks = []
    run = DeviceSteps.run
    monkeypatch.setattr(DeviceSteps, "run", lambda self, *a: (looks.append(self), run(self, *a))[1])
    ours = LocalEngine(policy, 9, "eager").generate(requests, settings)
    assert looks
    assert looks[0].rules.may_stop
    assert_all_same(ours, LocalEngine(policy, 9, False).generate(requests, settings))
    reasons = {c.finish_reason for c in flat(ours)}
    assert reasons == {"stop", "length"}


@pytest.mark.parametrize("architecture", ["qwen3", "qwen3_moe", "llama", "mistral"])
@pytest.mark.parametrize("max_rows", [5, 256])
def test_a_step_repeated_from_a_trace_draws_the_same(policies, monkeypatch, architecture, max_rows):
    tracing = Tracing(monkeypatch)
    policy, requests = policies(architecture), ragged_requests()
    ours = LocalEngine(policy, max_rows, "eager").generate(requests, params())
    assert tracing.captured > 1  # several shapes
    assert tracing.repeated > tracing.captured
    assert_all_same(ours, LocalEngine(policy, max_rows, False).generate(requests, params()))


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"top_p": 0.8, "temperature": 0.7}, {"top_k": 3, "min_p": 0.1}]
)
def test_a_trace_draws_the_same_from_a_part_of_the_distribution(policies, monkeypatch, options):
    tracing = Tracing(monkeypatch)
    policy, requests = policies("qwen3"), ragged_requests()
    ours = LocalEngine(policy, 9, "eager").generate(requests, params(**options))
    assert tracing.repeated
    assert_all_same(ours, LocalEngine(policy, 9, False).generate(requests, params(**options)))


def test_a_trace_follows_stop_strings(policies, monkeypatch):
    tracing = Tracing(monkeypatch)
    policy, settings = policies("qwen3"), params(max_new_tokens=20, stop_token_ids=frozenset())
    requests = [replace(r, prompt=replace(r.prompt, stop=("12", "+3", "="))) for r in ragged_requests()]
    ours = LocalEngine(policy, 9, "eager").generate(requests, settings)
    assert tracing.repeated
    assert {c.finish_reason for c in flat(ours)} == {"stop", "length"}
    assert_all_same(ours, LocalEngine(policy, 9, False).generate(requests, settings))


def test_every_step_of_a_shape_does_the_same_operations(policies, monkeypatch):
    # What is captured once is repeated for all: a length of the moment among the arguments would be another program.
    monkeypatch.setenv("SAPO_NATIVE", "0")
    programs = {}
    take = DeviceSteps._take

    def write_down(self, shape):
        written = programs.setdefault(shape, [])
        if shape in self.met and len(written) < 3:
            written.append(trace(lambda: self.step(shape)).code)
        take(self, shape)

    monkeypatch.setattr(DeviceSteps, "_take", write_down)
    LocalEngine(policies("qwen3"), 5, "eager").generate(ragged_requests()[:4], params(max_new_tokens=10))
    assert max(map(len, programs.values())) == 3
    for written in programs.values():
        assert len(set(written)) <= 1


@pytest.mark.parametrize(
    "ask",
    [
        lambda numbers: numbers.sum().item(),
        lambda numbers: numbers.nonzero(),
        lambda numbers: (numbers + 1).tolist(),
        lambda numbers: (numbers + 1).numpy(),
        lambda numbers: bool(numbers[0]),
        lambda numbers: numbers[numbers > 0],
        lambda numbers: numbers + torch.tensor([1, 2, 3]),
        lambda numbers: numbers.to("meta"),
    ],
)
def test_what_asks_the_host_cannot_be_traced(ask):
    # The measure itself: numbers, shapes and lists that depend on numbers, and copies, are all found.
    numbers = torch.tensor([1, 0, 2])
    trace(lambda: numbers[:2].add_(1))
    assert numbers.tolist() == [1, 0, 2]  # taken down and not done
    with pytest.raises(Exception, match=r"_local_scalar_dense|nonzero|data pointer|numpy|through the host"):
        trace(lambda: ask(numbers))


def test_experts_that_all_see_every_row_give_what_the_chosen_give(policies):
    from sapo.rollout.local.decoder import FastDecoder

    generator = torch.Generator().manual_seed(0)
    for layer in FastDecoder(policies("qwen3_moe"), 1).layers:
        hidden_NH = torch.randn(9, 32, generator=generator)
        chosen, of_all = layer.mlp(hidden_NH.clone(), False), layer.mlp(hidden_NH.clone(), True)
        torch.testing.assert_close(of_all, chosen, rtol=1e-5, atol=1e-5 * chosen.abs().max().item())


@pytest.mark.parametrize("top_p", [0.3, 0.95, 0.999])
def test_top_p_without_looking_keeps_the_same_tokens_of_a_large_vocabulary(top_p):
    generator = torch.Generator().manual_seed(3)
    # A peaked row, whose nucleus is among the first tokens looked at, and nearly flat ones, which are sorted whole.
    logits_RV = torch.randn(6, 3000, generator=generator) * torch.tensor([8.0, 4.0, 2.0, 1.0, 0.1, 0.0])[:, None]
    uniform_R = torch.rand(6, generator=generator, dtype=torch.float64)
    settings = SamplingParams(max_new_tokens=1, top_p=top_p)
    assert torch.equal(truncate(logits_RV.clone(), settings, look=False), truncate(logits_RV.clone(), settings))
    tokens_R, logprobs_R = sample_tokens(logits_RV.clone(), uniform_R, settings, look=False)
    looked_R, looked_logprobs_R = sample_tokens(logits_RV.clone(), uniform_R, settings)
    assert torch.equal(tokens_R, looked_R)
    # Where one may look, a CPU with AVX-512 draws in compiled code, whose exp() and sums round otherwise than torch's.
    torch.testing.assert_close(logprobs_R, looked_logprobs_R, rtol=1e-6, atol=1e-6)
    trace(lambda: sample_tokens(logits_RV.clone(), uniform_R, settings, look=False))


def test_sizes_hold_their_rows_and_at_most_a_quarter_more():
    sizes = {size_for(n, 4096) for n in range(1, 4097)}
    for count in range(1, 4097):
        assert count <= size_for(count, 4096) <= max(count, 1.25 * count)
    # By hand: 8 sizes up to 8, then four to each doubling.
    assert len(sizes) == 8 + 4 * 9
    assert size_for(33, 36) == 36


def test_graphs_asked_for_where_there_are_none_are_refused_in_one_line(policies, new_policy):
    with pytest.raises(
        ModelError, match=r"rollout.cuda_graphs=true cannot .* on the device cpu.*; leave it auto"
    ) as caught:
        LocalEngine(policies("qwen3"), cuda_graphs=True).generate(ragged_requests(), params())
    assert "\n" not in str(caught.value)


def test_a_model_without_the_fast_forward_is_decoded_step_by_step(policies, new_policy, monkeypatch):
    policy = new_policy("llama")
    policy.model.model.norm.register_forward_hook(lambda *_: None)
    assert not device_steps.uses_device_steps(policy, "eager", recording=False)
    monkeypatch.setattr(DeviceSteps, "run", lambda *_: pytest.fail("it has a hook that would be passed by"))
    assert_all_same(
        LocalEngine(policy, 256, "eager").generate(ragged_requests(), params()),
        LocalEngine(policies("llama"), 256, False).generate(ragged_requests(), params()),
    )


def test_a_capture_that_fails_names_the_settings_that_do_without(monkeypatch):
    class Refusing:
        def __enter__(self):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

        def __exit__(self, *_):
            return False

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: Refusing())
    capture = device_steps.CudaCapture(torch.device("cuda"))
    with pytest.raises(ModelError, match=r"not permitted.*rollout.cuda_graphs=false.*SAPO_CUDA_GRAPHS=0") as caught:
        capture(lambda: None)
    assert "\n" not in str(caught.value)


def test_a_shape_is_captured_when_it_is_met_again(policies, monkeypatch):
    tracing = Tracing(monkeypatch)
    seen = []
    take = DeviceSteps._take
    monkeypatch.setattr(DeviceSteps, "_take", lambda self, shape: (seen.append(shape), take(self, shape))[1])
    LocalEngine(policies("llama"), 9, "eager").generate(ragged_requests(), params())
    counts = {shape: seen.count(shape) for shape in seen}
    assert all(isinstance(shape, StepShape) for shape in counts)
    assert tracing.captured == sum(n > 1 for n in counts.values())
    assert tracing.repeated == sum(n - 1 for n in counts.values())


def watch_steps(monkeypatch, watch):
    """Have `watch` called before every step with the steps' owner and the shape."""
    step = DeviceSteps.step
    monkeypatch.setattr(DeviceSteps, "step", lambda self, shape: (watch(self, shape), step(self, shape))[1])
    return step


def test_no_more_steps_are_taken_than_the_longest_row_has_left(policies, monkeypatch):
    taken = []
    watch_steps(monkeypatch, lambda _, shape: taken.append(shape))
    requests = [replace(r, limits=(4,) * r.samples) for r in ragged_requests()]
    LocalEngine(policies("llama"), 256, "eager").generate(requests, params(stop_token_ids=frozenset()))
    assert len(taken) == 3  # the first of four tokens comes of the prefill


@pytest.mark.parametrize("samples", [1, 8])
def test_a_step_multiplies_a_prompts_keys_once_for_its_group(policies, monkeypatch, samples):
    monkeypatch.setenv("SAPO_NATIVE", "0")
    programs = {}

    def write_down(steps, shape):
        if shape in steps.met and shape not in programs:
            programs[shape] = trace(lambda: step(steps, shape))

    step = watch_steps(monkeypatch, write_down)
    asked = request(random_ids(77, 0), samples)
    LocalEngine(policies("llama"), 256, "eager").generate([asked], params(stop_token_ids=frozenset()))
    ((shape, program),) = programs.items()
    assert (shape.rows, shape.slots) == (samples, (1,))
    shapes = [[a.meta["val"].shape for a in node.args] for node in program.graph.nodes if "bmm" in str(node.target)]
    of_prompts = [right for _, right in shapes if 77 in right]
    # By hand: keys and values of two layers, each of one slot with two key-value heads of 8 dimensions.
    assert of_prompts == [(2, 8, 77), (2, 77, 8)] * 2
