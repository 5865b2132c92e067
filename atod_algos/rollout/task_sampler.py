"""Which episodes a training step plays, and how often it tries to find groups that teach something.

The invariant: tasks and seeds follow from (run's seed, step, round) alone. How many rounds one step took changes
nothing about the next, so a resumed run plays what an uninterrupted one would have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

from atod_algos.algorithm import Algorithm
from atod_algos.batch import make_batch
from atod_algos.rollout.episodes import EpisodeSpec, Play, derive_seed
from atod_algos.rollout.groups import collect_groups, require_turns
from atod_envs.tasks import TaskSet
from atod_envs.trajectory import Group


class StepSampler:
    """Draws the tasks of each step.

    Args:
        tasks: the training split of each environment.
        seed: of the run.
        tasks_per_step: groups in a step.
        group_size: attempts at each task (G).
        weights: how often each environment is played; equally often unless said.
    """

    def __init__(
        self,
        tasks: Sequence[TaskSet],
        *,
        seed: int,
        tasks_per_step: int,
        group_size: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        self._tasks, self._seed = tasks, seed
        self._per_step, self._group_size = tasks_per_step, group_size
        self._weights = [Fraction(weight) for weight in weights or [1.0] * len(tasks)]
        self._had = [0] * len(tasks)
        self._dealt: list[tuple[int, int]] = []
        self._epochs: dict[int, tuple[int, tuple[str, ...]]] = {}

    def specs(self, step: int) -> list[EpisodeSpec]:
        """The episodes of a step (from 1): the next tasks of each epoch's order, each ``group_size`` times."""
        specs = []
        for place in range((step - 1) * self._per_step, step * self._per_step):
            world, number = self._deal(place)
            epoch, index = divmod(number, len(self._tasks[world]))
            if self._epochs.get(world, (-1,))[0] != epoch:
                self._epochs[world] = epoch, self._tasks[world].order(derive_seed(self._seed, "epoch", epoch))
            for member in range(self._group_size):
                seed = derive_seed(self._seed, step, place, member)
                specs.append(EpisodeSpec(self._epochs[world][1][index], f"{step}/{place}", seed, world))
        return specs

    def further_specs(self, step: int, attempt: int) -> list[EpisodeSpec]:
        """The episodes of a step's further round (from 1), of tasks drawn independently of the epoch's order."""
        seed = derive_seed(self._seed, step, "round", attempt)
        orders = [tasks.order(seed) for tasks in self._tasks]
        worlds = [self._deal((step - 1) * self._per_step + place)[0] for place in range(self._per_step)]
        specs = []
        for place, world in enumerate(worlds):
            task = orders[world][worlds[:place].count(world) % len(orders[world])]
            for member in range(self._group_size):
                group, own_seed = f"{step}/round{attempt}/{place}", derive_seed(seed, place, member)
                specs.append(EpisodeSpec(task, group, own_seed, world))
        return specs

    def _deal(self, place: int) -> tuple[int, int]:
        """The environment whose turn it is at a place of the run's list of groups, and its groups before that.

        Each place goes to the environment that is furthest behind its share, the first named of equals. So after any
        number of groups, each has had its share to within one.
        """
        while len(self._dealt) <= place:
            share = Fraction(len(self._dealt) + 1) / sum(self._weights)
            behind = [weight * share - had for weight, had in zip(self._weights, self._had, strict=True)]
            world = behind.index(max(behind))
            self._dealt.append((world, self._had[world]))
            self._had[world] += 1
        return self._dealt[place]

    def play(
        self, step: int, algorithm: Algorithm, play: Play, on_progress: Callable[[str], None]
    ) -> tuple[list[Group], dict[str, float]]:
        """Play the groups that a step learns from.

        Where the algorithm asks for several rounds, further tasks are played until there are ``tasks_per_step`` groups
        that it learns from. If the rounds run out the step goes on with those there are, or, if there is none, with the
        first round's.

        Args:
            step: training step, from 1.
            algorithm: says which limits hold and which groups are informative.
            play: plays episodes: a pool's ``play`` with split and temperature chosen.
            on_progress: told what is going on.

        Returns:
            The groups, and metrics under ``sampling/``, over all that was played; none where every group counts anyway.

        Raises:
            AtodError: not one prompt fitted the context.
        """
        limits = algorithm.limits(step)
        played: list[Group] = []
        kept: list[Group] = []
        rounds = 0
        while rounds < max(1, limits.rounds) and len(kept) < self._per_step:
            specs = self.specs(step) if rounds == 0 else self.further_specs(step, rounds)
            head = f"rollout, round {rounds + 1}:" if limits.rounds > 1 else "rollout"
            groups = collect_groups(play(specs, limits=limits, on_finish=_counter(on_progress, head, len(specs))))
            require_turns(groups)
            rounds += 1
            if limits.rounds <= 1:
                return groups, {}
            played += groups
            useful_G = algorithm.informative(make_batch(groups))
            kept += [group for group, useful in zip(groups, useful_G, strict=False) if useful]
        episodes = [trajectory for group in played for trajectory in group.trajectories]
        return kept[: self._per_step] or played[: self._per_step], {
            "sampling/rounds": float(rounds),
            "sampling/episodes": float(len(episodes)),
            "sampling/informative_groups": len(kept) / len(played),
            "sampling/success": sum(trajectory.success for trajectory in episodes) / len(episodes),
        }


def solved_at_least_once(groups: Sequence[Group], sft: str, world: str = "") -> str:
    """What a student can do before it has learned anything: how many tasks it solves at least once in k tries (pass@k).

    Args:
        groups: the first step's attempts, each at one task, played whole and chosen by nothing.
        sft: a command that trains the student on demonstrations first.
        world: the environment's name, where there are several.

    Returns:
        One sentence; where nothing was solved it says that reward alone has nothing to say, and names the command.
    """
    solved = sum(any(trajectory.success for trajectory in group.trajectories) for group in groups)
    tries = max(len(group.trajectories) for group in groups)
    tasks = f"{world} tasks" if world else "tasks"
    line = f"before training the student solves {solved} of {len(groups)} {tasks} at least once in {tries} tries (pass@{tries})"
    if solved:
        return line
    return f"{line}: reward alone has nothing to say to it where that stays so; demonstrations are a start: {sft}"


def _counter(tell: Callable[[str], None], head: str, total: int) -> Callable[[int], None]:
    tell(f"{head} of {total} episodes" if head == "rollout" else f"{head} {total} episodes")
    return lambda n: tell(f"{head} {n}/{total}")
