"""`sirius serve` over HTTP: the real client of OpenAI and curl, on loopback."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from sirius_runtime.errors import ConfigError
from sirius_runtime.model import SiriusModel
from sirius_runtime.serve.server import Server, make_served, serve
from tests.support.browser import tab
from tests.support.http import ask
from tests.support.models import TinyModels
from tests.support.serving import CAPACITY, chatty, metrics, served

KEY = "secret"


@pytest.fixture(scope="module")
def model(tiny: TinyModels) -> SiriusModel:
    return chatty(tiny("llama", "griffin"))


@pytest.fixture(scope="module")
def server(model: SiriusModel) -> Iterator[Server]:
    with served(model, api_key=KEY) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


PROMPT = "w10 w11 w12"


def test_a_completion_is_generate_s(client: openai.OpenAI, model: SiriusModel) -> None:
    alone = model.generate(PROMPT, mode="exact", max_new_tokens=20, fallback=False)
    assert alone.texts is not None
    told = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=20, temperature=0, extra_body={"mode": "exact"}
    )
    assert told.choices[0].text == alone.texts[0]
    assert told.choices[0].finish_reason == {"eos": "stop"}.get(
        alone.finish_reasons[0], alone.finish_reasons[0]
    )
    assert told.usage is not None
    assert told.usage.prompt_tokens == 3
    assert told.usage.completion_tokens == len(alone.tokens[0])
    extra: Any = told.usage
    drafted = sum(period.size - 1 for period in alone.steps[0].periods)
    accepted = sum(period.advance - 1 for period in alone.steps[0].periods)
    assert (extra.drafted_tokens, extra.accepted_tokens) == (drafted, accepted)


def test_a_chat_is_rendered_and_streamed(client: openai.OpenAI, model: SiriusModel) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    options = {"mode": "sample", "seed": 3, "temperature": 0.9}
    alone = model.generate(
        messages=messages, max_new_tokens=24, seed=3, temperature=0.9, mode="sample", fallback=False
    )
    assert alone.texts is not None
    asked: Any = {"model": "tiny", "messages": messages, "max_tokens": 24}
    asked |= {"seed": 3, "temperature": 0.9}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == alone.texts[0]
    assert whole.choices[0].message.role == "assistant"
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == alone.texts[0]
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] is not None
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(alone.tokens[0])
    assert len({c.id for c in chunks}) == 1
    assert options["seed"] == 3


def test_n_choices_have_seeds_of_their_own(client: openai.OpenAI, model: SiriusModel) -> None:
    alone = model.generate(
        [PROMPT] * 3, max_new_tokens=12, mode="sample", seed=5, temperature=1.0, fallback=False
    )
    told = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=12, n=3, seed=5, temperature=1.0
    )
    assert tuple(choice.text for choice in told.choices) == alone.texts
    assert len(set(alone.texts or ())) > 1


def test_several_prompts(client: openai.OpenAI, model: SiriusModel) -> None:
    prompts = [[10, 11, 12], [20, 21]]
    alone = model.generate(input_ids=prompts, max_new_tokens=8, mode="full")
    told = client.completions.create(
        model="tiny", prompt=prompts, max_tokens=8, extra_body={"mode": "full"}
    )
    assert tuple(choice.text for choice in told.choices) == alone.texts
    assert [choice.index for choice in told.choices] == [0, 1]


def test_stop_strings_end_the_text(client: openai.OpenAI, model: SiriusModel) -> None:
    alone = model.generate(PROMPT, mode="exact", max_new_tokens=20, fallback=False)
    assert alone.texts is not None
    stop = alone.texts[0].split()[4]
    for stream in (False, True):
        told: Any = client.completions.create(
            model="tiny",
            prompt=PROMPT,
            max_tokens=20,
            stop=[stop],
            stream=stream,  # type: ignore[arg-type]
            extra_body={"mode": "exact"},
        )
        chunks = list(told) if stream else [told]
        text = "".join(chunk.choices[0].text for chunk in chunks)
        assert text == alone.texts[0][: alone.texts[0].index(stop)]
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_logprobs(client: openai.OpenAI, model: SiriusModel) -> None:
    alone = model.generate(PROMPT, mode="exact", max_new_tokens=6, logprobs=2, fallback=False)
    assert alone.logprobs is not None
    told: Any = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=6, logprobs=2, extra_body={"mode": "exact"}
    )
    ours = told.choices[0].logprobs
    assert ours.token_logprobs == pytest.approx([t.logprob for t in alone.logprobs[0]], abs=1e-3)
    assert all(len(top) == 2 for top in ours.top_logprobs)
    chat: Any = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": PROMPT}],
        max_tokens=6,
        logprobs=True,
        top_logprobs=3,
    )
    content = chat.choices[0].logprobs.content
    assert len(content) == chat.usage.completion_tokens
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.bytes == list(entry.token.encode())
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


GOOD = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4}
WRONG: dict[str, tuple[Any, int, str]] = {
    "not JSON": (b"{", 400, "not JSON"),
    "no object": (b"[1]", 400, "the body"),
    "deep": (b"[" * 100_000, 400, ""),
    "no prompt": ({"model": "tiny"}, 400, "prompt"),
    "a wrong type": (GOOD | {"max_tokens": "4"}, 400, "max_tokens"),
    "a wrong type inside": (GOOD | {"prompt": [1, "a"]}, 400, "prompt"),
    "an unknown field": (GOOD | {"frobnicate": 1}, 400, "frobnicate"),
    "a field that is not served": (GOOD | {"logit_bias": {"5": 1}}, 400, "logit_bias"),
    "a wrong model": (GOOD | {"model": "gpt-4"}, 404, "gpt-4"),
    "too long a prompt": (GOOD | {"prompt": "w7 " * 200}, 400, "context"),
    "too long an answer": (GOOD | {"max_tokens": 95}, 400, "context"),
    "no tokens": (GOOD | {"max_tokens": 0}, 400, "max_tokens"),
    "an empty prompt": (GOOD | {"prompt": ""}, 400, "empty"),
    "a token that is none": (GOOD | {"prompt": [[5000]]}, 400, "vocabulary"),
    "a wrong mode": (GOOD | {"mode": "fast"}, 400, "mode"),
    "a greedy mode that draws": (GOOD | {"mode": "exact", "temperature": 1.0}, 400, "greedy"),
    "sampling at 0": (GOOD | {"mode": "sample", "temperature": 0}, 400, "temperature"),
    "a negative threshold": (GOOD | {"threshold": -1.0}, 400, "threshold"),
    "too long a period": (GOOD | {"period": 17}, 400, "period"),
    "infinite": (b'{"model": "tiny", "prompt": "w7", "temperature": Infinity}', 400, "temperature"),
    "a lone surrogate": (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "prompt"),
    "too many answers": (GOOD | {"n": 9}, 400, "answers"),
    "an empty stop": (GOOD | {"stop": ""}, 400, "stop"),
    "too large": (b" " * (2**23 + 1), 413, "bytes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_are_refused_in_openai_s_shape(server: Server, name: str) -> None:
    body, status, says = WRONG[name]
    told = ask(f"{server.url}/v1/completions", body, {"Authorization": f"Bearer {KEY}"})
    assert told.status == status, told.text
    error = told.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert says in error["message"]


def test_keys_paths_and_methods(server: Server) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
        told = ask(f"{server.url}/v1/completions", GOOD, headers)
        assert told.status == 401
        assert told.json["error"]["code"] == "invalid_api_key"
    assert ask(f"{server.url}/nowhere").json["error"]["type"] == "not_found_error"
    told = ask(f"{server.url}/v1/completions")
    assert (told.status, "error" in told.json) == (405, True)
    for path in ("/health", "/ready", "/metrics", "/", "/page.js", "/page.css"):  # need no key
        assert ask(f"{server.url}{path}").status == 200


def test_curl(server: Server) -> None:
    if shutil.which("curl") is None:
        pytest.skip("no curl")
    done = subprocess.run(
        [
            *("curl", "-sN", f"{server.url}/v1/completions", "-H", f"Authorization: Bearer {KEY}"),
            *("-H", "Content-Type: application/json", "-d", json.dumps(GOOD | {"stream": True})),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    events = done.stdout.split("\n\n")
    assert all(event.startswith("data: ") for event in events[:-1])
    assert events[-2:] == ["data: [DONE]", ""]
    last = json.loads(events[-3].removeprefix("data: "))
    assert last["choices"][0]["finish_reason"] == "length"


def test_metrics(server: Server, client: openai.OpenAI) -> None:
    before = metrics(server)
    prompt = [50 + index for index in range(20)]
    for _ in range(2):  # the second finds two blocks of the first
        told: Any = client.completions.create(
            model="tiny", prompt=prompt, max_tokens=9, extra_body={"mode": "sirius"}
        )
    assert told.usage.prompt_tokens_details.cached_tokens == 16
    after = metrics(server)
    more = {name: value - before.get(name, 0.0) for name, value in after.items()}
    assert more["vllm:prompt_tokens_total"] == 40
    assert more["vllm:prefix_cache_hits_total"] == 16
    assert more["vllm:generation_tokens_total"] == 2 * told.usage.completion_tokens
    assert more["vllm:time_to_first_token_seconds_count"] == 2
    drafted = after["vllm:spec_decode_num_draft_tokens_total"]
    accepted = after["vllm:spec_decode_num_accepted_tokens_total"]
    assert after["sirius:acceptance_rate"] == pytest.approx(accepted / drafted)
    periods = after["vllm:spec_decode_num_drafts_total"]
    assert after["sirius:mean_acceptance_length"] == pytest.approx(1 + accepted / periods)
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0


def test_the_documentation_names_every_metric(server: Server) -> None:
    told = (Path(__file__).parents[1] / "docs" / "serve.md").read_text()
    families = re.findall(r"^# TYPE (\S+) (\w+)$", ask(f"{server.url}/metrics").text, re.M)
    names = [name for name, _ in families if not name.endswith("_created")]
    assert len(names) > 15
    assert [name for name in names if f"`{name}`" not in told] == []


@pytest.mark.parametrize(
    ("capacity", "options", "says"),
    [
        ({"context": 129}, {}, "max_seq_len"),
        ({"period": 8}, {}, "max_period"),
        ({"rows": 0}, {}, "rows"),
        ({}, {"mode": "sample"}, "mode must be one of sirius, exact, full, sparse"),
        ({}, {"mode": "fast"}, "mode must be one of"),
    ],
)
def test_what_can_t_be_served_is_refused_at_the_start(
    model: SiriusModel, capacity: dict[str, int], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        make_served(model, "tiny", replace(CAPACITY, **capacity), **options)


def test_a_model_without_a_tokenizer_is_refused(model: SiriusModel) -> None:
    with pytest.raises(ConfigError, match="tokenizer"):
        make_served(SiriusModel(model.backend, None), "tiny", CAPACITY)


def test_a_model_without_a_chat_template(model: SiriusModel) -> None:
    with served(SiriusModel(model.backend, model.tokenizer)) as plain:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "w7"}]}
        told = ask(f"{plain.url}/v1/chat/completions", body)
        assert told.status == 400
        assert "/v1/completions" in told.json["error"]["message"]


def test_an_address_that_is_taken(model: SiriusModel, server: Server) -> None:
    port = server.servers[0].sockets[0].getsockname()[1]
    with pytest.raises(ConfigError, match="--port"):
        serve(make_served(model, "tiny", CAPACITY), port=port, progress=lambda line: None)


@pytest.mark.slow
def test_the_page_in_a_browser(server: Server, client: openai.OpenAI, tmp_path: Path) -> None:
    messages: Any = [{"role": "user", "content": PROMPT}]
    alone = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=12, extra_body={"mode": "exact"}
    )
    with tab(tmp_path) as page:
        page.open(f"{server.url}/")
        page.wait("document.getElementById('usage')?.textContent.includes('API key')")
        for name, value in {"prompt": PROMPT, "mode": "exact", "tokens": "12", "key": KEY}.items():
            page.value(f"document.getElementById({name!r}).value = {value!r}")
        page.value("document.getElementById('send').click()")
        page.wait("document.getElementById('usage').textContent.includes('drafted')")
        assert page.value("document.getElementById('answer').textContent") == (
            alone.choices[0].message.content
        )
        assert page.value("document.title") == "tiny"
