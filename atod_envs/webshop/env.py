"""``WebShopEnv``: WebShop as a Gymnasium environment.

An action is ``search[words]`` or ``click[text]``; the reward is the original's, in [0, 1], paid at the purchase that
ends the episode. The invariant: an episode is a function of the catalogue, the seeds of its goals, the task id and the
episode's seed, and any text can be an action.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from atod_envs.errors import UnknownName
from atod_envs.snapshots import Snapshot
from atod_envs.styles import PromptStyle
from atod_envs.text_env import Frame, TextEnv
from atod_envs.webshop.catalogue.cache import open_store
from atod_envs.webshop.catalogue.store import Store
from atod_envs.webshop.goals import GoalKind, Goals
from atod_envs.webshop.nouns import noun_finder
from atod_envs.webshop.prompts import SEARCH_PATTERN, STYLES
from atod_envs.webshop.shop import OBSERVATION_MODES, SEARCH_ENGINES, ObservationMode, SearchEngine, Shop, ShopSession
from atod_envs.webshop.splits import SplitStyle, read_task_id, split_goals


class WebShopEnv(TextEnv):
    """Buy the product that an instruction describes.

    Args:
        split: ``"train"``, ``"dev"``, ``"test"``, or ``"all"`` for every goal.
        data: folder with the official files, or an items file, or a built store; ``None`` takes ``$WEBSHOP_DATA`` if it
            is set, else the built-in catalogue.
        goals: ``"synthetic"`` or ``"human"`` instructions.
        split_style: ``"disjoint"``, or ``"verl-agent"`` for the published protocol, which leaks.
        goal_seed: seed of prices and price caps; the original leaves it to chance.
        observation_mode: ``"text"`` or ``"text_rich"``.
        search: ``"bm25"``, or ``"lucene"`` for the real thing (needs the ``lucene`` extra).
        show_attributes: item pages have an ``Attributes`` tab.
        nouns: ``"spacy"`` or ``"rules"`` for the nouns of titles in the reward; ``"auto"`` takes spaCy where its model
            is installed (extra ``nouns``). Which one scored is part of ``data_version``, because it decides rewards.
        max_turns: turn limit; ``None`` for 15.
        render_mode: ``"ansi"`` or ``None``.

    Raises:
        DataError: data is missing or broken, or the split is empty.
        UnknownName: an argument that is not among those listed.
    """

    env_key: ClassVar[str] = "webshop"
    default_max_turns: ClassVar[int] = 15
    label: ClassVar[str] = "category"
    splits: tuple[str, str, str] = ("train", "dev", "test")

    def __init__(
        self,
        split: str = "train",
        *,
        data: str | os.PathLike[str] | None = None,
        goals: GoalKind = "synthetic",
        split_style: SplitStyle = "disjoint",
        goal_seed: int = 0,
        observation_mode: ObservationMode = "text",
        search: Literal["bm25", "lucene"] = "bm25",
        show_attributes: bool = False,
        nouns: Literal["auto", "spacy", "rules"] = "auto",
        max_turns: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        if observation_mode not in OBSERVATION_MODES:
            raise UnknownName("observation mode", observation_mode, OBSERVATION_MODES)
        store = open_store(data)
        self._goals = _goals(store, goals, goal_seed, None)
        super().__init__(split_goals(self._goals, split, split_style), max_turns=max_turns, render_mode=render_mode)
        self.nouns = noun_finder(nouns).name
        self.data_version = f"{store.name}/{goals}-{goal_seed}/{self.nouns}"
        self.shop = _shop(store, search, show_attributes, nouns)
        self.observation_mode: ObservationMode = observation_mode
        self.session: ShopSession | None = None

    def prompt_styles(self) -> Mapping[str, PromptStyle]:
        """``"atod"``, the paper's, and ``"compact"``."""
        return STYLES

    def _begin(self, task_id: str, seed: int) -> tuple[str, Frame]:
        self.session = self._enter(task_id, seed)
        return self.session.goal.instruction_text, self._frame_now(self.session, valid=True)

    def _enter(self, task_id: str, seed: int) -> ShopSession:
        worker, number = read_task_id(task_id)
        goals = self._goals if worker is None else _goals(self.shop.store, self._goals.kind, worker, worker)
        return ShopSession(self.shop, goals, goals[number], str(number), seed)

    def save_state(self) -> Any:
        """The customer's visit."""
        assert self.session is not None  # TextEnv refuses a snapshot before reset
        return self.session.moment()

    def load_state(self, snapshot: Snapshot) -> None:
        """Go back to a moment of a visit."""
        self.session = self._enter(snapshot.task_id, snapshot.seed)
        self.session.return_to(snapshot.state)

    def _act(self, action: str) -> Frame:
        session = self.session
        assert session is not None  # TextEnv refuses a step before reset
        return self._frame_now(session, valid=session.act(action))

    def _frame_now(self, session: ShopSession, valid: bool) -> Frame:
        searchable = session.page.searchable
        clickables = tuple(session.clickables)
        admissible = tuple([f"click[{text}]" for text in clickables if text and text != "search"])
        page = {"url": session.url, "has_search_bar": searchable, "clickables": clickables}
        extra: dict[str, object] = {"category": session.goal.category, "page": page}
        reward = 0.0
        if session.purchase is not None:
            bought = session.purchase
            reward = bought.parts.reward
            extra["purchase"] = {
                "asin": bought.product.asin,
                "options": bought.options,
                "price": bought.price,
                "r_type": bought.parts.type.r_type,
                "query_match": bought.parts.type.query_match,
                "category_match": bought.parts.type.category_match,
                "title_score": bought.parts.type.title_score,
                "nouns": self.nouns,
                "r_att": bought.parts.r_att,
                "r_option": bought.parts.r_option,
                "r_price": bought.parts.r_price,
            }
        return Frame(
            observation=session.observe(self.observation_mode),
            admissible=(SEARCH_PATTERN, *admissible) if searchable else admissible,
            reward=reward,
            score=reward,
            success=reward == 1.0,
            terminated=session.purchase is not None,
            valid=valid,
            extra=extra,
        )


@functools.lru_cache(maxsize=256)
def _goals(store: Store, kind: GoalKind, goal_seed: int, shuffle_seed: int | None) -> Goals:
    return Goals(store, kind, goal_seed) if shuffle_seed is None else Goals(store, kind, goal_seed, shuffle_seed)


@functools.lru_cache(maxsize=8)
def _shop(store: Store, search: str, show_attributes: bool, nouns: str) -> Shop:
    """One shop for all environments of a process that want the same."""
    return Shop(store, _engine(store, search), noun_finder(nouns).find, show_attributes)


def _engine(store: Store, search: str) -> SearchEngine:
    if search == "bm25":
        return store.index
    if search == "lucene":
        from atod_envs.retrieval.lucene import LuceneIndex

        folder = store.folder / "lucene"
        if not (folder / "index.json").is_file():
            products = map(store.product, range(len(store)))
            LuceneIndex.build(((p.asin, p.contents()) for p in products), folder)
        return LuceneIndex(folder)
    raise UnknownName("search engine", search, SEARCH_ENGINES)
