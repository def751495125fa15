"""
`armt serve`: the official client of OpenAI talks to a real server.

The model is tiny and random, with memories that matter: what it answers depends on what it read 100 segments ago. An
answer is right if it is what the model generates after the whole conversation, read afresh.
"""

import asyncio
import copy
import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from serving import (
    FACTS,
    LONG,
    SEGMENT_SIZE,
    TEXT,
    TOO_LONG,
    Served,
    assistant,
    cached,
    model_that_remembers,
    openai,
    read_afresh,
    served,
    user,
    words_tokenizer,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from modeling_armt import ARMTCache, ARMTForCausalLM
from modeling_armt.conversion.cli import main
from modeling_armt.conversion.demo import BACKBONE
from modeling_armt.conversion.serving.serve import listen
from modeling_armt.conversion.serving.sessions import Session, Sessions, common_length


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return words_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer) -> ARMTForCausalLM:
    return model_that_remembers(tokenizer)


@pytest.fixture
def server(model, tokenizer) -> Iterator[Served]:
    with served(model, tokenizer) as server:
        yield server


class TestSessions:
    """What is kept of conversations, and what is found again."""

    @pytest.fixture
    def sessions(self, tokenizer) -> Sessions:
        return Sessions(max_sessions=3, max_bytes=2**30)

    @staticmethod
    def memory(size: int = 1) -> ARMTCache:
        cache = ARMTCache()
        cache.last_hidden = torch.zeros(1, size)
        return cache

    def session(self, ids: list[int], reply: int, size: int = 1, branches: tuple[int, ...] = ()) -> Session:
        """One that has a memory before and after a reply of so many ids."""
        memories = {len(ids) - reply - 1: self.memory(size), len(ids): self.memory(size)}
        return Session(torch.tensor(ids), len(ids) - reply, memories, {n: self.memory(size) for n in branches})

    def test_a_prompt_that_goes_on_starts_at_the_end(self, sessions):
        session = self.session([1, 2, 3, 4], reply=1)
        sessions.keep(session)
        start = sessions.find(torch.tensor([1, 2, 3, 4, 5]))
        assert (start.length, start.cache, start.session) == (4, session.memories[4], session)

    def test_the_last_id_of_a_prompt_is_always_read(self, sessions):
        sessions.keep(self.session([1, 2, 3, 4], reply=1))
        assert sessions.find(torch.tensor([1, 2, 3, 4])).length == 2

    def test_another_prompt_starts_from_nothing(self, sessions):
        sessions.keep(self.session([1, 2, 3, 4], reply=1))
        start = sessions.find(torch.tensor([9, 2, 3, 4, 5]))
        assert (start.length, start.session, start.cache.is_initialized) == (0, None, False)

    def test_another_reply_starts_before_the_reply(self, sessions):
        sessions.keep(self.session([1, 2, 3, 4, 5], reply=2))
        start = sessions.find(torch.tensor([1, 2, 3, 9, 5, 6]))
        assert (start.length, start.session) == (2, None)

    def test_says_how_much_of_a_prompt_was_read_without_a_memory_of_it(self, sessions):
        sessions.keep(self.session([1, 2, 3, 4, 5, 6], reply=1))
        start = sessions.find(torch.tensor([1, 2, 9, 9]))
        assert (start.length, start.shared) == (0, 2)

    def test_branches_are_handed_on(self, sessions):
        session = self.session([1, 2, 3, 4, 5, 6], reply=1, branches=(2,))
        sessions.keep(session)
        assert sessions.find(torch.tensor([1, 2, 3, 4, 5, 6, 7])).branches == session.branches
        assert sessions.find(torch.tensor([1, 2, 9, 9])).branches == session.branches

    def test_nobody_goes_on_with_what_is_anothers(self, sessions):
        session = self.session([1, 2, 3, 4], reply=1)
        session.owner = "Mary"
        sessions.keep(session)
        assert sessions.find(torch.tensor([1, 2, 3, 4, 5]), "Mary").length == 4
        for owner in ("John", ""):
            start = sessions.find(torch.tensor([1, 2, 3, 4, 5]), owner)
            assert (start.length, start.shared, start.session) == (0, 0, None)

    @pytest.mark.parametrize("by_text", [False, True])
    def test_a_reply_in_other_tokens_is_the_same_reply_by_its_text_only(self, tokenizer, by_text):
        sessions = Sessions(max_sessions=3, max_bytes=2**30, decode=tokenizer.decode if by_text else None)
        text = " nobody thought"
        whole = tokenizer(text, add_special_tokens=False)["input_ids"]
        letters = [token for letter in text for token in tokenizer(letter, add_special_tokens=False)["input_ids"]]
        assert tokenizer.decode(letters) == text and letters != whole
        sessions.keep(self.session([7, 8, 9, *letters], reply=len(letters)))
        assert sessions.find(torch.tensor([7, 8, 9, *whole, 5])).length == (3 + len(whole) if by_text else 2)
        assert sessions.find(torch.tensor([7, 8, 9, *whole[:-1], 5, 5, 5])).length == 2

    def test_keeps_a_conversation_once(self, sessions):
        first = self.session([1, 2, 3, 4], reply=1)
        sessions.keep(first)
        sessions.keep(self.session([1, 2, 3, 4, 5, 6], reply=1), instead_of=first)
        assert len(sessions) == 1

    def test_forgets_what_was_not_used_for_longest(self, sessions):
        for number in range(3):
            sessions.keep(self.session([number, 1, 2, 3], reply=1))
        sessions.find(torch.tensor([0, 1, 2, 3, 4]))
        sessions.keep(self.session([3, 1, 2, 3], reply=1))
        found = [sessions.find(torch.tensor([number, 1, 2, 3, 4])).length for number in range(4)]
        assert found == [4, 0, 4, 4]

    def test_bytes_are_bounded(self):
        sessions = Sessions(max_sessions=100, max_bytes=5 * 2 * 4096)
        for number in range(10):
            sessions.keep(self.session([number, 1, 2, 3], reply=1, size=1024))
        assert len(sessions) == 5 and sessions.num_bytes() == sessions.max_bytes

    def test_what_is_shared_counts_once(self, sessions):
        session = self.session([1, 2, 3, 4], reply=1, size=1024)
        sessions.keep(session)
        sessions.keep(Session(session.ids, 3, {n: cache.fork() for n, cache in session.memories.items()}, {}))
        assert sessions.num_bytes() == 2 * 4096

    @pytest.mark.parametrize(
        "a, b, length", [([1, 2], [1, 2, 3], 2), ([1, 2], [1, 3], 1), ([1], [2], 0), ([], [1], 0)]
    )
    def test_common_length(self, a, b, length):
        assert common_length(torch.tensor(a), torch.tensor(b)) == length


class TestAnswers:
    def test_the_model_is_listed(self, server):
        assert [model.id for model in server.client.models.list()] == ["tiny"]

    @pytest.mark.parametrize("stream", [False, True])
    def test_an_answer_is_the_models(self, server, model, tokenizer, stream):
        messages = [user(FACTS["Mary"] + TEXT)]
        assert server.chat(messages, stream)[0] == read_afresh(model, tokenizer, messages)

    def test_completions_go_on_with_a_text(self, server, model, tokenizer):
        options = {"model": "tiny", "max_tokens": 12, "temperature": 0}
        first = server.client.completions.create(prompt=TEXT, **options)
        ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
        expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert first.choices[0].text == tokenizer.decode(expected)
        prompt = TEXT + first.choices[0].text + " And then"
        chunks = list(server.client.completions.create(prompt=prompt, stream=True, **options))
        assert cached(first.usage) == 0
        assert cached(chunks[-1].usage) == first.usage.total_tokens

    def test_two_interleaved_sessions_answer_each_with_its_own(self, server, model, tokenizer):
        """Their facts lie more than 100 segments back, and only a session's memory still knows them. One streams."""
        talks = {name: [user(fact + LONG)] for name, fact in FACTS.items()}
        for name, talk in talks.items():
            talk.append(assistant(server.chat(talk, stream=name == "Mary")[0]))
        for name, talk in talks.items():
            talk.append(user("Who has it?"))
            reply, usage = server.chat(talk, stream=name == "Mary")
            assert cached(usage) >= 100 * SEGMENT_SIZE
            assert reply == read_afresh(model, tokenizer, talk)
            talk.append(assistant(reply))
        assert talks["Mary"][-1] != talks["John"][-1]

    def test_a_second_turn_reads_only_its_own_tokens(self, server, tokenizer):
        messages = [user(TEXT)]
        reply, first = server.chat(messages)
        messages += [assistant(reply), user("Why?")]
        second = server.chat(messages)[1]
        own = len(tokenizer("\n[user]Why?\n[assistant]")["input_ids"])
        assert second.prompt_tokens - cached(second) == own
        assert cached(first) == 0

    def test_a_reply_may_be_asked_for_again(self, server):
        messages = [user(TEXT)]
        first, usage = server.chat(messages)
        again, usage_again = server.chat(messages)
        assert again == first
        assert cached(usage_again) == usage.prompt_tokens - 1

    def test_the_last_message_may_be_changed(self, server, model, tokenizer):
        messages = [user(TEXT)]
        reply, first = server.chat(messages)
        server.chat([*messages, assistant(reply), user("Why?")])
        changed = [*messages, assistant(reply), user("When was that?")]
        answer, usage = server.chat(changed)
        assert answer == read_afresh(model, tokenizer, changed)
        assert cached(usage) == first.total_tokens

    def test_the_third_question_about_a_text_reads_only_itself(self, server, model, tokenizer):
        """The second one shows where conversations about this text part."""
        usages = []
        for question in ("Who went?", "When was that?", "And why?", "Was it cold?"):
            messages = [user(TEXT + question)]
            answer, usage = server.chat(messages)
            assert answer == read_afresh(model, tokenizer, messages)
            usages.append(usage)
        text = len(tokenizer("[user]" + TEXT)["input_ids"])
        assert [cached(usage) > text - 3 for usage in usages] == [False, False, True, True]

    def test_a_reply_that_comes_back_in_other_tokens_is_read_again(self, model, tokenizer, monkeypatch):
        """Replies here are single letters, which the tokenizer pairs. With `match="text"` they are not read."""
        letters = {tokenizer.convert_tokens_to_ids(letter) for letter in "es"}
        assert all(len(tokenizer(a + b, add_special_tokens=False)["input_ids"]) == 1 for a in "es" for b in "es")
        config = copy.deepcopy(model.generation_config)
        config.suppress_tokens = sorted(set(range(len(tokenizer))) - letters)
        monkeypatch.setattr(model, "generation_config", config)
        for match in ("tokens", "text"):
            with served(model, tokenizer, match=match) as server:
                for name in FACTS:
                    messages = [user(FACTS[name] + TEXT)]
                    reply, first = server.chat(messages)
                    messages += [assistant(reply), user("Why?")]
                    answer, usage = server.chat(messages)
                    if match == "tokens":
                        assert answer == read_afresh(model, tokenizer, messages)
                    assert (cached(usage) > first.prompt_tokens) == (match == "text")

    def test_a_forgotten_session_is_read_afresh(self, model, tokenizer):
        with served(model, tokenizer, max_sessions=1) as server:
            messages = [user(TEXT)]
            reply, _ = server.chat(messages)
            server.chat([user("Something else.")])
            messages += [assistant(reply), user("Why?")]
            answer, usage = server.chat(messages)
            assert answer == read_afresh(model, tokenizer, messages)
            assert cached(usage) == 0

    def test_fifty_at_once(self, server, model, tokenizer):
        talks = [[user(f"{name} has {number}. Hello!")] for number in range(25) for name in FACTS]

        async def ask() -> list[str]:
            async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:
                options = {"model": "tiny", "max_tokens": 4, "temperature": 0}
                answers = [client.chat.completions.create(messages=talk, **options) for talk in talks]
                return [answer.choices[0].message.content for answer in await asyncio.gather(*answers)]

        assert asyncio.run(ask()) == [read_afresh(model, tokenizer, talk, tokens=4) for talk in talks]

    def test_a_reply_ends_at_a_stop_string(self, server, model, tokenizer):
        messages = [user("Hello!")]
        whole = read_afresh(model, tokenizer, messages)
        stop = whole[len(whole) // 2 :][:4]
        reply, _ = server.chat(messages, stop=stop)
        assert stop in reply and whole.startswith(reply) and reply != whole


class TestClientsThatLeave:
    def test_a_cancelled_stream_ends_its_generation(self, server):
        stream = server.client.chat.completions.create(
            model="tiny", messages=[user("Hello!")], max_tokens=TOO_LONG, stream=True
        )
        texts = (chunk.choices[0].delta.content for chunk in stream)
        assert next(text for text in texts if text)
        stream.close()
        assert server.still_answers()

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_killed_client_ends_its_generation(self, server, stream):
        script = (
            "import openai, sys\n"
            "client = openai.OpenAI(base_url=sys.argv[1], api_key='none', max_retries=0)\n"
            "messages = [{'role': 'user', 'content': 'Hello!'}]\n"
            "print('asks', flush=True)\n"
            f"answer = client.chat.completions.create(model='tiny', messages=messages, max_tokens={TOO_LONG}, "
            f"stream={stream})\n"
            "print(list(answer))\n"
        )
        client = subprocess.Popen([sys.executable, "-c", script, server.url], stdout=subprocess.PIPE, text=True)
        assert client.stdout.readline() == "asks\n"
        time.sleep(1)
        client.kill()
        assert client.communicate()[0] == ""
        assert server.still_answers()

    def test_a_client_that_leaves_while_it_waits_is_not_answered(self, server):
        stream = server.client.chat.completions.create(
            model="tiny", messages=[user("Hello!")], max_tokens=TOO_LONG, stream=True
        )
        next(iter(stream))
        with pytest.raises(openai.APITimeoutError):
            server.client.with_options(timeout=0.5).chat.completions.create(
                model="tiny", messages=[user("And I?")], max_tokens=TOO_LONG
            )
        stream.close()
        assert server.still_answers()

    def test_half_a_request(self, server):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nContent-Length: 1000\r\n\r\n{")
        assert server.still_answers()


class TestCommand:
    @pytest.fixture(scope="class")
    @classmethod
    def checkpoint(cls, model, tokenizer, tmp_path_factory) -> Path:
        folder = tmp_path_factory.mktemp("serve") / "tiny"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    def test_serves_until_interrupted(self, checkpoint):
        with armt_serve(checkpoint, "--api-key", "Mary's", "--api-key", "John's") as (server, process):
            with pytest.raises(openai.AuthenticationError):
                server.still_answers()
            assert all(Served(server.port, key).still_answers() for key in ("Mary's", "John's"))
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
            assert "Traceback" not in process.stderr.read()

    def test_an_address_that_is_taken(self, checkpoint, capsys):
        with listen("127.0.0.1", 0) as taken:
            port = str(taken.getsockname()[1])
            assert main(["serve", str(checkpoint), "--host", "127.0.0.1", "--port", port]) == 1
        assert re.search(rf"cannot listen at 127.0.0.1:{port}: .*Choose another --port", capsys.readouterr().err)

    def test_a_plain_model(self, capsys):
        assert main(["serve", str(BACKBONE), "--port", "0"]) == 1
        assert "not an ARMT checkpoint. Convert it first: armt convert" in capsys.readouterr().err

    def test_a_checkpoint_without_tokenizer(self, model, tmp_path, capsys):
        model.save_pretrained(tmp_path)
        assert main(["serve", str(tmp_path), "--port", "0"]) == 1
        assert "has no tokenizer" in capsys.readouterr().err


@contextmanager
def armt_serve(checkpoint: Path, *options: str) -> Iterator[tuple[Served, subprocess.Popen]]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "modeling_armt.conversion", "serve", str(checkpoint), "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        lines = iter(process.stderr.readline, "")
        port = next(match[1] for line in lines if (match := re.search(r"at http://localhost:(\d+)/v1", line)))
        yield Served(int(port)), process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_trained_model_remembers_what_each_session_was_told(tmp_path):
    """
    `armt demo` trains it on distances of 1 and 2 segments; here the facts lie more than 100 segments back, where it
    remembers about half of them. The two sessions are told facts that it remembers when nobody serves it.
    """
    demo = tmp_path / "demo"
    subprocess.run([sys.executable, "-m", "modeling_armt.conversion", "demo", "--out", str(demo)], check=True)
    tokenizer = AutoTokenizer.from_pretrained(demo)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(demo)
    told = " {0} went to the {1}. {0} took the {2}."
    questions = (" {} is in the", ". {} has the")
    model = AutoModelForCausalLM.from_pretrained(demo).eval()

    @torch.no_grad()
    def remembers(name: str, *answers: str) -> bool:
        ids, memory = tokenizer(told.format(name, *answers) + 4 * LONG)["input_ids"], ARMTCache()
        for question, answer in zip(questions, answers, strict=True):
            ids += tokenizer(question.format(name), add_special_tokens=False)["input_ids"]
            said = int(model.read(ids, cache=memory).logits[0, -1].argmax())
            if tokenizer.decode(said).strip() != answer:
                return False
            ids = [said]
        return True

    facts: dict[str, tuple[str, str]] = {}
    places, things = ("garden", "church", "wood", "school"), ("gold", "letter", "book", "horse")
    for name, place, thing in itertools.product(("Mary", "John", "Emma", "Anna"), places, things):
        used = {answer for answers in facts.values() for answer in answers}
        if len(facts) < 2 and name not in facts and not {place, thing} & used and remembers(name, place, thing):
            facts[name] = (place, thing)
    assert len(facts) == 2, facts
    talks = {name: [] for name in facts}
    with armt_serve(demo) as (server, _):
        for number, question in enumerate(questions):
            for stream, (name, talk) in enumerate(talks.items()):
                before = "" if number else told.format(name, *facts[name]) + 4 * LONG
                talk.append(user(before + question.format(name)))
                answer, usage = server.chat(talk, stream=bool(stream), tokens=1, model="demo")
                assert answer.strip() == facts[name][number]
                if number:
                    assert cached(usage) > 100 * 32 and usage.prompt_tokens - cached(usage) <= 8
                talk.append(assistant(answer))
