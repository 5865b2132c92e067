"""How the scripted shopper does on all goals, compared with the most that any purchase could reach, and where it fails.

    python benchmarks/webshop_expert.py --data /path/to/webshop  # official files: 6,910 goals with 1,000 products
    python benchmarks/webshop_expert.py --split test --brief     # the built-in shop, with the queries that are taught

The shopper sees pages only; the ceilings see everything.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

from atod_envs.webshop.catalogue.product import Product
from atod_envs.webshop.env import WebShopEnv
from atod_envs.webshop.expert import TURNS, WebShopExpert
from atod_envs.webshop.reward import count_options, score_purchase


class Ceiling:
    """Whether anything in the shop could score 1 for a goal.

    Args:
        env: the shop.
    """

    def __init__(self, env: WebShopEnv) -> None:
        self._shop = env.shop
        self._products = [env.shop.store.product(row) for row in range(len(env.shop.store))]
        self._alike: dict[tuple[str, str], list[int]] = {}

    def rows(self, env: WebShopEnv) -> list[int]:
        """Rows of the products that score 1 with the right choices for the episode's goal; its own product first."""
        session = env.session
        assert session is not None
        goal, prices = session.goal, session.goals.prices
        own = self._shop.store.rows([goal.asin])[0]

        def perfect_but_for_price(row: int) -> bool:
            wanted = dict(goal.goal_options) if isinstance(goal.goal_options, dict) else {}
            product = self._products[row]
            chosen = _choose(product, wanted)
            if chosen is None:
                return False
            parts = score_purchase(product, chosen.values(), 0.0, goal, self._shop.nouns)
            return parts.reward == 1.0

        if perfect_but_for_price(own) and prices[own] <= goal.price_upper:
            return [own]
        # Kind and attributes depend on the goal's product alone, and rule out nearly everything.
        key = (goal.asin, goal.instruction_text.partition(" with ")[0])
        if key not in self._alike:
            self._alike[key] = [
                row
                for row, product in enumerate(self._products)
                if (parts := score_purchase(product, (), 0.0, goal, self._shop.nouns)).type.r_type == 1.0
                and parts.r_att == 1.0
            ]
        return [row for row in self._alike[key] if prices[row] <= goal.price_upper and perfect_but_for_price(row)]


def _choose(product: Product, wanted: dict[str, str]) -> dict[str, str] | None:
    """One value for each of a product's options, such that all wanted ones match; None if there is no such choice."""

    def extend(names: list[str], chosen: dict[str, str]) -> dict[str, str] | None:
        if not names:
            return chosen
        asked = {names[0]: wanted[names[0]]}
        for option, values in product.options.items():
            for value in values:
                if chosen.get(option, value) == value and count_options([value], asked):
                    found = extend(names[1:], {**chosen, option: value})
                    if found is not None:
                        return found
        return None

    return extend(list(wanted), {})


def shop(env: WebShopEnv, task: str, expert: WebShopExpert) -> tuple[bool, float, int, str]:
    """Play one task; success, score, turns, and what went wrong."""
    observation, info = env.reset(options={"task_id": task})
    session = env.session
    assert session is not None
    own, shown, opened, turns = session.goal.asin.lower(), False, False, 0
    expert.reset(info["task"], observation, info["admissible"])
    while True:
        action = expert.act(observation, info["admissible"]).action
        opened |= action == f"click[{own}]"
        observation, _, terminated, truncated, info = env.step(action)
        turns += 1
        shown |= f"click[{own}]" in info["admissible"]
        if terminated or truncated:
            break
        expert.observe(action, observation, info["admissible"])
    bought = info.get("webshop/purchase")
    if bought is None:
        cause = "nothing bought"
    elif bought["asin"].lower() == own:
        cause = "its product bought, something wrong with it"
    else:
        cause = "opened, another bought" if opened else "listed, not opened" if shown else "never listed"
    return info["success"], info["score"], turns, cause


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="the official files, or builtin (default: as the environment)")
    parser.add_argument("--split", default="all", help="default: %(default)s")
    parser.add_argument("--turns", type=int, default=TURNS, help="turn limit (default: %(default)s)")
    parser.add_argument("--brief", action="store_true", help="ask as demonstrations do")
    parser.add_argument("--every", type=int, default=1, help="play every n-th goal (default: %(default)s)")
    options = parser.parse_args(arguments)
    env = WebShopEnv(options.split, data=options.data, max_turns=options.turns)
    ceiling, expert = Ceiling(env), WebShopExpert(options.turns, brief=options.brief)
    solved = score = turns = solvable = elsewhere = n = 0
    causes: Counter[str] = Counter()
    for place in range(0, len(env.tasks), options.every):
        success, reached, needed, cause = shop(env, env.tasks[place], expert)
        n, solved, score, turns = n + 1, solved + success, score + reached, turns + needed
        perfect = ceiling.rows(env) if not success else [0]
        solvable += bool(perfect)
        elsewhere += bool(perfect) and not success and _asin(env, perfect[0]) != env.session.goal.asin  # type: ignore[union-attr]
        if not success:
            causes[cause if perfect else "no purchase scores 1"] += 1
    for name, value in (
        ("solved", solved / n), ("score", score / n), ("could be solved by any purchase", solvable / n),
        ("of those, solved", solved / solvable),
    ):  # fmt: skip
        sys.stdout.write(f"{100 * value:8.2f} %  {name}\n")
    sys.stdout.write(
        f"{n:8,}    goals\n{turns / n:8.2f}    turns\n{elsewhere:8,}    unsolved ones that only another product would solve\n"
    )
    for name, count in causes.most_common():
        sys.stdout.write(f"{count:8,}    {name}\n")
    return 0


def _asin(env: WebShopEnv, row: int) -> str:
    return env.shop.store.product(row).asin


if __name__ == "__main__":
    raise SystemExit(main())
