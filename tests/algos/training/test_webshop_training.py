"""A few steps of ATOD in the built-in shop, with the models that come with the project."""

import json

import gymnasium as gym
import pytest
from reference import play_panel

import atod_envs
from agents.chat import ChatFormat
from agents.models import REFERENCE, load_model, require_same_tokenizer
from atod_algos.atod import ATOD
from atod_algos.training.cli import main
from atod_algos.training.config import builtin_profile
from atod_algos.training.demonstrations import demonstrate
from atod_envs.prompting import prompted

pytestmark = pytest.mark.slow

ENV = "atod/WebShop-v0"
PROFILE = builtin_profile(ENV)
atod_envs.register()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """The shop is built in a temporary folder, never in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATOD_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("WEBSHOP_DATA", raising=False)
        yield


def shop(split="test"):
    return gym.make(ENV, data="builtin", split=split, nouns="rules", max_turns=PROFILE["max_turns"])


def test_the_reference_models_are_a_student_and_a_teacher():
    student, teacher = (load_model("builtin", role, world="webshop") for role in ("student", "teacher"))
    require_same_tokenizer(student, teacher, "teacher")
    assert student.n_parameters == teacher.n_parameters < 1_000_000
    weak, strong = play_panel(student, ENV, 96), play_panel(teacher, ENV, 96)
    assert 0.3 < weak.success < 0.6 and strong.success > weak.success + 0.15
    assert weak.valid > 0.7, "a student speaks the language"
    assert sum(path.stat().st_size for path in (REFERENCE / "webshop").rglob("*") if path.is_file()) < 4 * 2**20


def test_a_shopping_trip_costs_few_tokens():
    """Attributes, kinds, options, thoughts and stock phrases are single tokens; nothing falls back to bytes."""
    tokenizer = load_model("builtin", "student", world="webshop").tokenizer
    shown = demonstrate(shop().unwrapped.tasks.panel(40), shop, ChatFormat(tokenizer), style="compact", seed=0)
    lengths = [len(t.turns[-1].prompt_ids) + len(t.turns[-1].response_ids) for t in shown]
    assert max(lengths) < 400 and sum(lengths) / 40 < 280
    said = {i for t in shown for turn in t.turns for i in (*turn.prompt_ids, *turn.response_ids)}
    assert not [token for token in tokenizer.convert_ids_to_tokens(sorted(said)) if token.startswith("<0x")]
    assert all(len(turn.response_ids) <= PROFILE["max_response"] for t in shown for turn in t.turns)
    assert sum(t.success for t in shown) >= 38
    for trajectory in shown[:5]:
        env = prompted(shop(), "compact")
        env.reset(seed=trajectory.seed, options={"task_id": trajectory.task_id})
        for turn in trajectory.turns:
            *_, info = env.step(tokenizer.decode(turn.response_ids[:-1]))
            assert info["action"] == turn.action and info["valid"] and info["format_ok"]


def test_atod_trains_on_it(tmp_path, capsys):
    arguments = [
        "--env", ENV, "--data", "builtin", "--steps", "2", "--tasks-per-step", "4", "--eval-every", "2", "--eval-tasks", "8",
        "--report-tasks", "8", "--minibatches", "2", "--run", str(tmp_path / "r"),
    ]  # fmt: skip
    main(ATOD, arguments)
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["episode/valid_action_ratio"] > 0.5 and row["episode/score"] > 0 for row in rows)
    result = json.loads((tmp_path / "r" / "result.json").read_text())["table"]
    assert set(result) == {"before", "last (step 2)", f"best (step {int(result_step(tmp_path))})", "teacher"}
    assert result["teacher"]["score"] > result["before"]["score"]
    assert "95 % interval" in capsys.readouterr().out


def result_step(folder):
    return json.loads((folder / "r" / "result.json").read_text())["best"]["step"]
