"""Goals, prices and splits: equality with the recordings, and no leak."""

import warnings
from collections import Counter

import pytest
from shops import item, options, write_shop

from atod_envs.errors import DataError, UnknownName
from atod_envs.webshop.catalogue.cache import open_store
from atod_envs.webshop.generate import CatalogueSpec, write_catalogue
from atod_envs.webshop.goals import Goals, combination
from atod_envs.webshop.splits import GoalIds, read_task_id, split_goals


def test_numbers_of_goals(real_store):
    assert len(Goals(real_store, "synthetic")) == 6910
    assert len(Goals(real_store, "human")) == 13


def test_goals_and_their_order_equal_the_recorded_sessions(real_store, read_golden):
    goals = Goals(real_store, "synthetic", goal_seed=0)
    sessions = read_golden("golden_text_env_1k.jsonl.gz")
    assert [s["session"] for s in sessions if goals[s["session"]].record() != s["goal"]] == []


def test_goals_equal_those_of_the_reward_recordings(real_store, read_golden):
    goals = Goals(real_store, "synthetic", goal_seed=0)
    known = {(goal.asin, goal.instruction_text): goal.record() for goal in map(goals.__getitem__, range(len(goals)))}
    wanted = [row["goal"] for row in read_golden("golden_reward_parts_1k.jsonl.gz")]
    assert [goal["asin"] for goal in wanted if known[goal["asin"], goal["instruction_text"]] != goal] == []


def test_prices_equal_the_recorded_ones(real_store, read_golden):
    goals = Goals(real_store, "synthetic", goal_seed=0)
    paid = {s["final"]["asin"]: s["final"]["price"] for s in read_golden("golden_text_env_1k.jsonl.gz") if "final" in s}
    assert len(paid) > 30
    assert {asin: float(goals.prices[real_store.rows([asin])[0]]) for asin in paid} == paid


def test_another_seed_gives_other_prices_and_the_same_order(real_store):
    ours, other = Goals(real_store, "synthetic", goal_seed=0), Goals(real_store, "synthetic", goal_seed=1)
    assert (ours.rows == other.rows).all() and (ours.prices != other.prices).any()


def test_human_goals_are_the_written_instructions(real_store, webshop_data):
    goals = Goals(real_store, "human")
    written = {real_store.human(number).text.strip(".") for number in range(len(goals))}
    for number in range(len(goals)):
        goal = goals[number]
        sentence, _, cap = goal.instruction_text.rpartition(", and price lower than ")
        assert sentence in written and float(cap.removesuffix(" dollars")) == goal.price_upper
        assert goal.weight == 1 and isinstance(goal.record()["goal_options"], list)


def test_combinations_turn_the_last_name_fastest(tmp_path):
    shop = write_shop(tmp_path / "shop", [item("B1", customization_options=options(size=["s", "m"], color=["a", "b"]))])
    store = open_store(shop)
    assert [tuple(combination(store.product(0), pick).items()) for pick in range(4)] == [
        (("color", "a"), ("size", "s")),
        (("color", "a"), ("size", "m")),
        (("color", "b"), ("size", "s")),
        (("color", "b"), ("size", "m")),
    ]
    texts = sorted(
        Goals(store, "synthetic")[number].instruction_text.rsplit(", and price", 1)[0] for number in range(4)
    )
    assert texts[0] == "Find me easy clean things with color: a, and size: m"


def test_too_many_combinations_give_no_goals(tmp_path, caplog):
    groups = {f"group {i}": [str(value) for value in range(20)] for i in range(8)}
    records = [item("B1", customization_options=options(**groups)), item("B2")]
    goals = Goals(open_store(write_shop(tmp_path / "shop", records)), "synthetic")
    assert len(goals) == 1 and goals[0].asin == "B2" and "combinations of options" in caplog.text


def test_a_dear_product_has_no_cap(tmp_path):
    goals = Goals(open_store(write_shop(tmp_path / "shop", [item("B1", pricing="$985.00")])), "synthetic")
    assert goals[0].price_upper == 1_000_000 and goals[0].instruction_text == "Find me easy clean things"


@pytest.mark.parametrize("data", ["real", "built-in"])
def test_synthetic_splits_share_no_product_title_or_instruction(data, request):
    store = request.getfixturevalue("real_store") if data == "real" else open_store()
    goals = Goals(store, "synthetic")
    sets = {split: split_goals(goals, split) for split in ("train", "dev", "test")}
    assert sum(len(tasks) for tasks in sets.values()) == len(goals)
    held = {
        split: {
            text
            for row in {int(goals.rows[read_task_id(task)[1]]) for task in tasks}
            for product in [store.product(row)]
            for text in (product.asin, product.title.lower(), product.annotation.instruction)
        }
        for split, tasks in sets.items()
    }
    assert not held["train"] & held["test"] and not held["train"] & held["dev"] and not held["dev"] & held["test"]
    assert len(sets["train"]) > 0.6 * len(goals)
    assert list(split_goals(goals, "all"))[::1000] == [f"synthetic/{number}" for number in range(0, len(goals), 1000)]


def test_human_splits_are_the_originals():
    goals = Goals(open_store(), "human")
    assert [len(split_goals(goals, split)) for split in ("test", "dev", "train")] == [500, 1000, len(goals) - 1500]
    assert split_goals(goals, "dev")[0] == "human/500"


def test_kept_tables_are_compared_with_what_was_computed(tmp_path, monkeypatch):
    monkeypatch.setenv("ATOD_CACHE", str(tmp_path / "cache"))
    write_catalogue(CatalogueSpec(30, seed=2), tmp_path / "shop")
    store = open_store(tmp_path / "shop")
    first = Goals(store, "synthetic")
    monkeypatch.setattr("atod_envs.webshop.goals._make_goals", lambda *_: pytest.fail("made again"))
    assert [Goals(store, "synthetic")[n] for n in range(9)] == [first[n] for n in range(9)]
    for path in sorted((store.folder / "tables").rglob("*.*")):
        whole = path.read_bytes()
        for changed in (whole[:-1], whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:], b""):
            path.write_bytes(changed)
            with pytest.raises(DataError, match=rf"{path.name}.*delete the folder to have it built anew"):
                Goals(store, "synthetic")
        path.write_bytes(whole)


def test_an_empty_split_is_refused(real_store):
    with pytest.raises(DataError, match="13 human goals"):
        split_goals(Goals(real_store, "human"), "train")


def test_verl_agent_split_leaks_and_says_so(real_store):
    goals = Goals(real_store, "synthetic")
    with pytest.warns(UserWarning, match="leak"):
        train = split_goals(goals, "train", "verl-agent")
    with pytest.warns(UserWarning, match="leak"):
        test = split_goals(goals, "test", "verl-agent")
    assert (len(train), len(test)) == (16 * 6410, 128 * 500)
    assert train[0] == "synthetic/0/500" and test[-1] == "synthetic/1127/499"
    assert "synthetic/15/6909" in train and "synthetic/16/500" not in train and "synthetic/0/499" not in train

    def wanted(worker, numbers):
        played = Goals(real_store, "synthetic", worker, worker)
        return [(goal.asin, tuple(goal.goal_options.items())) for goal in map(played.__getitem__, numbers)]

    validation = set(wanted(1000, range(500)))
    training = Counter(goal in validation for goal in wanted(0, range(500, 6910)))
    assert training[True] > 400  # most validation goals of one worker are training goals of another


def test_unknown_names_are_refused(real_store):
    goals = Goals(real_store, "synthetic")
    with pytest.raises(UnknownName, match="train"):
        split_goals(goals, "validation")
    with pytest.raises(UnknownName, match="disjoint"):
        split_goals(goals, "train", "random")
    with pytest.raises(UnknownName, match="dev"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        split_goals(goals, "dev", "verl-agent")
    with pytest.raises(UnknownName, match="human"):
        Goals(real_store, "robot")


def test_ids_made_on_demand_behave_like_a_list():
    import numpy as np

    ids = GoalIds("synthetic", np.array([2, 5, 9]), range(3, 5))
    listed = list(ids)
    assert listed == [
        "synthetic/3/2",
        "synthetic/3/5",
        "synthetic/3/9",
        "synthetic/4/2",
        "synthetic/4/5",
        "synthetic/4/9",
    ]
    assert [ids[i] for i in range(-6, 6)] == listed * 2 and ids[1:3] == tuple(listed[1:3])
    assert all(task in ids for task in listed)
    for stranger in (
        "synthetic/3/3",
        "synthetic/5/2",
        "human/3/2",
        "synthetic/2",
        "synthetic/3/02",
        "synthetic/³/2",
        3,
    ):
        assert stranger not in ids
    with pytest.raises(IndexError):
        ids[6]
