"""Chatting: from messages to answers in Python, by `sirius run --chat` and by `sirius chat`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import sirius_runtime
from sirius_compile import CompileConfig, compile_model
from sirius_compile.compile import Compiled
from sirius_compile.tokenizer import tokenizer_files
from sirius_runtime.cli.chat import history_file
from sirius_runtime.conversation import Conversation
from sirius_runtime.errors import ArtifactError, GenerationError
from sirius_runtime.logits_options import GenerationSpec, LogitsSpec
from sirius_runtime.model import GenerationOutput, SiriusModel
from tests.support.cli import Cli
from tests.support.models import MAX_SEQ_LEN, TinyModels, random_decoder, word_tokenizer

TEMPLATE = """\
{{ bos_token }} {% for message in messages %}
    {%- if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
    {%- set mark = {'system': 'w6', 'user': 'w7', 'assistant': 'w8'}[message.role] %}
    {{- mark }} {{ message.content }} w9 {% endfor %}
{% if add_generation_prompt %}w8{% endif %}"""
HELLO = [{"role": "user", "content": "w20 w21"}]
HELLO_IDS = (1, 7, 20, 21, 9, 8)
OTHER = [{"role": "system", "content": "w30"}, *HELLO]
OTHER_IDS = (1, 6, 30, 9, 7, 20, 21, 9, 8)


def chatty(template: Any = TEMPLATE) -> PreTrainedTokenizerFast:
    tokenizer = word_tokenizer()
    tokenizer.bos_token = "<s>"
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    options = CompileConfig(sparsity="griffin", graphs="entries")
    return compile_model(random_decoder("llama"), options, tokenizer=chatty())


@pytest.fixture(scope="module")
def artifact(compiled: Compiled, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled.save(tmp_path_factory.mktemp("artifact") / "chat.sirius")


@pytest.fixture(scope="module")
def model(artifact: Path) -> SiriusModel:
    return sirius_runtime.load(artifact)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    return Cli(capsys, monkeypatch)


# ---------------------------------------------------------------- messages in Python


def test_messages_are_the_prompt_that_the_template_makes(
    model: SiriusModel, compiled: Compiled
) -> None:
    for one in (model, compiled.to_runtime()):
        output = one.generate(messages=HELLO, max_new_tokens=8)
        assert output.prompts == (HELLO_IDS,)
        assert output.tokens == one.generate(HELLO_IDS, max_new_tokens=8).tokens


def test_the_prompt_is_that_of_transformers(model: SiriusModel) -> None:
    theirs = chatty().apply_chat_template(OTHER, add_generation_prompt=True)["input_ids"]
    assert model.generate(messages=OTHER, max_new_tokens=1).prompts == (tuple(theirs),)
    assert tuple(theirs) == OTHER_IDS


def test_a_batch_of_conversations(model: SiriusModel) -> None:
    both = model.generate(messages=[HELLO, OTHER], max_new_tokens=8)
    assert both.prompts == (HELLO_IDS, OTHER_IDS)
    alone = [model.generate(messages=one, max_new_tokens=8).tokens[0] for one in (HELLO, OTHER)]
    assert list(both.tokens) == alone


def test_templates_by_name_and_their_variables(compiled: Compiled) -> None:
    named = {"default": "w10 {{ extra or 'w11' }}", "tool_use": "w12", "rag": "w13"}
    model = replace(compiled, tokenizer_files=tokenizer_files(chatty(named))).to_runtime()

    def prompt(**options: Any) -> tuple[int, ...]:
        return model.generate(messages=HELLO, max_new_tokens=1, **options).prompts[0]

    assert prompt() == (10, 11)
    assert prompt(chat_template_kwargs={"extra": "w14"}) == (10, 14)
    assert prompt(chat_template="rag") == (13,)
    assert prompt(chat_template_kwargs={"tools": []}) == (12,)


def test_what_is_no_chat_is_refused(model: SiriusModel, tiny: TinyModels) -> None:
    with pytest.raises(GenerationError, match=r"no chat template.*chat_template\.jinja"):
        tiny(method="griffin").model.generate(messages=HELLO)
    with pytest.raises(GenerationError, match="both messages and a prompt are given"):
        model.generate("w7", messages=HELLO)
    with pytest.raises(GenerationError, match="are only for messages"):
        model.generate("w7", chat_template="default")
    with pytest.raises(GenerationError, match="refuses these messages: no tools here"):
        model.generate(messages=[{"role": "tool", "content": "w7"}])
    with pytest.raises(GenerationError, match=r"give them as generate\(messages="):
        model.generate(HELLO)  # type: ignore[arg-type]


def test_a_damaged_file_of_templates_is_refused_at_load(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Compiled, "_read_back", lambda self, path: None)  # which refuses it too
    for content in (b"[]", b'{"templates": 1, "special_tokens": {}}'):
        files = {**compiled.tokenizer_files, "chat.json": content}
        path = replace(compiled, tokenizer_files=files).save(tmp_path / "m.sirius", force=True)
        with pytest.raises(ArtifactError, match=r"tokenizer/chat\.json is malformed"):
            sirius_runtime.load(path)


def test_an_older_artifact_has_no_chat_and_loads(compiled: Compiled, tmp_path: Path) -> None:
    files = {name: c for name, c in compiled.tokenizer_files.items() if name != "chat.json"}
    path = replace(compiled, tokenizer_files=files).save(tmp_path / "old.sirius")
    older = sirius_runtime.load(path)
    assert older.chat is None
    assert older.generate("w7", max_new_tokens=1).tokens


# ---------------------------------------------------------------- conversations


def test_a_conversation_has_all_that_was_said(model: SiriusModel) -> None:
    conversation = Conversation(model, system="w30", max_new_tokens=6)
    shown: list[str] = []
    first = conversation.ask("w20 w21", shown.append)
    assert first.output is not None
    assert first.output.prompts == (OTHER_IDS,)
    assert "".join(shown) == first.text == first.output.texts[0]  # type: ignore[index]
    second = conversation.ask("w22")
    expected = [
        *OTHER,
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "w22"},
    ]
    assert second.output is not None
    assert second.output.tokens == model.generate(messages=expected, max_new_tokens=6).tokens
    assert conversation.messages == [*expected, {"role": "assistant", "content": second.text}]
    conversation.reset("w31")
    assert conversation.messages == [{"role": "system", "content": "w31"}]


def test_what_is_refused_leaves_a_conversation_as_it_was(model: SiriusModel) -> None:
    conversation = Conversation(model, max_new_tokens=4)
    conversation.ask("w20")
    before = conversation.messages
    with pytest.raises(GenerationError, match=rf"has \d+ tokens.*serves {MAX_SEQ_LEN}.*/reset"):
        conversation.ask("w20 " * MAX_SEQ_LEN)
    assert conversation.messages == before


def test_the_last_answer_fills_what_is_left(model: SiriusModel) -> None:
    conversation = Conversation(model, eos_token_id=[])
    answer = conversation.ask("w20 " * (MAX_SEQ_LEN - 10))
    assert answer.full
    assert answer.output is not None
    assert len(answer.output.prompts[0]) + len(answer.output.tokens[0]) == MAX_SEQ_LEN


def test_an_answer_that_is_stopped_stays_as_far_as_it_went(model: SiriusModel) -> None:
    conversation = Conversation(model, max_new_tokens=40, mode="full", eos_token_id=[])
    shown: list[str] = []

    def write(text: str) -> None:
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    answer = conversation.ask("w20", write)
    assert answer.output is None
    assert conversation.messages[-1] == {"role": "assistant", "content": "".join(shown)}
    assert conversation.ask("w21").output is not None  # the model serves the next one


def test_stop_tokens_and_penalties_of_the_model_hold_in_a_chat(compiled: Compiled) -> None:
    """Each id that its generation config gives ends an answer, and its penalty applies."""
    penalised = replace(
        compiled.spec, generation=GenerationSpec(LogitsSpec(repetition_penalty=1.7))
    )
    model = replace(compiled, spec=penalised).to_runtime()
    options: dict[str, Any] = {"messages": HELLO, "mode": "exact", "max_new_tokens": 30}
    free = model.generate(**options, eos_token_id=[]).tokens[0]
    assert free != model.generate(**options, eos_token_id=[], repetition_penalty=1.0).tokens[0]
    spec = replace(penalised, eos_token_ids=(free[-1], free[2]))
    ending = replace(compiled, spec=spec).to_runtime()
    answer = Conversation(ending, mode="exact", max_new_tokens=30).ask("w20 w21").output
    assert answer is not None
    end = min(free.index(free[2]), free.index(free[-1]))
    assert (answer.tokens, answer.finish_reasons) == ((free[: end + 1],), ("eos",))


# ---------------------------------------------------------------- sirius run --chat


def run_json(cli: Cli, artifact: Path, *flags: str) -> tuple[dict[str, Any], str]:
    done = cli.run("run", artifact, "-p", "w20 w21", "--max-new-tokens", "8", "--json", *flags)
    assert done.code == 0, done.err
    return json.loads(done.out), done.err


def test_run_makes_a_message_of_its_prompt(cli: Cli, artifact: Path, model: SiriusModel) -> None:
    def tokens(output: GenerationOutput) -> list[int]:
        return list(output.tokens[0])

    chat, said = run_json(cli, artifact, "--chat")
    assert chat["tokens"] == tokens(model.generate(messages=HELLO, max_new_tokens=8))
    assert "chat template" not in said
    system, _ = run_json(cli, artifact, "--system", "w30")
    assert system["tokens"] == tokens(model.generate(messages=OTHER, max_new_tokens=8))
    compared = cli.run("run", artifact, "-p", "w20 w21", "--chat", "--compare", "--json")
    assert json.loads(compared.out)["full"]["tokens"]


def test_a_raw_run_of_such_a_model_says_so_in_a_line(cli: Cli, artifact: Path) -> None:
    plain, said = run_json(cli, artifact)
    hints = [line for line in said.splitlines() if "chat template" in line]
    assert len(hints) == 1
    assert "--chat" in hints[0]
    raw, said = run_json(cli, artifact, "--raw")
    assert "chat template" not in said
    assert raw["tokens"] == plain["tokens"]


def test_run_without_a_template(cli: Cli, tiny: TinyModels, tmp_path: Path) -> None:
    path = tiny(method="griffin").compiled.save(tmp_path / "plain.sirius")
    done = cli.run("run", path, "-p", "w7", "--chat")
    assert (done.code, done.out) == (2, "")
    assert "has no chat template" in done.err
    assert "chat template" not in cli.run("run", path, "-p", "w7").err
    chat = cli.run("chat", path)
    assert chat.code == 2
    assert "has no chat template" in chat.err


# ---------------------------------------------------------------- sirius chat


def piped(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, artifact: Path, lines: bytes, *flags: str
) -> Any:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    return cli.run("chat", artifact, "--max-new-tokens", "6", *flags)


def test_chat_from_a_pipe(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, artifact: Path, model: SiriusModel
) -> None:
    conversation = Conversation(model, max_new_tokens=6)
    answers = [conversation.ask(text).text for text in ("w20", "w21")]
    conversation.reset()
    answers.append(conversation.ask("w21").text)
    conversation.reset("w30")
    answers.append(conversation.ask("w21").text)
    lines = b"w20\n\n  \nw21\n/reset\nw21\r\n/system w30\n/nope\nw21\n/quit\nw22\n"
    done = piped(cli, monkeypatch, artifact, lines)
    assert done.code == 0, done.err
    assert done.out == "".join(f"{answer}\n" for answer in answers)
    assert "there is no command '/nope'; /help lists them" in done.err
    assert done.err.count("tokens/s") == 4


def test_chat_tells_its_commands_and_its_system_message(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, artifact: Path
) -> None:
    done = piped(cli, monkeypatch, artifact, b"/help\n/system\n", "--system", "w30")
    assert (done.code, done.out) == (0, "")
    for word in ("/reset", "/system TEXT", "/quit", "w30"):
        assert word in done.err
    assert "no system message" in piped(cli, monkeypatch, artifact, b"/system\n").err


def test_chat_from_a_pipe_ends_with_what_is_wrong(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, artifact: Path
) -> None:
    too_long = piped(cli, monkeypatch, artifact, b"w20 " * 500)
    assert too_long.code == 2
    assert "start over (/reset)" in too_long.err
    not_text = piped(cli, monkeypatch, artifact, b"w20\n\xff\n")
    assert not_text.code == 2
    assert "line 2 of stdin can't be read (byte 0 is not UTF-8)" in not_text.err


def test_a_slash_can_be_said(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, artifact: Path, model: SiriusModel
) -> None:
    done = piped(cli, monkeypatch, artifact, b"//w20\n")
    assert done.out == f"{Conversation(model, max_new_tokens=6).ask('/w20').text}\n"


def test_the_history_is_in_the_state_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    assert history_file() == tmp_path / ".local/state/sirius/chat_history"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert history_file() == tmp_path / "state/sirius/chat_history"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    assert history_file() == tmp_path / ".local/state/sirius/chat_history"


class Terminal:
    """`sirius chat` at a terminal of its own."""

    def __init__(self, artifact: Path, state: Path, *flags: str) -> None:
        pty = pytest.importorskip("pty")  # of Unix
        self._master, slave = pty.openpty()
        code = (
            "import sys; from sirius_runtime.cli import main;"
            "sys.exit(main(['chat', *sys.argv[1:]]))"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, str(artifact), "--mode", "full", *flags],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=lambda: _take_terminal(slave),
            env={**os.environ, "XDG_STATE_HOME": str(state), "TERM": "dumb"},
        )
        os.close(slave)
        self._shown = b""

    def wait_for(self, words: str, typing: str = "") -> None:
        """Waits until `words` are shown, after those that were waited for before. `typing` is typed
        in each second of silence.
        """
        end = time.monotonic() + 60
        while words.encode() not in self._shown:
            assert time.monotonic() < end, self._shown
            if select.select([self._master], [], [], 1)[0]:
                self._shown += os.read(self._master, 4096)
            else:
                self.type(typing)
        self._shown = self._shown.partition(words.encode())[2]

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def ended(self) -> int:
        return self._process.wait(60)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._master)


def _take_terminal(slave: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)


@contextlib.contextmanager
def terminal(artifact: Path, state: Path, *flags: str) -> Iterator[Terminal]:
    one = Terminal(artifact, state, *flags)
    try:
        yield one
    finally:
        one.close()


@pytest.mark.gate
def test_a_terminal_keeps_a_history_and_survives_ctrl_c(artifact: Path, tmp_path: Path) -> None:
    with terminal(artifact, tmp_path, "--max-new-tokens", "3") as chat:
        chat.wait_for(">>> ")
        chat.type("w20\n")
        chat.wait_for("tokens/s")
        chat.wait_for(">>> ")
        chat.type("\x03")
        # Python shows the prompt first and waits for keys then: it overlooks a signal in between
        # until the next one, so that a user types Ctrl-C again.
        chat.wait_for("/quit or Ctrl-D ends", typing="\x03")
        chat.wait_for(">>> ")
        chat.type("w20 " * 200 + "\n")
        chat.wait_for("start over (/reset)")
        chat.wait_for(">>> ")
        chat.type("/quit\n")
        assert chat.ended() == 0
    history = tmp_path / "sirius" / "chat_history"
    assert "w20" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_a_second_ctrl_c_does_not_end_the_program(
    monkeypatch: pytest.MonkeyPatch, model: SiriusModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second comes while the answer to the first is written."""
    from sirius_runtime.cli import chat

    reads: list[type[BaseException]] = [EOFError, KeyboardInterrupt]

    def read() -> str:
        raise reads.pop()

    def interrupted_once(text: str) -> None:
        tell(text)
        if "/quit" in text and len(told) < 1:
            told.append(text)
            signal.raise_signal(signal.SIGINT)

    told: list[str] = []
    tell = chat.tell
    monkeypatch.setattr(chat, "_read_line", read)
    monkeypatch.setattr(chat, "tell", interrupted_once)
    chat._at_terminal(Conversation(model))
    assert capsys.readouterr().err.count("/quit or Ctrl-D ends") == 2
    assert not reads


def test_ctrl_c_stops_an_answer_and_not_the_program(
    monkeypatch: pytest.MonkeyPatch, model: SiriusModel, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, where the signal comes in the middle of an answer for sure."""
    from sirius_runtime.cli import chat

    lines = iter(["w20", "w21"])

    def read() -> str:
        line = next(lines, None)
        if line is None:
            raise EOFError
        return line

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    conversation = Conversation(model, mode="full", max_new_tokens=20, eos_token_id=[])
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(chat, "_read_line", read)
    monkeypatch.setattr(chat, "write_text", write)
    monkeypatch.setattr(sys, "stdin", Screen())
    chat._at_terminal(conversation)
    said = capsys.readouterr().err
    assert "sirius: stopped" in said
    assert "the answer was cut at its greatest length; --max-new-tokens" in said
    stopped = conversation.messages[1]["content"]
    assert stopped == "".join(written[:2])
    assert len(conversation.messages) == 4
