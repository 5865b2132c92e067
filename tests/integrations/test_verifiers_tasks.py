"""verifiers' tasksets and environments as ours: the real library's tasks, rewards and runs."""

from functools import partial

import gymnasium as gym
import pytest

vf = pytest.importorskip(
    "verifiers.v1", reason="verifiers is not installed (extra 'verifiers'; not together with openenv)"
)
import atod_verifiers
from agents.expert import expert_for
from atod_envs.checker import check_text_env
from atod_envs.errors import AtodError
from atod_envs.integrations import register, wrap
from atod_envs.integrations.verifiers_tasks import TasksetGame
from atod_envs.prompting import prompted
from atod_envs.styles import as_conversation, phrase_response


class SumData(vf.TaskData):
    answer: int


class SumTask(vf.Task[SumData]):
    @vf.reward(weight=0.75)
    async def right(self, task, trace) -> float:
        return float(trace.last_reply == str(task.answer))

    @vf.reward(weight=0.25)
    async def short(self, trace) -> float:
        return float(len(trace.last_reply) < 4)


class Sums(vf.Taskset[SumTask, vf.TasksetConfig]):
    made = SumTask

    def load(self):
        for n in range(40):
            prompt = f"{n} + {n + 1} = ?"
            yield self.made(SumData(name=f"sum-{n}", prompt=prompt, system_prompt="Say a number.", answer=2 * n + 1))


def sums(kind=SumTask, **config):
    taskset = Sums(vf.TasksetConfig(id="sums", **config))
    taskset.made = kind
    return taskset


def test_a_plain_taskset_is_one_prompt_and_one_reply_with_its_own_rewards():
    env = wrap(partial(TasksetGame, sums()), key="sums", about="sums")
    seen = {}
    for split in ("train", "valid", "test"):
        own = wrap(partial(TasksetGame, sums()), key="sums", split=split)
        seen[split] = {own.reset(seed=0, options={"task_id": task})[0] for task in tuple(own.tasks)[:60]}
    assert sum(map(len, seen.values())) == 40 and not set.intersection(*seen.values())
    for right, said, reward in ((True, "{}", 1.0), (False, "no", 0.25), (False, "nothing", 0.0)):
        message, info = env.reset(seed=0, options={"task_id": "train-3"})
        assert message.startswith("Say a number.\n\n") and message.endswith("= ?")
        first = int(message.split("\n\n")[1].split()[0])
        _, got, terminated, truncated, info = env.step(said.format(2 * first + 1))
        assert (got, info["success"], terminated, truncated) == (reward, right, True, False)
    again = [env.reset(seed=7, options={"task_id": "train-3"})[0] for _ in range(2)]
    assert again == [message, message], "an episode that was left is forgotten"
    assert env.unwrapped.data_version == f"sums/{__name__}.Sums/40"
    env.close()


def test_our_checker_finds_nothing_to_say():
    register("riddles/Sums-v0", partial(TasksetGame, sums()), key="sums")
    env = gym.make("riddles/Sums-v0")
    check_text_env(env)
    env.close()


def test_an_environment_of_several_turns_is_the_world_it_wraps():
    """The project's own verifiers environment, wrapped back: the same messages, the same reward as the world itself."""
    taskset = {
        "id": "atod_verifiers",
        "environment": "atod/ALFWorld-v0",
        "style": "compact",
        "options": {"data": "builtin"},
    }
    environment = atod_verifiers.AtodEnv(atod_verifiers.AtodEnv.__orig_bases__[0].__args__[0](taskset=taskset))
    env = wrap(partial(TasksetGame, environment=environment), key="wrapped", max_turns=60)
    message, _ = env.reset(seed=0, options={"task_id": "train-0"})
    task = env.unwrapped._foreign._trace.task.data
    world = prompted(gym.make("atod/ALFWorld-v0", data="builtin"), "compact")
    world.style = as_conversation(world.style)
    shown, about = world.reset(seed=task.seed, options={"task_id": task.task_id})
    assert message == shown
    expert = expert_for(world)
    expert.reset(about["observation"], about)
    for _ in range(60):
        response = phrase_response(world.style, expert.act().action, "", world.history)
        message, reward, over, _, info = env.step(response)
        shown, earned, ended, _, about = world.step(response)
        expert.observe(about["action"], about["observation"], about)
        assert (over, reward) == (ended, earned if ended else 0.0)
        if over:
            break
        assert message == shown
    assert over and info["success"] and reward == 1.0 and about["success"]
    env.close()


class Boxed(SumTask):
    NEEDS_CONTAINER = True


class Prepared(SumTask):
    async def setup(self, trace, runtime):
        pass


class Ran(SumTask):
    @vf.reward
    async def ran(self, runtime) -> float:
        return 1.0


class Stopped(SumTask):
    @vf.stop
    async def enough(self, trace) -> bool:
        return False


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Boxed, "Boxed sum-\\d+ needs a container"),
        (Prepared, "Prepared sum-\\d+ needs setup in a runtime"),
        (Ran, "needs a runtime for ran"),
        (Stopped, "needs stop conditions"),
    ],
)
def test_what_needs_more_than_text_is_refused_by_name(kind, words):
    env = wrap(partial(TasksetGame, sums(kind)), key="sums")
    with pytest.raises(AtodError, match=words):
        env.reset(seed=0, options={"task_id": "train-0"})


def test_several_agents_endless_and_empty_tasksets_are_refused():
    class Endless(Sums):
        INFINITE = True

    with pytest.raises(AtodError, match="Endless has no end; bound it with take"):
        TasksetGame(Endless(vf.TasksetConfig(id="sums")))
    with pytest.raises(AtodError, match="no task in split"):
        wrap(partial(TasksetGame, sums().take(1)), key="sums", split="test").reset(seed=0)
        wrap(partial(TasksetGame, sums().take(1)), key="sums", split="train").reset(seed=0)

    class Two:
        taskset = sums()
        config = (("user", vf.AgentConfig()), ("assistant", vf.AgentConfig()))

    with pytest.raises(AtodError, match="Two has 2 agents \\(user, assistant\\)"):
        TasksetGame(environment=Two())
    with pytest.raises(AtodError, match="give a verifiers taskset"):
        TasksetGame()
