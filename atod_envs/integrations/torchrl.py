"""TorchRL: the environments as a ``GymWrapper``.

TorchRL carries text as non-tensor data. Actions arrive as strings; what a policy needs of ``info`` (task, admissible
actions, success, ...) is read into the tensordict next to the observation.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym

from atod_envs.prompting import prompted
from atod_envs.spaces import UnicodeText
from atod_envs.styles import PromptStyle

try:
    import torch
    from torchrl.data import Bounded, Composite, NonTensor, TensorSpec
    from torchrl.envs.gym_like import BaseInfoDictReader
    from torchrl.envs.libs.gym import GymWrapper, register_gym_spec_conversion
except ImportError as error:
    raise ImportError("these environments need torchrl: pip install 'atod[torchrl]'") from error

TEXTS = ("task_id", "task", "split")
NUMBERS = ("success", "valid", "score", "turn")


@register_gym_spec_conversion(UnicodeText)  # type: ignore[untyped-decorator]
def _text(spec: UnicodeText, device: Any = None, **_: Any) -> NonTensor:
    """A text space becomes non-tensor data."""
    return NonTensor((), device=device, example_data="a")


def torchrl_env(env_id: str, style: str | PromptStyle | None = None, **options: Any) -> TorchRLTextEnv:
    """A text environment as a TorchRL environment.

    The tensordict holds ``observation``, and from ``info``: ``task_id``, ``task``, ``split``, ``admissible`` (a list of
    strings), ``success``, ``valid``, ``score``, ``turn``. ``env.reset(task_id=...)`` plays a task,
    ``env.set_seed(seed)`` then ``env.reset()`` a drawn one.

    Args:
        env_id: registered id of the environment.
        style: prompt style; ``None`` shows the environment's own text and takes its actions.
        **options: of the environment.
    """
    env: gym.Env[str, str] = gym.make(env_id, **options)
    wrapped = TorchRLTextEnv(env if style is None else prompted(env, style))
    wrapped.set_info_dict_reader(_InfoReader())
    return wrapped


class TorchRLTextEnv(GymWrapper):  # type: ignore[misc]
    """TorchRL's wrapper, for text; made by :func:`torchrl_env`."""

    def read_action(self, action: Any) -> str:
        """The action as a string."""
        return action if isinstance(action, str) else str(getattr(action, "data", action))

    def _reset(self, tensordict: Any = None, **kwargs: Any) -> Any:
        task_id = kwargs.pop("task_id", None)
        if task_id is not None:
            kwargs["options"] = {"task_id": task_id}
        return super()._reset(tensordict, **kwargs)


class _InfoReader(BaseInfoDictReader):  # type: ignore[misc]
    """Copies the keys that every environment's ``info`` has into a tensordict."""

    def __init__(self) -> None:
        numbers: dict[str, TensorSpec] = {
            "success": Bounded(0, 1, shape=(), dtype=torch.bool),
            "valid": Bounded(0, 1, shape=(), dtype=torch.bool),
            "score": Bounded(0.0, 1.0, shape=(), dtype=torch.float32),
            "turn": Bounded(0, 1 << 30, shape=(), dtype=torch.int64),
        }
        texts = {name: NonTensor((), example_data="a") for name in (*TEXTS, "admissible")}
        self._spec = Composite({**numbers, **texts}, shape=())

    @property
    def info_spec(self) -> Composite:
        """What is read."""
        return self._spec

    def __call__(self, info: dict[str, Any], tensordict: Any) -> Any:
        for name in TEXTS:
            tensordict.set_non_tensor(name, info[name])
        tensordict.set_non_tensor("admissible", list(info["admissible"]))
        for name in NUMBERS:
            tensordict.set(name, torch.as_tensor(info[name], dtype=self.info_spec[name].dtype))
        return tensordict
