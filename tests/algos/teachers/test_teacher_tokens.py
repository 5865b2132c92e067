"""Top-k tokens of a teacher behind a server, ours and one that answers as vLLM's does: numbers, limits, refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("uvicorn", reason="the server's packages are not installed (extra 'serve')")
from teacher_servers import Foreign, Old, Recording, serving
from toyworld import ECHO, TOY, small_model

from agents.api import ApiOptions
from agents.models import LoadedModel
from atod_algos.batch import Scores, make_batch
from atod_algos.learner.loss import TeacherTokens
from atod_algos.signals.gkd import GKD
from atod_algos.signals.sage_opd import SageOPD
from atod_algos.signals.tropd import TrOPD
from atod_algos.teachers import server
from atod_algos.teachers.local import StepScorer
from atod_algos.teachers.remote import RemoteScorer
from atod_algos.teachers.server import ServeOptions, TeacherServer, row_batch
from atod_algos.teachers.support import joined, known_only, tokens_of_rows
from atod_algos.training.config import TrainConfig, resolve
from atod_envs.errors import AtodError
from atod_envs.http.messages import Refused
from atod_envs.trajectory import Group, StopReason, Trajectory, Turn

pytestmark = pytest.mark.slow

QUICK = ApiOptions(timeout=60.0, retries=1)


@pytest.fixture
def rows(tokenizer):
    rng = np.random.default_rng(0)
    return [rng.integers(0, len(tokenizer), n) for n in (5, 40, 17, 2, 33)]


def played(ids, env=TOY, prompt=1):
    """An episode of one turn: a prompt and what was sampled after it."""
    prompt, ids = tuple(map(int, ids[:prompt])), tuple(map(int, ids[prompt:]))
    turn = Turn(0, "", (), prompt, ids, (-1.0,) * len(ids), "", "", True, True, 0.0)
    return Trajectory(env, "t", "train", "", env, 0, (turn,), "", False, 0.0, StopReason.FAILURE, labels={})


def batch_of(rows):
    return make_batch([Group("t", (played(row),)) for row in rows])


def judge(running, tokenizer, k, temperature=1.0, **more):
    return RemoteScorer(
        running.address, tokenizer, temperature=temperature, top=k, options=QUICK, wait=lambda _: None, **more
    )


def step_scores(algorithm, student, teacher, where, batch, **changes):
    """A batch's scores, with a local teacher or one behind an address."""
    config = resolve(TrainConfig(**{"env": TOY, "student": "s", "teacher": where} | changes))
    return StepScorer(config, algorithm, student, None, lambda *_: teacher, "cpu").score(batch)


def assert_same(found, expected, width):
    assert found.teacher_support_MS.shape == expected.teacher_support_MS.shape == (len(found.student_M), width)
    assert found.support_MS.dtype == np.int32 and found.teacher_support_MS.dtype == np.float32
    for name in ("student_M", "teacher_M", "teacher_support_MS"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-5, err_msg=name)
    # Ids may change places only where two of them are as likely.
    apart = found.support_MS != expected.support_MS
    values = expected.teacher_support_MS
    near = np.abs(np.diff(values, axis=1, append=-np.inf)) < 1e-5
    assert (apart <= (near | np.roll(near, 1, axis=1))).all()
    assert (np.diff(found.teacher_support_MS, axis=1) <= 0).all()


# --- our own server -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("algorithm", [GKD(support=8), TrOPD(), SageOPD()], ids=lambda a: a.name)
def test_a_served_teacher_gives_what_a_local_one_gives(algorithm, temperature, student, teacher, rows):
    batch, k = batch_of(rows), algorithm.support
    expected = step_scores(algorithm, student, teacher, "t", batch, temperature=temperature)
    with serving(Recording, teacher) as running:
        found = step_scores(algorithm, student, teacher, running.address, batch, temperature=temperature)
        assert running.asked[-2:] == [max(2, k)] * 2  # one to see whether it can, one for the rows
    assert_same(found, expected, k)


def test_only_sampled_tokens_are_kept_and_a_row_is_asked_for_once(teacher, tokenizer, rows, monkeypatch):
    monkeypatch.setattr("atod_algos.teachers.remote._REQUEST_ENTRIES", 60 * 6)
    whole = row_batch(rows)
    some = np.arange(whole.n_tokens) % 3 == 0
    batch = replace(whole, row_M=whole.row_M[some], column_M=whole.column_M[some], turn_M=whole.turn_M[some])
    with serving(Recording, teacher) as running:
        remote = judge(running, tokenizer, 5)
        assert running.asked == [5]
        all_M, everything = remote.top(whole, temperature=1.0, budget=1)
        assert running.asked == [5] * 3  # 5 + 40, and 17 + 2 + 33
        found_M, found = remote.top(batch, temperature=1.0, budget=1)
        again_M, again = remote.top(batch, temperature=1.0, budget=1)
        assert running.asked == [5] * 5
        assert remote.kept_tokens == sum(map(len, remote.kept.values())) == 2 * 97 + 5 * (92 + len(found_M))
        with pytest.raises(AtodError, match="scored at the same"):
            remote.top(batch, temperature=0.5, budget=1)
    np.testing.assert_array_equal(found_M, all_M[some])
    np.testing.assert_array_equal(found.ids_MS, everything.ids_MS[some])
    np.testing.assert_array_equal(again.logprobs_MS, everything.logprobs_MS[some])
    np.testing.assert_array_equal(again_M, found_M)


def test_ours_gives_ranks_from_two_on_and_the_own_id_always(teacher, rows):
    prompts = [row.tolist() for row in rows] + [[3]]
    with TeacherServer(teacher, ServeOptions("x", port=0)) as running:
        answers = {
            k: running.completions({"prompt": prompts, "prompt_logprobs": k})["choices"] for k in (0, 1, 2, 10**3)
        }
    assert answers[0] == answers[1] and answers[1][-1]["prompt_logprobs"] == [None]
    for k, width in ((2, 2), (10**3, teacher.model.config.vocab_size)):
        for plain, choice, prompt in zip(answers[1], answers[k], prompts, strict=True):
            assert choice["prompt_logprobs"][0] is None
            for before, at, own in zip(
                plain["prompt_logprobs"][1:], choice["prompt_logprobs"][1:], prompt[1:], strict=True
            ):
                assert next(iter(at)) == str(own)
                assert at[str(own)]["logprob"] == pytest.approx(before[str(own)]["logprob"], abs=1e-5)
                assert sorted(said["rank"] for said in at.values() if "rank" in said) == list(range(1, width + 1))
                assert len(at) in (width, width + 1)


def test_ours_bounds_an_answer(teacher, tokenizer, monkeypatch):
    with TeacherServer(teacher, ServeOptions("x", port=0)) as running:
        for status, k, said in ((400, 1025, "at most 1024 ids"), (413, 1024, "lower prompt_logprobs")):
            with pytest.raises(Refused, match=said) as no:
                running.completions({"prompt": [[1] * 200] * 10, "prompt_logprobs": k})
            assert no.value.status == status
    monkeypatch.setattr(server, "MOST_TOP", 7)
    with (
        serving(Recording, teacher) as running,
        pytest.raises(AtodError, match=r"400 prompt_logprobs is 8; this server .* or lower --support$"),
    ):
        judge(running, tokenizer, 8)


@pytest.mark.parametrize("k", [1, 8])
def test_an_older_server_of_ours_is_found_out_at_once(k, teacher, tokenizer):
    with serving(Old, teacher) as running:
        said = rf"gives 0 of the {k} most likely ids .*at place 1; .* an 'atod serve teacher' of today"
        with pytest.raises(AtodError, match=said):
            judge(running, tokenizer, k)
        assert running.asked == [max(2, k)]
        judge(running, tokenizer, 0)  # single log-probs are had from it as before


# --- a server that answers as vLLM's ------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [GKD(support=8), SageOPD()], ids=lambda a: a.name)
def test_a_server_of_vllms_gives_what_a_local_one_gives(algorithm, student, teacher, rows):
    batch = batch_of(rows)
    with serving(Foreign, teacher) as running:
        found = step_scores(algorithm, student, teacher, running.address, batch)
    assert_same(found, step_scores(algorithm, student, teacher, "t", batch), algorithm.support)


@pytest.mark.parametrize(
    ("option", "k", "quiet", "said"),
    [
        ("--support", 32, False, r"400 Requested prompt logprobs of 32.*--max-logprobs 32.*or lower --support$"),
        ("--gap-topk", 64, False, r"400 Requested prompt logprobs of 64.*--max-logprobs 64.*or lower --gap-topk$"),
        ("--support", 32, True, r"gives 20 of the 32 most likely ids .*--max-logprobs 32.*or lower --support$"),
    ],
)
def test_a_server_with_a_lower_limit_says_what_to_do(option, k, quiet, said, teacher, tokenizer):
    with serving(Foreign, teacher, quiet=quiet) as running:
        with pytest.raises(AtodError, match=said) as error:
            judge(running, tokenizer, k, top_option=option)
        assert len(running.asked) == 1 and len(str(error.value).splitlines()) == 1


def _last(change):
    def lie(places):
        change(places[-1])
        return places

    return lie


def _of_rank(place, **new):
    return _last(lambda at: next(said for said in at.values() if said["rank"] == place).update(new))


LIES = {
    "a rank is missing": (_of_rank(2, rank=None), "gives 4 of the 5 most likely ids with their ranks at place 4"),
    "ranks are texts": (_of_rank(1, rank="1"), "gives 4 of the 5"),
    "two of one rank": (_of_rank(5, rank=4), "both have rank 4|gives 4 of the 5"),
    "no log-prob": (_of_rank(1, logprob=None), "at place 4: the log-prob of id .* is None"),
    "a text": (_of_rank(1, logprob="-1"), "'-1'; expected a number"),
    "above zero": (_of_rank(1, logprob=0.7), "0.7; expected a number"),
    "out of order": (_of_rank(1, logprob=-50.0), "do not fall with the rank"),
    "too much of it": (_last(lambda at: [said.update(logprob=-0.1) for said in at.values()]), "add up to 4.5"),
    "an id that is none": (_last(lambda at: at.update({"x": {"logprob": -1.0, "rank": 1}})), "'x'.* is no id"),
    "a bare number": (_last(lambda at: at.update({"99999": -1.0})), "'99999'.* is no id with its log-prob"),
    "an id out of reach": (_last(lambda at: at.update({"99999999999": at.popitem()[1]})), "are no 5 ids"),
    "nothing at all": (lambda places: None, "gives no prompt_logprobs; the teacher's 5 most likely ids"),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_is_broken_is_refused_at_once(lie, teacher, tokenizer, rows):
    change, said = LIES[lie]
    with serving(Foreign, teacher) as running:
        remote = judge(running, tokenizer, 5)
        # The last id is none of the likely ones, so that what is changed is one of the k.
        with torch.no_grad():
            unlikely = int(teacher.model(torch.tensor(rows[0][None, :-1])).logits[0, -1].argmin())
        asked = np.array([*rows[0][:-1], unlikely])
        running.change, running.asked = change, []
        with pytest.raises(AtodError, match=said) as error:
            remote.top(row_batch([asked]), temperature=1.0, budget=1)
        assert len(running.asked) == 1 and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_log_prob_that_is_no_number_is_refused(number, teacher, tokenizer, rows, monkeypatch):
    with serving(Recording, teacher) as running:
        remote, honest = judge(running, tokenizer, 5), json.dumps
        changed = f'"logprob": {number}, "rank": 3, "x": '
        monkeypatch.setattr(
            server.json, "dumps", lambda body, **_: _third(honest(body), changed) if "choices" in body else honest(body)
        )
        with pytest.raises(AtodError, match=r"no JSON number|too large"):
            remote.top(row_batch(rows[:1]), temperature=1.0, budget=1)


def _third(text, changed):
    """The text with another log-prob at the first entry of rank 3."""
    at = text.index(', "rank": 3}')
    start = text.rindex('"logprob": ', 0, at)
    return text[:start] + changed + text[start + len('"logprob": ') : at] + text[at + len(', "rank": 3') :]


# --- what is kept -------------------------------------------------------------------------------------------------


def test_ids_that_the_student_does_not_have_are_left_out():
    ids = np.array([[1, 50, 2, 3], [4, 5, 6, 7]], dtype=np.int32)
    logprobs = np.array([[-1.0, -2, -3, -4], [-1.5, -2.5, -3.5, -4.5]], dtype=np.float32)
    tokens = TeacherTokens(ids, logprobs)
    assert known_only(tokens, np.arange(60)) is tokens
    found = known_only(tokens, np.arange(50))
    assert found.ids_MS.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert found.logprobs_MS.tolist() == [[-1, -3, -4], [-1.5, -2.5, -3.5]]
    with pytest.raises(AtodError, match=r"none of the teacher's 4 most likely ids .* choose models of one family"):
        known_only(tokens, np.arange(4))


def test_a_served_teacher_with_padding_is_learned_from_as_a_local_one(student, tokenizer, rows, caplog):
    """Locally padding is shut out for both; a server may name it, and what it has goes to the tail."""
    padded = small_model(tokenizer, 6)
    padded.resize_token_embeddings(len(tokenizer) + 24, mean_resizing=False)
    with torch.no_grad():
        rows_of_ids = padded.get_output_embeddings().weight
        rows_of_ids[len(tokenizer) :] = 1.1 * rows_of_ids[:24]  # likely where these ids are
    loaded, batch = LoadedModel("padded", padded, tokenizer), batch_of(rows)
    with serving(Recording, loaded) as running:
        found = step_scores(GKD(support=16), student, loaded, running.address, batch)
    assert found.support_MS.max() < len(tokenizer) and 0 < found.support_MS.shape[1] < 16
    assert "some of the teacher's 16 most likely ids at a token are none of the student's" in caplog.text
    with torch.no_grad():
        for m in (0, 30):  # a token in each of two rows
            row = torch.tensor(rows[batch.row_M[m]][None, : batch.column_M[m]])
            theirs = torch.log_softmax(padded(row).logits[0, -1].float(), -1)[: len(tokenizer)]
            best = theirs.topk(found.support_MS.shape[1])
            np.testing.assert_allclose(found.teacher_support_MS[m], best.values, atol=1e-5)


def test_parts_keep_what_all_of_them_have():
    keep = np.array([True, False, True])
    one = Scores(
        np.array([-1.0, -2.0]),
        np.array([-3.0, -4.0]),
        reverse_kl_M=np.ones(2),
        support_MS=np.array([[1, 2, 3], [4, 5, 6]]),
        teacher_support_MS=np.zeros((2, 3)),
        vocabulary=9,
    )
    other = Scores(
        np.array([-5.0]), np.array([-6.0]), support_MS=np.array([[7, 8]]), teacher_support_MS=np.ones((1, 2))
    )
    found = joined(3, [(keep, one), (~keep, other)])
    assert found.student_M.tolist() == [-1, -5, -2] and found.teacher_M.tolist() == [-3, -6, -4]
    assert found.support_MS.tolist() == [[1, 2], [7, 8], [4, 5]] and found.teacher_support_MS.sum() == 2
    assert found.reverse_kl_M is None and found.vocabulary == 0


def test_a_local_and_a_served_teacher_share_a_step(student, teacher):
    episodes = [played((3, 4, 6, 7)), played((3, 5, 9, 8, 7), ECHO)]
    batch = make_batch([Group("t", (episode,)) for episode in episodes])
    both = {"env": (TOY, ECHO), "style": "compact"}
    expected = step_scores(GKD(support=8), student, teacher, "t", batch, **both)
    with serving(Recording, teacher) as running:
        where = ("toy=t", f"echo={running.address}")
        found = step_scores(GKD(support=8), student, teacher, where, batch, **both)
    assert_same(found, expected, 8)
    assert found.reverse_kl_M is None and expected.reverse_kl_M is not None


def test_tokens_of_rows_are_in_the_order_of_the_axis(rows):
    batch = row_batch(rows)
    assert [at.tolist() for at in tokens_of_rows(batch)] == [
        np.flatnonzero(batch.row_M == row).tolist() for row in range(len(rows))
    ]
