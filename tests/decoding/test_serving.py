"""Continuous batching: an image does not depend on its company, and what goes wrong with one harms no other."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError, wait

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.host_sync import no_host_sync
from vistok import FlexARClass, FlexARText, LlamaGenClass, LlamaGenText, NARClass, TextAR
from vistok.decoding.guidance import ConstantGuidance, LinearGuidance, StepsGuidance
from vistok.decoding.ordered import generate_ordered
from vistok.decoding.sampling import SamplingParams
from vistok.decoding.serving import QueueFullError, Request, Server
from vistok.decoding.streams import ImageStreams
from vistok.models.generators.base import NextTokenGenerator
from vistok.models.generators.text_features import TextFeatures
from vistok.tokens import Tokens

SMALL = {"codebook_size": 20, "num_tokens": 9, "dim": 16, "depth": 2, "num_heads": 2, "mlp_dim": 24}
FAMILIES = ["text-ar", "llamagen-class", "llamagen-text", "flex-ar-class", "flex-ar-text"]
NUM_CONDITIONS = 5
SAMPLINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.8, top_k=7),
    SamplingParams(top_p=0.9),
    SamplingParams(top_k=1),
]
GUIDANCES = [
    ConstantGuidance(),
    ConstantGuidance(2.5),
    LinearGuidance(3.0),
    StepsGuidance(2.0, num_guided=2),
    StepsGuidance(2.0, num_guided=0),
]


def make_model(family: str) -> NextTokenGenerator:
    """One whose outputs depend on everything."""
    torch.manual_seed(0)
    makers = {
        "text-ar": lambda: TextAR(text_length=16, **SMALL),
        "llamagen-class": lambda: LlamaGenClass(num_classes=5, **SMALL),
        "llamagen-text": lambda: LlamaGenText(text_dim=12, max_text_length=6, num_kv_heads=1, **SMALL),
        "flex-ar-class": lambda: FlexARClass(num_classes=5, **SMALL),
        "flex-ar-text": lambda: FlexARText(text_dim=12, **SMALL),
    }
    model = makers[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.eval()


def text_of(seed: int) -> TextFeatures:
    """One text; longer ones have larger seeds."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, 1 + seed, 12, generator=generator)
    return TextFeatures(features, torch.ones(1, 1 + seed, dtype=torch.bool))


def condition_of(model: NextTokenGenerator, which: int):
    if isinstance(model, TextAR):
        return model.encode_text([["a dog", "猫", "red apple", "x", "blue"][which]])
    if isinstance(model, LlamaGenText | FlexARText):
        return text_of(which)
    return torch.tensor([which])


def null_of(model: NextTokenGenerator):
    return text_of(2) if isinstance(model, FlexARText) else None


def alone(model: NextTokenGenerator, request: Request) -> Tokens:
    """What the plain loop draws."""
    return generate_ordered(
        model,
        request.condition,
        streams=ImageStreams.from_seeds([request.seed]),
        num_tokens=request.num_tokens,
        sampling=request.sampling,
        guidance=request.guidance,
        null_condition=request.null_condition,
    )


def assert_same(tokens: Tokens, expected: Tokens) -> None:
    assert torch.equal(tokens.data, expected.data) and torch.equal(tokens.token_counts, expected.token_counts)
    assert (tokens.codebook_size, tokens.layout) == (expected.codebook_size, expected.layout)


@pytest.fixture(scope="module")
def model() -> NextTokenGenerator:
    return make_model("llamagen-class")


@pytest.fixture(scope="module", params=FAMILIES)
def any_model(request) -> NextTokenGenerator:
    return make_model(request.param)


def plain_request(label: int = 3, **options) -> Request:
    return Request(torch.tensor([label]), **options)


ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 12),  # after which step it arrives
        st.integers(0, NUM_CONDITIONS - 1),
        st.integers(0, 2**31),
        st.integers(1, SMALL["num_tokens"]),
        st.sampled_from(SAMPLINGS),
        st.sampled_from(GUIDANCES),
        st.one_of(st.none(), st.integers(0, 8)),  # after how many steps it is cancelled
    ),
    min_size=1,
    max_size=8,
)


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(arrivals=ARRIVALS, num_slots=st.integers(2, 5))
def test_an_image_does_not_depend_on_its_company(any_model, arrivals, num_slots: int) -> None:
    server, tickets, cancellations = Server(any_model, num_slots=num_slots), [], {}
    step = 0
    while step <= 12 or server.num_waiting or server.num_running:
        for at, which, seed, num_tokens, sampling, guidance, patience in arrivals:
            if at == step:
                condition = condition_of(any_model, which)
                request = Request(condition, seed, None, num_tokens, sampling, guidance, null_of(any_model))
                tickets.append(server.submit(request))
                if patience is not None:
                    cancellations.setdefault(step + patience, []).append(tickets[-1])
        for ticket in cancellations.get(step, []):
            ticket.cancel()
        server.step()
        step += 1
    assert len(tickets) == len(arrivals) and all(ticket.done() for ticket in tickets)
    for ticket in tickets:
        if not ticket.cancelled():
            assert_same(ticket.result(), alone(any_model, ticket.request))


def test_requests_run_at_different_steps(model) -> None:
    """The schedules above would pass with one request at a time as well."""
    server = Server(model, num_slots=3)
    first = server.submit(plain_request(seed=1))
    for _ in range(3):
        assert server.step() == []
    second = server.submit(plain_request(1, seed=2, guidance=ConstantGuidance(2.0)))
    third = server.submit(plain_request(2, seed=3, num_tokens=2))
    assert server.step() == [] and (server.num_running, server.num_waiting) == (2, 1)
    assert list(server.run()) == [first, third, second]
    assert (server.num_running, server.num_waiting) == (0, 0)
    for ticket in (first, second, third):
        assert_same(ticket.result(), alone(model, ticket.request))


def test_a_request_takes_as_many_steps_as_it_has_tokens_but_one(model) -> None:
    server = Server(model, num_slots=2)
    ticket = server.submit(plain_request(num_tokens=1))
    assert server.step() == [ticket]
    ticket = server.submit(plain_request(num_tokens=9))
    assert [server.step() for _ in range(8)] == [[]] * 7 + [[ticket]]


def test_slots_of_the_unconditional_branch_are_free_once_nothing_is_guided(model) -> None:
    server = Server(model, num_slots=3)
    server.submit(plain_request(guidance=StepsGuidance(2.0, num_guided=3)))
    server.submit(plain_request(guidance=ConstantGuidance(2.0)))
    running = []
    for _ in range(3):
        server.step()
        running.append(server.num_running)
    assert running == [1, 1, 2]  # two tokens by the first step, three by the second


def test_lower_priorities_go_first_and_equals_in_turn(model) -> None:
    server = Server(model, num_slots=1)
    tickets = [server.submit(plain_request(priority=priority)) for priority in (5, 0, 5, -1)]
    assert [ticket.request_id for ticket in server.run()] == [3, 1, 0, 2]
    assert [ticket.request_id for ticket in tickets] == [0, 1, 2, 3]


def test_nothing_overtakes_a_request_that_needs_more_slots(model) -> None:
    server = Server(model, num_slots=2)
    short = server.submit(plain_request(num_tokens=4))
    guided = server.submit(plain_request(guidance=ConstantGuidance(2.0), num_tokens=2))
    last = server.submit(plain_request(num_tokens=2))
    assert list(server.run()) == [short, guided, last]


def test_a_stream_can_be_given(model) -> None:
    streams = ImageStreams.from_seeds([5])
    streams.uniform(3)
    server = Server(model, num_slots=1)
    ticket = server.submit(plain_request(stream=streams))
    _ = list(server.run())
    expected = ImageStreams.from_seeds([5])
    expected.uniform(3)
    assert_same(ticket.result(), generate_ordered(model, torch.tensor([3]), streams=expected))


def test_fewer_tokens_than_the_model_has(model) -> None:
    server = Server(model, num_slots=2, num_tokens=5)
    ticket = server.submit(plain_request())
    _ = list(server.run())
    assert_same(ticket.result(), alone(model, plain_request(num_tokens=5)))
    with pytest.raises(ValueError, match=r"num_tokens must be in 1\.\.5, got 6"):
        server.submit(plain_request(num_tokens=6))


def test_a_step_reads_no_more_rows_than_it_takes_to_reach_all_requests(model) -> None:
    num_read = []

    def feed(indices, cache):
        num_read.append(len(indices))
        return model.feed(indices, cache)

    server = Server(model, num_slots=6, feed=feed)
    requests = [
        plain_request(seed=seed, num_tokens=num_tokens) for seed, num_tokens in enumerate([9, 7, 5, 5, 3])
    ]
    tickets = [server.submit(request) for request in requests]
    _ = list(server.run())
    assert num_read == [6, 6, 4, 4, 2, 2, 1, 1]  # 5 requests, of 6 rows; 4, 2 and 1
    for ticket in tickets:
        assert_same(ticket.result(), alone(model, ticket.request))


@pytest.mark.parametrize("guidance", [ConstantGuidance(), ConstantGuidance(2.0)])
def test_a_step_in_which_nobody_joins_or_leaves_does_not_wait_for_the_device(model, guidance) -> None:
    """But for what the model does in it, for which a table stands here."""
    logits = torch.randn(20, 20, generator=torch.Generator().manual_seed(0))
    server = Server(model, num_slots=4, feed=lambda indices, cache: (logits[indices],))
    for sampling in SAMPLINGS[1:3]:
        server.submit(plain_request(sampling=sampling, guidance=guidance))
    server.step()
    server.step()
    with no_host_sync():
        assert server.step() == []


def test_a_cache_takes_no_more_than_it_holds(model) -> None:
    cache, source = model.new_cache(2, 2), model.new_cache(1)
    model.prefill(torch.tensor([1]), source)
    model.step(torch.tensor([[1, 2, 3]]), source)
    cache.split_rows(can_grow=False)
    with pytest.raises(ValueError, match="the cache holds 3 positions, 4 were to be put there"):
        cache.put_rows(torch.tensor([0]), source, torch.tensor([0]))


# What goes wrong.


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("guidance", [ConstantGuidance(), ConstantGuidance(2.0)])
def test_broken_logits_fail_one_request_and_name_the_token(model, value, guidance) -> None:
    steps = []

    def feed(indices, cache):
        (logits,) = model.feed(indices, cache)
        steps.append(None)
        if len(steps) == 4:
            logits[1, 0, 7] = value
        return (logits,)

    server = Server(model, num_slots=6, feed=feed)
    tickets = [server.submit(plain_request(label, seed=label, guidance=guidance)) for label in range(3)]
    assert list(server.run()) == tickets
    with pytest.raises(FloatingPointError, match="request 1: the logits of token 4 of 9"):
        tickets[1].result()
    for ticket in (tickets[0], tickets[2]):
        assert_same(ticket.result(), alone(model, ticket.request))


@pytest.mark.parametrize("family", ["llamagen-text", "flex-ar-text"])
def test_a_slot_is_as_good_as_new_after_a_broken_image(family: str) -> None:
    """NaN stays in the slot's storage, behind what the next request has."""
    model = make_model(family)
    server = Server(model, num_slots=1)
    good, bad = text_of(1), text_of(4)
    bad.features.fill_(float("nan"))
    tickets = [server.submit(Request(text)) for text in (bad, good, bad, good)]
    assert list(server.run()) == tickets
    for ticket in tickets[::2]:
        with pytest.raises(FloatingPointError, match="the logits of token 0 of 9"):
            ticket.result()
    for ticket in tickets[1::2]:
        assert_same(ticket.result(), alone(model, ticket.request))


def test_a_condition_that_cannot_be_read_fails_alone(model) -> None:
    server = Server(model, num_slots=4)
    tickets = [server.submit(plain_request(label)) for label in (1, 99, 2)]
    assert list(server.run()) == [tickets[1], tickets[0], tickets[2]]
    with pytest.raises(ValueError, match=r"class labels must be in 0\.\.4"):
        tickets[1].result()
    for ticket in tickets[::2]:
        assert_same(ticket.result(), alone(model, ticket.request))


@pytest.mark.parametrize(
    ("family", "condition", "message"),
    [
        ("llamagen-class", text_of(1), r"a tensor \[1\] of torch.int64; got TextFeatures \[1, 2, 12\]"),
        ("llamagen-class", torch.tensor([1, 2]), r"got a tensor \[2\] of torch.int64"),
        ("llamagen-class", torch.tensor(1), r"got a tensor \[\] of torch.int64"),
        ("llamagen-class", torch.tensor([1.0]), "got a tensor .* of torch.float32"),
        ("text-ar", torch.tensor([1]), r"must be a tensor \[1, 16\] of torch.int64; got a tensor \[1\]"),
        ("llamagen-text", torch.tensor([1]), "must be the TextFeatures of one text, 12 wide; got a tensor"),
        ("flex-ar-text", "red apple", "must be the TextFeatures of one text, 12 wide; got a str"),
        ("flex-ar-text", TextFeatures(torch.zeros(1, 2, 8), torch.ones(1, 2).bool()), r"got .* \[1, 2, 8\]"),
    ],
)
def test_conditions_of_another_kind_are_refused(family: str, condition, message: str) -> None:
    server = Server(make_model(family), num_slots=2)
    with pytest.raises(ValueError, match=message):
        server.submit(Request(condition))
    assert server.num_waiting == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tokens": 0}, r"num_tokens must be in 1\.\.9, got 0"),
        ({"num_tokens": 10}, r"num_tokens must be in 1\.\.9, got 10"),
        ({"sampling": SamplingParams(top_k=21)}, "top_k 21 is larger than the vocabulary of 20"),
        ({"null_condition": torch.tensor([1, 2])}, "null_condition of a request"),
        ({"stream": ImageStreams.from_seeds([1, 2])}, "must have one row, this one has 2"),
        ({"guidance": ConstantGuidance(2.0)}, "takes 2 slots, this server has 1: raise num_slots"),
    ],
)
def test_requests_that_are_not_possible_are_refused(model, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Server(model, num_slots=1).submit(plain_request(**options))


def test_guidance_needs_a_null_condition_where_the_model_has_none() -> None:
    server = Server(make_model("flex-ar-text"), num_slots=2)
    with pytest.raises(ValueError, match="pass null_condition"):
        server.submit(Request(text_of(1), guidance=ConstantGuidance(2.0)))


def test_the_queue_has_a_limit(model) -> None:
    server = Server(model, num_slots=1, max_waiting=2)
    tickets = [server.submit(plain_request(num_tokens=2)) for _ in range(2)]
    with pytest.raises(
        QueueFullError, match="2 requests wait already: try again later, or raise max_waiting"
    ):
        server.submit(plain_request())
    tickets[0].cancel()
    tickets.append(server.submit(plain_request(num_tokens=2)))
    assert list(server.run()) == tickets[1:]
    assert wait(tickets, timeout=60).not_done == set()


def test_cancelled_requests_free_their_slots_and_give_nothing(model) -> None:
    server = Server(model, num_slots=1)
    running, waiting, last = (server.submit(plain_request(seed=seed)) for seed in range(3))
    server.step()
    assert running.cancel() and waiting.cancel()
    assert list(server.run()) == [last]
    with pytest.raises(CancelledError):
        running.result()
    assert wait([running, waiting, last], timeout=60).not_done == set()
    assert not last.cancel()
    assert_same(last.result(), alone(model, last.request))


def test_what_the_model_raises_fails_what_runs_and_nothing_else(model) -> None:
    errors = [ZeroDivisionError("a broken step")]

    def feed(indices, cache):
        if cache.lengths[0] > 1 and errors:
            raise errors.pop()
        return model.feed(indices, cache)

    server = Server(model, num_slots=1, feed=feed)
    running, waiting = (server.submit(plain_request(seed=seed)) for seed in range(2))
    server.step()
    with pytest.raises(ZeroDivisionError):
        server.step()
    with pytest.raises(ZeroDivisionError):
        running.result()
    assert list(server.run()) == [waiting]
    assert_same(waiting.result(), alone(model, waiting.request))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 0}, "num_slots must be at least 1, got 0"),
        ({"num_tokens": 10}, r"num_tokens must be in 1\.\.9, got 10"),
        ({"max_waiting": 0}, "max_waiting must be at least 1"),
    ],
)
def test_servers_that_are_not_possible(model, options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Server(model, **options)


def test_generators_of_another_kind_are_refused() -> None:
    model = NARClass(num_classes=5, **SMALL)
    with pytest.raises(ValueError, match="NARClass does not decide one token after the other"):
        Server(model)


def test_requests_from_other_threads(model) -> None:
    server, stop = Server(model, num_slots=3), threading.Event()
    stepper = threading.Thread(target=server.serve, args=(stop,))
    stepper.start()
    results: dict[int, Tokens] = {}

    def ask(label: int) -> None:
        for seed in range(4):
            request = plain_request(label, seed=seed, guidance=GUIDANCES[label % 2])
            results[4 * label + seed] = server.submit(request).result(timeout=60)

    askers = [threading.Thread(target=ask, args=(label,)) for label in range(5)]
    for thread in askers:
        thread.start()
    for thread in askers:
        thread.join()
    stop.set()
    stepper.join(timeout=60)
    assert not stepper.is_alive() and len(results) == 20
    for number, tokens in results.items():
        label, seed = divmod(number, 4)
        request = plain_request(label, seed=seed, guidance=GUIDANCES[label % 2])
        assert_same(tokens, alone(model, request))


def test_serving_goes_on_after_an_error(model, monkeypatch) -> None:
    server, stop = Server(model, num_slots=1), threading.Event()
    prefill, calls = type(model).prefill, []

    def fails_once(self, condition, cache):
        calls.append(None)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return prefill(self, condition, cache)

    monkeypatch.setattr(type(model), "prefill", fails_once)
    stepper = threading.Thread(target=server.serve, args=(stop,))
    tickets = [server.submit(plain_request(seed=seed)) for seed in range(2)]
    stepper.start()
    with pytest.raises(RuntimeError, match="out of memory"):
        tickets[0].result(timeout=60)
    result = tickets[1].result(timeout=60)
    stop.set()
    stepper.join(timeout=60)
    assert_same(result, alone(model, tickets[1].request))
