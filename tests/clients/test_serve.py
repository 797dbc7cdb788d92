"""``transformers serve`` is started on a checkpoint and asked over HTTP."""

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip("transformers", "5")

from checkpoints import IMAGES, QUESTIONS, new_tokens, question, save

PROMPT = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
SECONDS_TO_START = 180


@pytest.mark.slow
def test_transformers_serve_answers_about_an_image(tmp_path, client_row):
    client_row("serve", "reference")
    for package in ("fastapi", "uvicorn", "openai", "pydantic"):
        pytest.importorskip(package)
    model, processor = save(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(tmp_path / "model")]
    options = ["--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen([*command, *options], env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
            reply = _ask(f"http://127.0.0.1:{port}/v1/chat/completions", str(tmp_path / "model"))
        finally:
            server.terminate()
            server.wait(30)
    inputs = processor.apply_chat_template([question(0)], **PROMPT)
    want = processor.decode(new_tokens(model, inputs)[0], skip_special_tokens=True)
    assert reply["choices"][0]["message"]["content"] == want
    assert reply["usage"]["prompt_tokens"] == inputs["input_ids"].shape[1]


def _wait(url, server, log):
    deadline = time.monotonic() + SECONDS_TO_START
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the server does not answer:\n{log.read_text()}")


def _ask(url, model):
    picture = io.BytesIO()
    IMAGES[0].save(picture, "PNG")
    data = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": data}}, {"type": "text", "text": QUESTIONS[0]}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 6, "temperature": 0}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)
