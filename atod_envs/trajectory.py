"""Turn, Trajectory, Group: the one schema in which episodes are kept, as JSON lines or Parquet.

The invariant: token ids and log-probs are the ones that the engine saw and sampled, stored at sampling time and never
rebuilt from text; what is written reads back equal, bit for bit. A file says which version of the schema it holds, and
a reader refuses a version that it does not know.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from math import isfinite
from pathlib import Path
from typing import IO, Any, cast

from atod_envs.errors import DataError
from atod_envs.files import json_lines, parquet_rows, written_aside

SCHEMA = 1
"""Version of the schema below; raised whenever a field changes its meaning."""


class StopReason(StrEnum):
    """Each way an episode can end."""

    SUCCESS = "success"
    """The world ended the episode and the task is solved."""
    FAILURE = "failure"
    """The world ended the episode and the task is not solved (a wrong purchase, a wrong answer)."""
    TURN_LIMIT = "turn_limit"
    """The turn limit was reached."""
    CONTEXT_LIMIT = "context_limit"
    """The next prompt would not have fitted the policy's context window; set by the rollout."""
    ABORTED = "aborted"
    """The rollout was stopped from outside; such a trajectory is not trained on."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One response of the policy and what the environment made of it.

    Attributes:
        index: position in the episode, from 0.
        observation: the environment's own text that was answered.
        admissible: actions that would have had an effect.
        prompt_ids: token ids that the engine was given; empty for a policy without tokens.
        response_ids: token ids that it sampled, the stop token included.
        logprobs: log-probability of each sampled token at sampling time, natural logarithm; as long as
            ``response_ids``.
        response: the response as text.
        action: what the environment executed.
        format_ok: the response had the form that the prompt asks for.
        valid: the environment understood the action.
        reward: the environment's reward for this turn, in [0, 1].
        seconds_policy: time until the policy had answered.
        seconds_env: time of the environment's step.
    """

    index: int
    observation: str
    admissible: tuple[str, ...]
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    response: str
    action: str
    format_ok: bool
    valid: bool
    reward: float
    seconds_policy: float = 0.0
    seconds_env: float = 0.0

    def __post_init__(self) -> None:
        if len(self.logprobs) != len(self.response_ids):
            raise ValueError(f"turn {self.index}: {len(self.logprobs)} log-probs for {len(self.response_ids)} tokens")


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One episode.

    Attributes:
        env_id: the environment's registered id.
        task_id: which task was played.
        split: the split that it belongs to.
        task: the instruction, as text.
        group_id: groups the attempts at one task that are compared with each other.
        seed: seed of the episode.
        turns: the turns in order; may be empty if the first prompt did not fit.
        final_observation: what the environment said last, unanswered.
        success: the task was solved.
        score: how much of it was done, in [0, 1].
        stop_reason: why the episode ended.
        policy_version: version of the weights that sampled; -1 for a policy without weights.
        labels: what evaluation groups by, e.g. ``{"alfworld/task_type": ...}``.
        data_version: what the tasks were made of; empty if the environment does not say, or in files of older versions.
        schema: version of this schema.
    """

    env_id: str
    task_id: str
    split: str
    task: str
    group_id: str
    seed: int
    turns: tuple[Turn, ...]
    final_observation: str
    success: bool
    score: float
    stop_reason: StopReason
    policy_version: int = -1
    labels: Mapping[str, str] = field(default_factory=dict)
    data_version: str = ""
    schema: int = SCHEMA

    @property
    def reward(self) -> float:
        """Sum of the turns' rewards, undiscounted, on the environment's scale."""
        return float(sum(turn.reward for turn in self.turns))

    @property
    def n_tokens(self) -> int:
        """Number of sampled tokens."""
        return sum(len(turn.response_ids) for turn in self.turns)


@dataclass(frozen=True, slots=True)
class Group:
    """Several attempts at the same task, compared with each other by group-relative advantages."""

    task_id: str
    trajectories: tuple[Trajectory, ...]

    def __post_init__(self) -> None:
        strangers = {t.task_id for t in self.trajectories} - {self.task_id}
        if strangers:
            raise ValueError(f"group of task {self.task_id!r} holds a trajectory of task {strangers.pop()!r}")


# --- as plain records ---------------------------------------------------------------------------------------------


def to_record(trajectory: Trajectory) -> dict[str, Any]:
    """Lay a trajectory out as JSON-compatible values.

    A turn's prompt usually begins with the whole previous turn. ``prompt_shared`` counts the leading ids that equal the
    previous turn's prompt and response, and only the rest is written, so that a long conversation costs linear space.

    Raises:
        ValueError: a value is not of its field's kind, so that no reader would take it.
    """
    record = {f.name: getattr(trajectory, f.name) for f in fields(trajectory)}
    record["labels"] = dict(trajectory.labels)
    record["stop_reason"] = str(trajectory.stop_reason)
    record["turns"] = []
    before: tuple[int, ...] = ()
    for turn in trajectory.turns:
        row = {f.name: getattr(turn, f.name) for f in fields(turn)}
        shared = _shared_prefix(before, turn.prompt_ids)
        row["prompt_shared"] = shared
        row["prompt_ids"] = list(turn.prompt_ids[shared:])
        for name in ("admissible", "response_ids", "logprobs"):
            row[name] = list(row[name])
        _checked(row, _TURN_KINDS)
        record["turns"].append(row)
        before = turn.prompt_ids + turn.response_ids
    _checked(record, _TRAJECTORY_KINDS)
    return record


def from_record(record: Mapping[str, Any], source: str = "record") -> Trajectory:
    """Read a trajectory back; the inverse of :func:`to_record`.

    Args:
        record: the values.
        source: where they came from, for the error message.

    Raises:
        DataError: another schema version, or a missing or unexpected field.
    """
    if not isinstance(record, Mapping):
        raise DataError(f"{source}: expected an object with a trajectory's fields, found {type(record).__name__}")
    version = record.get("schema")
    if version != SCHEMA or isinstance(version, bool):
        raise DataError(f"{source}: trajectory schema {version!r}; this version reads schema {SCHEMA}")
    try:
        values = _checked(record, _TRAJECTORY_KINDS)
        turns: list[Turn] = []
        before: tuple[int, ...] = ()
        for place, row in enumerate(values.pop("turns")):
            if not isinstance(row, Mapping):
                raise ValueError(f"turn {place} is {row!r:.40}; expected an object")
            row = _checked(row, _TURN_KINDS)
            shared = row.pop("prompt_shared")
            if row["index"] != place or not 0 <= shared <= len(before):
                raise ValueError(f"turn {place} has index {row['index']} and prompt_shared {shared} of {len(before)}")
            row["prompt_ids"] = before[:shared] + row["prompt_ids"]
            turn = Turn(**row)
            turns.append(turn)
            before = turn.prompt_ids + turn.response_ids
        values["stop_reason"] = StopReason(values["stop_reason"])
        return Trajectory(turns=tuple(turns), **values)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{source}: not a trajectory of schema {SCHEMA}: {error}; is the file damaged?") from error


_TURN_KINDS = {
    **dict.fromkeys(("index", "prompt_shared"), "whole number"),
    **dict.fromkeys(("observation", "response", "action"), "text"),
    **dict.fromkeys(("format_ok", "valid"), "true or false"),
    **dict.fromkeys(("reward", "seconds_policy", "seconds_env"), "number"),
    **dict.fromkeys(("prompt_ids", "response_ids"), "list of whole numbers"),
    **{"admissible": "list of texts", "logprobs": "list of numbers"},
}
_TRAJECTORY_KINDS = {
    **dict.fromkeys(("env_id", "task_id", "split", "task", "group_id", "final_observation"), "text"),
    **dict.fromkeys(("stop_reason", "data_version"), "text"),
    **dict.fromkeys(("seed", "policy_version", "schema"), "whole number"),
    **{"turns": "list", "success": "true or false", "score": "number", "labels": "texts by name"},
}
_SINGLE: dict[str, frozenset[type]] = {
    "whole number": frozenset({int}),
    "text": frozenset({str}),
    "true or false": frozenset({bool}),
    "number": frozenset({int, float}),
    "list": frozenset({list, tuple}),
    "texts by name": frozenset({dict}),
}


def _checked(record: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, Any]:
    """The values of known fields, lists as tuples; whatever is not of its kind is refused, not converted."""
    values = dict(record)
    for name, kind in kinds.items():
        if name not in values:
            if name in ("data_version", "labels", "policy_version", "seconds_policy", "seconds_env"):
                continue  # fields with a default, which files of older versions may lack
            raise ValueError(f"the field {name!r} is missing")
        value = values[name]
        single = kind.removeprefix("list of ").removesuffix("s") if kind.startswith("list of ") else kind
        if single is not kind:
            good = type(value) in _SINGLE["list"] and set(map(type, value)) <= _SINGLE[single]
            values[name] = tuple(value) if good else ()
        else:
            good = type(value) in _SINGLE[kind]
        if good and kind == "texts by name":
            good = all(type(text) is str for pair in value.items() for text in pair)
        if good and kind == "number":
            good = isfinite(value)
        if not good:
            raise ValueError(f"the field {name!r} is {value!r:.60}; expected {kind}")
    return values


def _shared_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    if b[: len(a)] == a:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


# --- JSON lines ---------------------------------------------------------------------------------------------------


def write_jsonl(path: str | Path, trajectories: Iterable[Trajectory]) -> None:
    """Write one trajectory a line; ``.gz`` in the name compresses (no time stamp: the same bytes each time).

    What lies there stays until all is written.

    Raises:
        ValueError: a trajectory holds a value that is not of its field's kind.
    """
    path = Path(path)
    with written_aside(path) as part, open(part, "wb") as raw:
        packed = (
            gzip.GzipFile(filename="", mode="wb", compresslevel=3, fileobj=raw, mtime=0)
            if path.suffix == ".gz"
            else None
        )
        with io.TextIOWrapper(cast("IO[bytes]", packed or raw), encoding="utf-8", newline="\n") as out:
            for trajectory in trajectories:
                # Lone surrogates (a policy can sample half a character) survive only as ASCII escapes.
                out.write(json.dumps(to_record(trajectory), ensure_ascii=True, separators=(",", ":")) + "\n")


def read_jsonl(path: str | Path) -> Iterator[Trajectory]:
    """Read trajectories one by one.

    Raises:
        DataError: a line is not a trajectory; names the file and the line.
    """
    path = Path(path)
    for number, record in json_lines(path):
        yield from_record(record, f"{path}, line {number}")


# --- Parquet ------------------------------------------------------------------------------------------------------


def _arrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow: pip install 'atod[parquet]', or write .jsonl") from error
    return pyarrow


def _parquet_schema(pa: Any) -> Any:
    turn = pa.struct(
        [
            ("index", pa.int32()),
            ("observation", pa.binary()),
            ("admissible", pa.list_(pa.binary())),
            ("prompt_shared", pa.int32()),
            ("prompt_ids", pa.list_(pa.int32())),
            ("response_ids", pa.list_(pa.int32())),
            ("logprobs", pa.list_(pa.float64())),
            ("response", pa.binary()),
            ("action", pa.binary()),
            ("format_ok", pa.bool_()),
            ("valid", pa.bool_()),
            ("reward", pa.float64()),
            ("seconds_policy", pa.float64()),
            ("seconds_env", pa.float64()),
        ]
    )
    return pa.schema(
        [
            *[(name, pa.binary()) for name in ("env_id", "task_id", "split", "task", "group_id")],
            ("seed", pa.int64()),
            ("turns", pa.list_(turn)),
            ("final_observation", pa.binary()),
            ("success", pa.bool_()),
            ("score", pa.float64()),
            ("stop_reason", pa.binary()),
            ("policy_version", pa.int64()),
            ("labels", pa.map_(pa.binary(), pa.binary())),
            ("data_version", pa.binary()),
            ("schema", pa.int32()),
        ],
        metadata={"atod.trajectory.schema": str(SCHEMA)},
    )


def write_parquet(path: str | Path, trajectories: Iterable[Trajectory]) -> None:
    """Write one trajectory a row, turns as a list of structs.

    Text is stored as UTF-8 bytes with surrogates passed through, because Arrow's strings refuse half a character, which
    a policy can sample.
    """
    pa, path = _arrow(), Path(path)
    records = []
    for trajectory in trajectories:
        record = to_record(trajectory)
        record["labels"] = list(record["labels"].items())
        records.append(map_text(record, lambda text: text.encode("utf-8", "surrogatepass")))
    try:
        table = pa.Table.from_pylist(records, schema=_parquet_schema(pa))
    except (OverflowError, pa.ArrowException) as error:
        raise ValueError(f"Parquet holds ids up to 2^31 and seeds up to 2^63 ({error}); write .jsonl") from error
    with written_aside(path) as part:
        pa.parquet.write_table(table, str(part))


def read_parquet(path: str | Path) -> Iterator[Trajectory]:
    """Read trajectories back from :func:`write_parquet`.

    Raises:
        DataError: the file is not Parquet, or holds another schema.
    """
    _arrow()
    path = Path(path)
    for number, row in parquet_rows(path, batch=64):
        where = f"{path}, row {number}"
        try:
            record = map_text(row, lambda blob: blob.decode("utf-8", "surrogatepass"), bytes)
            record["labels"] = dict(record.get("labels") or ())
        except (UnicodeDecodeError, TypeError, ValueError) as error:
            raise DataError(f"{where}: not a trajectory of schema {SCHEMA}: {error}; is the file damaged?") from error
        yield from_record(record, where)


def map_text(value: Any, change: Any, kind: type = str) -> Any:
    """Apply ``change`` to every value of type ``kind`` in nested lists, tuples and dicts (keys stay)."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: map_text(item, change, kind) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_text(item, change, kind) for item in value)
    return value
