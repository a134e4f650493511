"""Start, end, and the replacement of a model while it is used."""

import json
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from gpt.api import load
from tests.conftest import RunMain
from tests.support import processes
from tests.support.common import wait_for
from tests.support.serving import Client, serving


def test_sigterm_finishes_running_requests_and_exits_with_0(trained: Path, tmp_path: Path) -> None:
    arguments = ["serve", "--checkpoint", str(trained / "model.pt"), "--port", "0"]
    (process,) = processes.start(tmp_path, arguments)
    wait_for(lambda: "http://" in process.output())
    client = Client(process.output().split()[-1])
    wait_for(lambda: answers(client))
    with client.post(stream=True, prompt="the ", max_tokens=700, seed=1) as answer:
        lines = answer.iter_lines(decode_unicode=True)
        next(lines)
        process.signal(signal.SIGTERM)
        wait_for(lambda: not answers(client))
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert process.wait() == (0, "")
    log = (tmp_path / "gpt_nano.log").read_text()
    assert "serve: model: http://127.0.0.1:" in log
    assert "serve: done" in log


def test_requests_that_outlast_the_grace_period_are_ended(trained: Path, tmp_path: Path) -> None:
    arguments = ["serve", "--checkpoint", str(trained / "model.pt"), "--port", "0", "--max-tokens", "1000000"]
    (process,) = processes.start(tmp_path, [*arguments, "--grace", "1"])
    wait_for(lambda: "http://" in process.output())
    client = Client(process.output().split()[-1])
    wait_for(lambda: answers(client))
    with client.post(stream=True, prompt="the ", max_tokens=10**6) as answer:
        lines = answer.iter_lines()
        next(lines)
        began = time.monotonic()
        process.signal(signal.SIGTERM)
        code, _ = process.wait()
    assert code == 0
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("case", ["missing", "damaged", "same names", "port", "host"])
def test_a_server_that_cannot_start_says_why(trained: Path, tmp_path: Path, run_main: RunMain, case: str) -> None:
    good, other = trained / "model.pt", tmp_path / "model.pt"
    other.write_bytes(good.read_bytes()[:-100])
    with serving(good) as server:
        arguments, message = dict[str, tuple[list[str | Path], str]](
            {
                "missing": (["--checkpoint", "no.pt"], "no.pt"),
                "damaged": (["--checkpoint", other], "truncated"),
                "same names": (["--checkpoint", good, "--checkpoint", other], "different names"),
                "port": (["--checkpoint", good, "--port", server.address.rpartition(":")[2]], "free address"),
                "host": (["--checkpoint", good, "--host", "0.0.0.0"], "CHARGPT_API_KEY"),
            }
        )[case]
        assert message in run_main("serve", *arguments, code=2)


def test_a_new_model_replaces_the_old_one_without_losing_a_request(trained: Path, tmp_path: Path) -> None:
    """Requests run all the time; one that has begun ends with the model that it began with."""
    path, second = tmp_path / "model.pt", tmp_path / "second.pt"
    shutil.copy(trained / "model.pt", path)
    checkpoint = load(path).checkpoint
    weights = {name: 1.01 * weight for name, weight in checkpoint.weights.items()}
    type(checkpoint)(checkpoint.model, checkpoint.tokenizer, weights, checkpoint.about).save(second)
    expected = [load(each).generate("the ", max_new_tokens=200, seed=1)[4:] for each in (path, second)]
    with serving(path, watch_s=0.1) as server, ThreadPoolExecutor(4) as pool:
        fingerprint = server.post(prompt="a").json()["system_fingerprint"]

        def ask(_: int) -> tuple[str, str]:
            answer = server.post(prompt="the ", max_tokens=200, seed=1)
            assert answer.status_code == 200, answer.text
            return answer.json()["system_fingerprint"], answer.json()["choices"][0]["text"]

        answers = [pool.submit(ask, number) for number in range(12)]
        (tmp_path / "model.pt.tmp").write_bytes(b"not a checkpoint")
        (tmp_path / "model.pt.tmp").replace(path)  # is refused; the old model stays
        time.sleep(0.3)
        second.replace(path)
        wait_for(lambda: server.post(prompt="a").json()["system_fingerprint"] != fingerprint)
        answers += [pool.submit(ask, number) for number in range(4)]
        for found, text in (answer.result() for answer in answers):
            assert text == expected[found != fingerprint]
        assert answers[-1].result()[0] != fingerprint


def answers(client: Client) -> bool:
    try:
        return client.get("/health").ok
    except requests.ConnectionError:
        return False
