"""Each algorithm does what it is for: short seeded runs of the reference models on games of the built-in household.

Few games, because a step then plays the same ones as the step before, and what changes is the student.
"""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch
from toy import WORDS, ToyEnv
from toyworld import fit

from agents.chat import ChatFormat
from agents.models import REFERENCE, load_model
from atod_algos.advantages import GroupOptions
from atod_algos.atod import ATOD
from atod_algos.grpo import GRPO
from atod_algos.opd import OPD
from atod_algos.sdar import HEADING, SDAR
from atod_algos.sod import SOD
from atod_algos.tcod import TCOD
from atod_algos.training.config import BUILTIN, TrainConfig, resolve
from atod_algos.training.console import Progress
from atod_algos.training.run_dir import RunFolder, settings_of
from atod_algos.training.trainer import Trainer
from atod_envs.alfworld.env import ALFWorldEnv
from atod_envs.skills import read_skills
from atod_envs.tasks import TaskSet

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (REFERENCE / "alfworld" / "student").is_dir(), reason="no reference models"),
]

EASY = (
    "pick_clean_then_place_in_recep-Apple-None-DiningTable-503",
    "pick_heat_then_place_in_recep-Apple-None-Fridge-529",
    "pick_cool_then_place_in_recep-Potato-None-SideTable-541",
    "pick_clean_then_place_in_recep-Apple-None-CounterTop-504",
)
"""Games that the reference student solves in a quarter to three quarters of its attempts."""
HARD = (
    "pick_two_obj_and_place-Apple-None-CounterTop-521",
    "pick_two_obj_and_place-Cloth-None-Desk-533",
    "pick_two_obj_and_place-Apple-None-DiningTable-547",
)
"""Games that it hardly ever solves."""


class FewGames(ALFWorldEnv):
    def __init__(self, *, games, data=None, split="train", max_turns=None):
        super().__init__("builtin", "train", max_turns=max_turns)
        chosen = [next(i for i in self.tasks if f"/{game}/" in i) for game in games]
        self.tasks = TaskSet(split, chosen)


class HintedToy(ToyEnv):
    """The toy world, in which each word is a kind of task."""

    def _begin(self, task_id, seed):
        task, frame = super()._begin(task_id, seed)
        return task, dataclasses.replace(frame, extra={"kind": self.word})

    def _act(self, action):
        return dataclasses.replace(super()._act(action), extra={"kind": self.word})


if "signals/Toy-v0" not in gym.registry:
    gym.register("signals/Toy-v0", entry_point=HintedToy, disable_env_checker=True)
for name, games in (("Easy", EASY), ("Mixed", (*HARD, EASY[0]))):
    if f"signals/{name}-v0" not in gym.registry:
        gym.register(f"signals/{name}-v0", entry_point=FewGames, kwargs={"games": games}, disable_env_checker=True)


@pytest.fixture
def learn(tmp_path):
    """Train in this process; gives the trainer and the metrics of its steps."""
    torch.set_num_threads(1)
    trainers = []

    def run(algorithm, steps, env="signals/Easy-v0", **changes):
        settings = (
            BUILTIN | {"max_turns": 14, "tasks_per_step": 4, "group_size": 12, "lr": 1e-3, "eval_every": 0} | changes
        )
        config = TrainConfig(
            env=env,
            steps=steps,
            minibatches=2,
            warmup_steps=2,
            eval_tasks=1,
            store="nothing",
            checkpoint_every=10**6,
            **settings,
        )
        config = resolve(config)
        folder = RunFolder(tmp_path / f"run{len(trainers)}", settings_of(config, algorithm, "paper"))
        trainer = Trainer(config, algorithm, folder)
        trainers.append(trainer)
        trainer.fit(Progress(steps, "test"))
        return trainer, folder.metrics()

    yield run
    for trainer in trainers:
        trainer.close()


def column(rows, name):
    return np.array([row[name] for row in rows])


def test_opd_lowers_the_gap_to_the_teacher(learn):
    _, rows = learn(OPD(), 8)
    gap = column(rows, "opd/raw_kl_mean")
    assert gap[-2:].mean() < 0.75 * gap[:2].mean()


def test_grpo_raises_reward_without_a_teacher(learn):
    trainer, rows = learn(GRPO(), 6)
    reward = column(rows, "episode/reward/mean")
    assert "teacher" not in trainer.algorithm.scores
    assert reward[-2:].mean() > reward[0] + 1.5


def test_atod_goes_from_the_teacher_to_reward(learn):
    """A teacher that is given the larger term at first is annealed away, and then reward's is the larger one."""
    _, rows = learn(ATOD(kappa_init=5.0, coef_anneal_steps=5), 6, env="signals/Mixed-v0")
    ratio = column(rows, "atod/opd_rl_ratio")
    assert ratio[0] > 1 > ratio[-1]
    assert (np.diff(column(rows, "atod/kl_coef")) <= 0).all() and (np.diff(column(rows, "atod/rl_coef")) >= 0).all()


def test_sod_believes_the_teacher_less_where_they_have_drifted_apart(learn):
    _, rows = learn(SOD(), 1)
    turns = [f"turn_{k}" for k in range(1, 14)]
    gap = np.array([rows[0][f"sod_turn/disagreement/{turn}"] for turn in turns])
    weight = np.array([rows[0][f"sod_turn/weight/{turn}"] for turn in turns])
    assert np.corrcoef(gap, weight)[0, 1] < -0.5
    assert rows[0]["sod_turn/weight/turn_0"] == 1.0


def test_tcods_window_grows_in_training_only(learn):
    _, rows = learn(TCOD(turns_every=1), 4, eval_every=2)
    assert column(rows, "tcod/window").tolist() == column(rows, "episode/length/mean").tolist() == [1, 2, 3, 4]
    assert min(rows[1]["val/length"], rows[3]["val/length"]) > 4  # the shortest of these games takes longer


def test_tcods_expert_hands_over_earlier_and_earlier(learn):
    """The closer to its end an episode is taken over, the more often the student brings it there."""
    _, rows = learn(TCOD(turns_every=1, curriculum="back_to_front"), 6)
    ahead, success = column(rows, "tcod/expert_turns_mean"), column(rows, "episode/success")
    assert (np.diff(ahead) == -1).all() and ahead[-1] > 0
    assert success[0] > 0.9 and success[0] > success[-1] + 0.1


def test_sdars_gate_opens(learn, models, tokenizer, tmp_path):
    """A student that would do better with a hint becomes what it would be with it, playing without, earning nothing."""
    skills = tmp_path / "skills.md"
    skills.write_text("# General\n\nSpeak.\n\n" + "".join(f"## {word}\n\nYou say {word}.\n\n" for word in WORDS))
    algorithm = SDAR(group=GroupOptions(reward_scale=0.0), sdar_coef=1.0, skills=str(skills))
    # Teach it to follow the hint, whatever the task says: without the hint it knows as little as before.
    student, chat = load_model(str(models["student"]), "student"), ChatFormat(tokenizer)
    book = read_skills(skills)
    prompts, responses = [], []
    for task in WORDS:
        for hint in WORDS:
            told = chat.encode(f"{HEADING}\n{book.text_for(hint)}\n\n")
            prompts.append(told + chat.opening(f"say {task}: Speak (0)."))
            responses.append(chat.encode_response(f"<think>x</think><action>{hint}</action>"))
    fit(student.model, prompts, responses, 200)
    folder = tmp_path / "student"
    student.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    toy = {"max_turns": 1, "max_response": 8, "max_context": 128, "lr": 2e-3}
    _, rows = learn(algorithm, 8, env="signals/Toy-v0", student=str(folder), **toy)
    gate, success = column(rows, "sdar/gate_mean"), column(rows, "episode/success")
    assert gate[-3:].mean() > gate[0] + 0.02
    assert success[-3:].mean() > success[0] + 0.3
