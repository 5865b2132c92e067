"""A random small language model, for tests of any part that needs one."""


def tiny_qwen3(vocab_size: int, seed: int, *, hidden: int = 32, spread: float = 0.15, **config):
    """A two-layer Qwen3 with grouped-query attention.

    Args:
        vocab_size: how many ids it knows.
        seed: of its weights.
        hidden: its width.
        spread: standard deviation of its matrices; larger makes it surer of what it says.
        config: further settings of its configuration, such as token ids.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            intermediate_size=64,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            **config,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, spread)
    return model.eval()
