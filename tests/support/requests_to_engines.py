"""Requests to an engine, and what the model itself says about the answers."""

import numpy as np
import torch


def run(engine, requests):
    for request_id, prompt, params in requests:
        engine.submit(request_id, prompt, params)
    done = {}
    while len(done) < len(requests):
        done |= {c.request_id: c for c in engine.step()}
    return done


def prompts(n, seed=0, low=3, high=60):
    rng = np.random.default_rng(seed)
    return [[int(x) for x in rng.integers(0, 97, rng.integers(low, high))] for _ in range(n)]


def plain_logprobs(model, prompt, response, temperature=1.0):
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0].float()
    rows = torch.log_softmax(logits / temperature, -1)[len(prompt) - 1 : -1]
    return rows.gather(1, torch.tensor(response)[:, None])[:, 0].numpy()


def small(kind, **options):
    import transformers

    torch.manual_seed(1)
    shape = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = getattr(transformers, f"{kind}Config")(**{**shape, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()
