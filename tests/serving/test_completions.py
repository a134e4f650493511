"""OpenAI's completions: the text of `gpt generate` for every client, in OpenAI's form."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

import gpt
from tests.support.serving import Client, serving

SAMPLING = {"temperature": 1.1, "top_k": 9, "min_p": 0.01, "repetition_penalty": 1.2}


@pytest.fixture(scope="module")
def server(trained: Path) -> Iterator[Client]:
    with serving(trained / "model.pt") as client:
        yield client


@pytest.fixture(scope="module")
def model(trained: Path) -> gpt.LoadedModel:
    return gpt.load(trained / "model.pt")


@pytest.fixture
def client(server: Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0)


def test_clients_at_the_same_time_get_the_texts_of_the_python_api(
    client: openai.OpenAI, model: gpt.LoadedModel
) -> None:
    """Both plain and streamed, with different settings, more clients than places in a batch of prefills."""

    def ask(seed: int) -> str:
        prompt, settings = ("the ", "a", "")[seed % 3], SAMPLING if seed % 2 else {}
        common: dict[str, Any] = {"model": "model", "prompt": prompt, "max_tokens": 20 + seed, "seed": seed}
        if seed % 4 < 2:
            return str(client.completions.create(**common, extra_body=settings).choices[0].text)
        stream = client.completions.create(**common, extra_body=settings, stream=True)
        return "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(12) as pool:
        texts = list(pool.map(ask, range(24)))
    for seed, text in enumerate(texts):
        prompt, settings = ("the ", "a", "")[seed % 3], SAMPLING if seed % 2 else {}
        assert prompt + text == model.generate(prompt, max_new_tokens=20 + seed, seed=seed, **settings)  # type: ignore[arg-type]


def test_several_choices_have_the_texts_of_consecutive_seeds(client: openai.OpenAI, model: gpt.LoadedModel) -> None:
    answer = client.completions.create(model="model", prompt=["the ", "a"], n=2, max_tokens=9, seed=5)
    prompts = ["the ", "the ", "a", "a"]
    expected = [model.generate(prompt, max_new_tokens=9, seed=5 + index) for index, prompt in enumerate(prompts)]
    assert [prompt + choice.text for prompt, choice in zip(prompts, answer.choices, strict=True)] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 36)


def test_a_stop_string_ends_the_text_before_it(server: Client, model: gpt.LoadedModel) -> None:
    whole = model.generate("the ", max_new_tokens=60, seed=1)[4:]
    stop = whole[20:23]
    choice = server.complete(prompt="the ", max_tokens=60, seed=1, stop=["never", stop], logprobs=0)
    assert choice["text"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]


@torch.inference_mode()
def test_logprobs_are_those_of_the_model(server: Client, model: gpt.LoadedModel) -> None:
    """Of prompt and text, whatever the sampling settings are; offsets count from the start of the text."""
    choice = server.complete(prompt="the ", max_tokens=4, seed=2, echo=True, logprobs=3, **SAMPLING)
    tokens = torch.tensor([int(token) for token in model.tokenizer.encode(choice["text"])])
    expected = model.module(tokens[None])[0].log_softmax(-1)
    found = choice["logprobs"]
    assert found["text_offset"] == list(range(8))
    assert found["token_logprobs"][0] is None
    assert found["token_logprobs"][1:] == pytest.approx([float(expected[i, tokens[i + 1]]) for i in range(7)], abs=1e-4)
    for position, top in enumerate(found["top_logprobs"][1:]):
        highest = expected[position].topk(3)
        names = [model.tokenizer.decode([token]) for token in highest.indices.tolist()]
        assert list(top) == names
        assert list(top.values()) == pytest.approx(highest.values.tolist(), abs=1e-4)


def test_a_text_can_be_scored_without_generating(server: Client, model: gpt.LoadedModel) -> None:
    choice = server.complete(prompt="the quick", max_tokens=0, echo=True, logprobs=0)
    assert choice["text"] == "the quick"
    scores = choice["logprobs"]["token_logprobs"]
    assert -sum(scores[1:]) / 8 == pytest.approx(model.loss("the quick"), abs=1e-4)


def test_a_stream_consists_of_events_with_a_token_each(server: Client) -> None:
    body: dict[str, Any] = {"prompt": "the ", "max_tokens": 5, "echo": True, "stream_options": {"include_usage": True}}
    lines = [line for line in server.post(stream=True, **body).iter_lines(decode_unicode=True) if line]
    assert lines[-1] == "data: [DONE]"
    *chunks, last = (json.loads(line.removeprefix("data: ")) for line in lines[:-1])
    assert last["usage"] == {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}
    texts = [chunk["choices"][0]["text"] for chunk in chunks]
    assert texts[0] == "the "
    assert [len(text) for text in texts[1:]] == [1] * 5
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5 + ["length"]


def test_a_random_seed_is_reported(server: Client) -> None:
    first, second = (server.post(prompt="the ", max_tokens=30).json() for _ in range(2))
    assert first["choices"] != second["choices"]
    again = server.post(prompt="the ", max_tokens=30, seed=first["seed"]).json()
    assert again["choices"] == first["choices"]


def test_of_a_prompt_longer_than_the_context_the_end_is_used(server: Client, model: gpt.LoadedModel) -> None:
    prompt = "the lazy dog " * 30
    answer = server.post(prompt=prompt, max_tokens=20, seed=1).json()
    assert prompt + answer["choices"][0]["text"] == model.generate(prompt, max_new_tokens=20, seed=1)
    assert f"the last {model.config.block_size}" in answer["warnings"][0]
    assert "warnings" not in server.post(prompt="the", seed=1).json()


def test_the_models_are_described(client: openai.OpenAI, model: gpt.LoadedModel) -> None:
    (found,) = client.models.list().data
    assert found.id == client.models.retrieve("model").id == "model"
    assert found.model_extra
    assert found.model_extra["block_size"] == model.config.block_size


def test_requests_tokens_and_latencies_are_counted(trained: Path) -> None:
    with serving(trained / "model.pt") as server:
        server.complete(prompt="the ", max_tokens=7)
        server.error(prompt="é")
        text = server.get("/metrics").text
    for line in (
        'chargpt_requests_total{path="/v1/completions",status="200"} 1.0',
        'chargpt_requests_total{path="/v1/completions",status="400"} 1.0',
        'chargpt_tokens_total{kind="generated"} 7.0',
        'chargpt_tokens_total{kind="prompt"} 4.0',
        "chargpt_time_to_first_token_seconds_count 1.0",
        'chargpt_request_seconds_count{path="/v1/completions"} 2.0',
        "chargpt_running_sequences 0.0",
        "chargpt_waiting_sequences 0.0",
    ):
        assert line in text.splitlines()
