"""Servers of a teacher's prompt log-probs: ours, ours as it once was, and one that answers as vLLM's does."""

import contextlib
import threading

import fake_vllm
import torch

from atod_algos.teachers.server import ServeOptions, TeacherServer
from atod_envs.http.messages import Refused


class Recording(TeacherServer):
    """Ours; remembers what it was asked for."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.asked = []

    def completions(self, body):
        self.asked.append(body["prompt_logprobs"])
        return super().completions(body)


class Old(Recording):
    """Ours as it once was: it gives the row's own ids alone, whatever it is asked for."""

    def completions(self, body):
        self.asked.append(body["prompt_logprobs"])
        return TeacherServer.completions(self, body | {"prompt_logprobs": 1})


class Foreign(Recording):
    """Answers as vLLM's server does; ``most`` is its --max-logprobs, ``change`` what is wrong with its entries."""

    most = 20
    quiet = False
    change = staticmethod(lambda entries: entries)

    def completions(self, body):
        k = body["prompt_logprobs"]
        self.asked.append(k)
        if k > self.most and not self.quiet:
            raise Refused(400, f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.most}")
        choices = []
        for index, ids in enumerate(body["prompt"]):
            with torch.no_grad():
                logits = self.loaded.model(torch.tensor([ids])).logits[0].float()
            entries = fake_vllm.prompt_entries(torch.log_softmax(logits, -1), ids, min(k, self.most))
            places = [entry and {str(token): vars(said) for token, said in entry.items()} for entry in entries]
            choices.append({"index": index, "text": "x", "prompt_logprobs": self.change(places)})
        return {"model": "m", "choices": choices}


@contextlib.contextmanager
def serving(kind, loaded, **changes):
    with kind(loaded, ServeOptions("x", port=0)) as running:
        for name, value in changes.items():
            setattr(running, name, value)
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()
