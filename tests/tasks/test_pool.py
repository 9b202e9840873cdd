"""Worker processes: order, deadlines, crashes, noise, and nothing left behind."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sapo.data import Completion, Prompt, Score, Status
from sapo.errors import TaskError
from sapo.tasks import FileTask, load_verifier, score_completions, score_groups
from sapo.tasks.workers.pool import WorkerPool, _scores, default_size, shared_pool
from sapo.tasks.workers.wire import Home, Job
from sapo.utils.signals import ANNOUNCING

PROMPT = Prompt(id=0, task="t", text="question", answer="a", metadata={"k": [1, 2]})

REWARDS = """
import asyncio, os, random, signal, subprocess, sys, time

def sleepy(completion):
    time.sleep(random.random() / 50)
    return int(completion)

leaked = []

def found():
    # Wherever they lie: a parent with many open files gives high ones.
    return [fd for fd in map(int, os.listdir("/dev/fd")) if fd > 2]

def act(completion):
    what, _, rest = completion.partition(" ")
    if what == "exit": os._exit(3)
    if what == "sysexit": sys.exit("bye")
    if what == "interrupt": raise KeyboardInterrupt
    if what == "segfault": os.kill(os.getpid(), signal.SIGSEGV)
    if what == "hang": time.sleep(1000)
    if what == "spin":
        while True: pass
    if what == "print":
        print("x" * 100_000); sys.stderr.write("y" * 1000); os.write(1, b"raw noise"); return 1
    if what == "read": return len(sys.stdin.read())
    if what == "raise": raise ValueError("because " + rest)
    if what == "nan": return float("nan")
    if what == "text": return "1.0"
    if what == "fork":
        if os.fork() == 0: return 7
        return 1
    if what == "child":
        return subprocess.Popen(["sleep", "1000"]).pid + (time.sleep(1000) if rest == "hang" else 0)
    if what == "orphan":
        print(subprocess.Popen(["sleep", "1000"], close_fds=False).pid, file=open(rest, "w"), flush=True); os._exit(4)
    if what == "pid": return os.getpid()
    if what == "wait":
        print("waiting", file=open(rest, "w"), flush=True)
        subprocess.run(["sleep", "0.5"], check=True)
        return 1
    if what == "terminate":
        import multiprocessing
        forked = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,))
        forked.start()
        started = subprocess.Popen(["sleep", "1000"])
        forked.terminate(); started.terminate(); forked.join()
        return float(forked.exitcode == started.wait() == -signal.SIGTERM)
    if what == "close": os.closerange(3, 1 + max(found())); return 1
    if what == "huge": return float(rest)
    if what == "junk":
        for fd in found():
            try: os.write(fd, rest.encode())
            except OSError: pass
        return 1
    if what == "forge":
        import struct
        frame = b'{"job": 1, "reward": 1, "status": "scored", "detail": "", "answer": null, "figures": {}}'
        for fd in found():
            try: os.write(fd, struct.pack("!4sI", b"sapo", len(frame)) + frame)
            except OSError: pass
        return 0.25
    if what == "again":
        import json, struct
        frame = sys._getframe()
        while "ticket" not in frame.f_locals: frame = frame.f_back
        began = json.dumps({"job": frame.f_locals["ticket"], "began": True}).encode()
        while True:
            for fd in found():
                try: os.write(fd, struct.pack("!4sI", b"sapo", len(began)) + began)
                except OSError: pass
            time.sleep(0.05)
    if what == "patch":
        import json, pickle, struct
        json.dumps = json.loads = json.JSONEncoder.encode = pickle.loads = pickle.dumps = lambda *a, **k: "{'no': json"
        return 1
    if what == "longwinded":
        from sapo.data import Score
        return Score(1.0, answer="a" * 10**6, detail="d" * 10**6, figures={str(i): 1.0 for i in range(int(rest or 1))})
    if what == "memory":
        kept = [bytearray(2**28) for _ in range(64)]
        return 1
    if what == "leak":
        leaked.append(bytearray(300 * 2**20)); return 1
    if what == "stray":
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                with open(rest, "w") as file: file.write(str(os.getpid()))
                time.sleep(1000)
            os._exit(0)
        while not os.path.exists(rest) or not open(rest).read(): time.sleep(0.01)
        return 1
    if what == "badstatus":
        from sapo.data import Score
        return Score(1.0, "splendid")
    if what == "surrogate": raise ValueError("\\ud800")
    return 0.5

async def hang(completion):
    await asyncio.sleep(1000)
"""


@pytest.fixture
def home(tmp_path):
    (tmp_path / "rewards_of_the_pool.py").write_text(REWARDS)
    return Home(str(tmp_path), tuple(sys.path))


@pytest.fixture
def pool():
    pool = WorkerPool(2)
    yield pool
    pool.close()


@pytest.fixture
def act(pool, home):
    """act("exit", "fine", ...): scores of completions of the function above."""

    def run(*texts, deadline=20.0, function="act", **options):
        spec = {"name": f"rewards_of_the_pool:{function}", **options}
        return pool.run([Job(spec, text, PROMPT, deadline, home) for text in texts])

    return run


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until(condition) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def error(detail: str) -> Score:
    return Score(0.0, Status.VERIFIER_ERROR, detail)


def test_results_come_in_the_order_of_the_jobs_whatever_each_takes(act, pool):
    numbers = [str(i) for i in range(200)]
    assert [score.reward for score in act(*numbers, function="sleepy")] == [float(i) for i in range(200)]
    assert len(pool.worker_ids()) == 2  # and both had a share in it


def test_a_crash_costs_one_completion_and_none_of_its_neighbours(act):
    scores = act("fine", "exit", "fine", "segfault", "fine")
    assert [score.reward for score in scores] == [0.5, 0, 0.5, 0, 0.5]
    assert scores[1] == error("the worker process died while scoring: exit code 3")
    assert scores[3] == error("the worker process died while scoring: signal SIGSEGV")


@pytest.mark.parametrize("text", ["hang", "spin"])
def test_a_hanging_verifier_is_killed_at_the_deadline_and_costs_one_completion(act, text):
    scores = act("fine", text, "fine", deadline=0.5)
    assert [score.reward for score in scores] == [0.5, 0, 0.5]
    assert scores[1] == error("TimeoutError: not scored within 0.5 s")


def test_a_hanging_coroutine_is_killed_at_the_deadline(act):
    assert act("x", function="hang", deadline=0.5) == [error("TimeoutError: not scored within 0.5 s")]


def test_what_a_killed_verifier_started_is_killed_too(act, pool, tmp_path):
    (score,) = act("child")
    child = int(score.reward)
    assert alive(child)
    pool.close()
    wait_until(lambda: not alive(child))


def test_a_child_that_outlives_its_crashed_worker_delays_nothing(act, tmp_path):
    scores = act(f"orphan {tmp_path}/pid", "fine", deadline=30.0)
    assert scores == [error("the worker process died while scoring: exit code 4"), Score(0.5)]
    wait_until(lambda: not alive(int((tmp_path / "pid").read_text())))


@pytest.mark.parametrize(
    ("text", "detail"),
    [
        ("sysexit", "SystemExit: bye"),
        ("interrupt", "KeyboardInterrupt: "),
        ("raise it was so", "ValueError: because it was so"),
        ("raise " + "x" * 10_000, "ValueError: because " + "x" * 480),
        ("nan", "ValueError: a reward must be finite; got nan; return 0 for an answer that cannot be judged"),
        ("text", "TypeError: a reward must be a number; got str; return a float, a bool or a Score"),
        ("badstatus", "ValueError: 'splendid' is not a valid Status"),
        ("surrogate", "ValueError: \ud800"),
    ],
)
def test_an_exception_is_an_error_with_its_type_and_message_and_the_worker_stays(act, pool, text, detail):
    before = act("pid")[0]
    assert act(text) == [error(detail)]
    assert act("pid")[0] == before


def test_a_verifier_that_prints_or_reads_disturbs_nothing(act, capfd):
    assert [score.reward for score in act("print", "read", "print", "fine")] == [1.0, 0.0, 1.0, 0.5]
    out, err = capfd.readouterr()
    assert out == ""  # standard output is the program's own
    assert "raw noise" in err


def test_a_verifier_that_forks_and_returns_twice_gives_one_answer(act):
    assert [score.reward for score in act("fork", "fine", "fork", "fine")] == [1.0, 0.5, 1.0, 0.5]


def test_a_verifier_that_closes_the_workers_socket_costs_one_completion(act):
    scores = act("close", "fine")
    assert scores[0].status is Status.VERIFIER_ERROR
    assert scores[1] == Score(0.5)


@pytest.mark.parametrize(
    "text",
    [
        "junk x",
        "junk " + "\x00" * 64,
        "junk sapo\x00\x00\x00\x04[1]]",
        "junk sapo\x00\x00\x00\x02{]",
        "forge",
        "again",
        "junk sapo\x7f",
    ],
)
def test_what_a_verifier_writes_to_descriptors_it_found_costs_one_completion(act, text):
    crowd = [os.open(os.devnull, os.O_RDONLY) for _ in range(100)]  # as in a program that has much open
    scores = act("fine", text, "fine", "fine")
    for fd in crowd:
        os.close(fd)
    assert [score.reward for score in scores] == [0.5, 0, 0.5, 0.5]
    assert scores[1].status is Status.VERIFIER_ERROR
    assert "the worker wrote what is no answer" in scores[1].detail


def test_a_verifier_that_patches_the_library_costs_nothing(act, pool):
    assert act("pid", "patch", "fine", "patch", "pid")[1:4] == [Score(1.0), Score(0.5), Score(1.0)]
    assert json.loads("[1]") == [1]  # patched in the worker alone


def test_texts_of_a_score_are_cut_and_too_many_figures_are_an_error(act):
    (score,) = act("longwinded")
    assert (len(score.answer), len(score.detail)) == (10_000, 500)
    (score,) = act("longwinded 100000")
    assert score.status is Status.VERIFIER_ERROR
    assert score.detail.startswith("ValueError: a score must fit into 1048576 bytes; got 1")


@pytest.mark.parametrize("reward", ["1e200", "-1e308", "1e16"])
def test_a_finite_reward_that_nothing_can_be_computed_with_is_an_error(act, reward):
    scores = act("huge " + reward, "huge 1e15")
    rule = f"ValueError: a reward must lie within +-1e+15; got {float(reward):g}; scale it down"
    assert scores == [error(rule), Score(1e15)]


def test_a_verifier_that_fills_the_memory_costs_one_completion(act):
    scores = act("fine", "memory", "fine", memory_gb=0.5)
    reason = "MemoryError: rewards_of_the_pool:act may use 0.5 GiB, and asked for more; mend it, or set its memory_gb"
    assert scores == [Score(0.5), error(reason), Score(0.5)]


def test_more_memory_than_there_are_addresses_is_no_limit(act):
    assert act("fine", memory_gb=1e300) == [Score(0.5)]


def test_a_verifier_that_leaks_gets_a_new_worker_when_its_memory_is_full(pool, home):
    jobs = [Job({"name": "rewards_of_the_pool:act", "memory_gb": 0.5}, "leak", PROMPT, 20.0, home)] * 4
    one = WorkerPool(1)
    assert [score.reward for score in one.run(jobs)] == [1.0, 0.0, 1.0, 0.0]
    one.close()


def test_a_process_that_left_its_session_and_its_parent_ends_with_the_worker(act, pool, tmp_path):
    assert act(f"stray {tmp_path}/pid") == [Score(1.0)]
    stray = int((tmp_path / "pid").read_text())
    assert alive(stray)
    pool.close()
    wait_until(lambda: not alive(stray))


def test_workers_are_kept_from_batch_to_batch(act):
    assert act("pid") == act("pid")


def test_a_worker_that_died_between_two_batches_costs_nothing(act, pool):
    act("fine")
    for pid in pool.worker_ids():
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: not alive(pid))
    assert act("fine", "fine") == [Score(0.5), Score(0.5)]


def test_no_worker_starts_before_there_is_work_and_closing_leaves_none(act, pool):
    assert pool.worker_ids() == []
    act("fine")
    workers = pool.worker_ids()
    pool.close()
    assert workers
    assert not any(map(alive, workers))
    assert act("fine") == [Score(0.5)]  # a closed pool opens again


class OfTheParent:
    """What a worker cannot make, since it does not find this module."""


def test_metadata_that_a_worker_cannot_read_is_said(pool, home, monkeypatch):
    monkeypatch.setattr(OfTheParent, "__module__", "found_in_the_parent_alone")
    monkeypatch.setitem(sys.modules, "found_in_the_parent_alone", sys.modules[__name__])
    bad = dataclasses.replace(PROMPT, metadata={"object": OfTheParent()})
    first, second = pool.run([Job("rewards_of_the_pool:act", "fine", prompt, 20.0, home) for prompt in (bad, PROMPT)])
    assert (first, second) == (error("ModuleNotFoundError: No module named 'found_in_the_parent_alone'"), Score(0.5))


HUGE = {"reward": 10**400, "status": "scored", "detail": "", "answer": None, "figures": {}}


@pytest.mark.parametrize("scores", [7, [], [{"reward": 1.0}], [1, 2], [HUGE, {}], {"a": 1}])
def test_forged_scores_of_a_batch_are_errors_of_its_completions(scores, home):
    found = _scores({"job": 1, "scores": scores}, Job("m:f", ("a", "b"), PROMPT, 20.0, home))
    assert [(score.reward, score.status) for score in found] == [(0.0, Status.VERIFIER_ERROR)] * 2


def test_metadata_that_cannot_be_sent_is_an_error_of_its_completion(pool, home):
    bad = dataclasses.replace(PROMPT, metadata={"f": lambda: None})
    jobs = [Job("rewards_of_the_pool:act", "x", p, 20.0, home) for p in (PROMPT, bad, PROMPT)]
    first, second, third = pool.run(jobs)
    assert (first, third) == (Score(0.5), Score(0.5))
    assert second.status is Status.VERIFIER_ERROR
    assert "metadata cannot be sent" in second.detail


def test_a_large_completion_and_its_prompt_arrive_whole(pool, home):
    with open(home.directory + "/large.py", "w") as file:
        file.write("def f(completion, metadata): return len(completion) + len(metadata['m'])")
    prompt = dataclasses.replace(PROMPT, metadata={"m": "m" * 3_000_000})
    assert pool.run([Job("large:f", "c" * 2_000_000, prompt, 60.0, home)])[0].reward == 5_000_000


def test_an_interrupt_in_the_middle_leaves_no_stale_answer(act, pool, home):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.7, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        act("hang", "hang", deadline=60.0)
    timer.cancel()
    signal.signal(signal.SIGINT, before)
    assert act("raise a", "fine", "raise b") == [
        error("ValueError: because a"),
        Score(0.5),
        error("ValueError: because b"),
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, *ANNOUNCING], ids=lambda n: signal.Signals(n).name)
def test_a_signal_that_stops_a_run_costs_no_completion(act, pool, tmp_path, number):
    """A cluster sends it to every process of a job. What a verifier has started can still be ended by SIGINT."""
    act("fine")
    (worker, *_) = pool.worker_ids()
    guard = os.getpgid(worker)

    def signal_when_it_waits() -> None:
        wait_until((tmp_path / "waiting").exists)
        time.sleep(0.1)
        for process in {guard, worker}:
            os.kill(process, number)
        if number in ANNOUNCING:
            os.killpg(guard, number)

    thread = threading.Thread(target=signal_when_it_waits)
    thread.start()
    assert act(f"wait {tmp_path / 'waiting'}") == [Score(1.0)]
    thread.join()
    assert pool.worker_ids() == [worker]


def test_a_verifier_ends_its_own_children_as_ever(act):
    assert act("terminate") == [Score(1.0)]


def test_threads_take_turns_with_one_pool(act):
    results = {}

    def use(name):
        results[name] = [score.reward for score in act(*[str(name * 100 + i) for i in range(20)], function="sleepy")]

    threads = [threading.Thread(target=use, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {name: [float(name * 100 + i) for i in range(20)] for name in range(4)}


def test_workers_started_by_a_thread_outlive_it(act, pool):
    thread = threading.Thread(target=act, args=("fine",))
    thread.start()
    thread.join()
    workers = pool.worker_ids()
    time.sleep(0.1)
    assert [act("pid")[0].reward] == [float(pid) for pid in workers]


# A shell that starts the tests in the background has them ignore Ctrl-C, and their children inherit that.
PARENT = """
import signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
from sapo.data import Prompt
from sapo.tasks.workers.pool import Home, Job, WorkerPool
pool = WorkerPool(2)
prompt = Prompt(id=0, task="t", text="?")
jobs = [Job("rewards_of_the_pool:act", text, prompt, 600.0, Home.here()) for text in sys.argv[1:]]
def tell():
    import time
    while len(pool.worker_ids()) < 2: time.sleep(0.01)
    time.sleep(0.5)
    print(*pool.worker_ids(), flush=True)
threading.Thread(target=tell, daemon=True).start()
pool.run(jobs)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_no_worker_outlives_a_parent_that_is_killed(home, end):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, "hang", "spin"],
        cwd=home.directory,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(workers) == 2
    assert all(map(alive, workers))
    parent.send_signal(end)
    _, errors = parent.communicate(timeout=60)
    wait_until(lambda: not any(map(alive, workers)))
    assert errors.count("Traceback") <= (end == signal.SIGINT)  # the parent's own, none of a worker's


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_stray_process_of_a_verifier_does_not_outlive_a_parent_that_is_killed(home, tmp_path, end):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, f"stray {tmp_path}/pid", "hang"],
        cwd=home.directory,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout.readline()
    written = tmp_path / "pid"
    wait_until(lambda: written.exists() and written.read_text())
    stray = int(written.read_text())
    assert alive(stray)
    parent.send_signal(end)
    parent.communicate(timeout=60)
    wait_until(lambda: not alive(stray))


def test_a_program_that_ends_takes_its_workers_along_and_says_nothing(home):
    source = (
        "from sapo.data import Prompt\nfrom sapo.tasks import load_verifier\n"
        "from sapo.tasks.workers.pool import shared_pool\n"
        "score = load_verifier('rewards_of_the_pool:act')('x', Prompt(id=0, task='t', text='?'))\n"
        "print(score.reward, *shared_pool().worker_ids())"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", source], cwd=home.directory, env=env, capture_output=True, text=True, timeout=60
    )
    reward, *workers = done.stdout.split()
    assert (done.returncode, done.stderr, reward) == (0, "", "0.5")
    assert workers
    assert not any(alive(int(pid)) for pid in workers)


def test_a_worker_loads_neither_torch_nor_transformers(pool, home):
    with open(home.directory + "/loaded.py", "w") as file:
        file.write("import sys\ndef f(completion): return len({'torch', 'transformers', 'numpy'} & set(sys.modules))")
    assert pool.run([Job("loaded:f", "x", PROMPT, 20.0, home)]) == [Score(0.0)]


def test_a_fork_of_this_process_makes_workers_of_its_own(home, tmp_path):
    ours = shared_pool()
    child = os.fork()
    if child == 0:
        os._exit(0 if shared_pool() is not ours else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert shared_pool() is ours


# ---------------------------------------------------------------------------------------------- batches and settings


def completion(text, finish="stop"):
    return Completion((1, 2), (0.0, 0.0), finish, text)


@pytest.fixture
def task(home, tmp_path, monkeypatch):
    """A task of a user's function that says how often it was called."""
    monkeypatch.chdir(tmp_path)
    rows = "".join(json.dumps({"prompt": f"p{i}", "answer": str(i)}) + "\n" for i in range(50))
    (tmp_path / "rows.jsonl").write_text(rows)
    return lambda verifier, **options: FileTask("rows.jsonl", verifier=verifier, **options)


def test_a_batch_of_several_tasks_is_scored_in_order_with_truncated_ones_in_their_places(task):
    user = task("rewards_of_the_pool:sleepy", name="user")
    here = task("last_number", name="here")
    regex = task({"name": "regex", "pattern": "<(.*)>"}, name="regex", score_truncated=True)
    prompts = [PROMPT, dataclasses.replace(PROMPT, answer="5")]
    groups = score_groups(
        [
            (user, prompts[0], [completion("3"), completion("9", "length"), completion("4")]),
            (here, prompts[1], [completion("5"), completion("6")]),
            (regex, prompts[1], [completion("<5>"), completion("<5>", "length"), completion("5")]),
            (user, prompts[0], [completion("x"), completion("8")]),
        ]
    )
    assert [[c.score.reward for c in group] for group in groups] == [[3, 0, 4], [1, 0], [1, 1, 0], [0, 8]]
    assert [[c.score.status.value for c in group] for group in groups] == [
        ["scored", "truncated", "scored"],
        ["scored", "scored"],
        ["scored", "scored", "unparseable"],
        ["verifier_error", "scored"],
    ]
    assert "ValueError: invalid literal" in groups[3][0].score.detail


def test_only_a_users_function_is_asked_again_about_the_same_text(task, tmp_path, monkeypatch):
    jobs = []
    run = WorkerPool.run_batches
    monkeypatch.setattr(WorkerPool, "run_batches", lambda self, batch: jobs.append(len(batch)) or run(self, batch))
    for verifier, count in [("rewards_of_the_pool:act", 3), ({"name": "regex", "pattern": "a(.)"}, 2)]:
        jobs.clear()
        scored = score_completions(task(verifier), PROMPT, [completion("ab"), completion("aa"), completion("ab")])
        assert jobs == [count]
        assert scored[0].score == scored[2].score
        assert [c.text for c in scored] == ["ab", "aa", "ab"]


def test_a_task_that_overrides_verify_judges_in_its_own_way(task):
    class Generous(FileTask):
        def verify(self, text, prompt):
            return Score(super().verify(text, prompt).reward + 1)

    generous = Generous("rows.jsonl", verifier={"name": "format", "pattern": "a"})
    assert task("exact")  # the fixture has written the rows
    scores = [c.score.reward for c in score_completions(generous, PROMPT, [completion("a"), completion("b")])]
    assert scores == [2.0, 1.0]


def test_a_verifier_with_an_exponential_pattern_is_stopped(task):
    evil = task({"name": "format", "pattern": "^(a+)+$", "deadline": 0.5})
    scored = score_completions(evil, PROMPT, [completion("aaa"), completion("a" * 50 + "b"), completion("b")])
    assert [c.score.reward for c in scored] == [1.0, 0.0, 0.0]
    assert [c.score.status.value for c in scored] == ["scored", "verifier_error", "scored"]


def test_a_module_that_kills_its_worker_when_imported_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deadly_rewards.py").write_text("import os\nos._exit(9)")
    with pytest.raises(TaskError, match="died while loading the verifier: exit code 9"):
        load_verifier("deadly_rewards:f")


def test_the_number_of_workers_is_the_variables_or_the_cores(monkeypatch):
    monkeypatch.setenv("SAPO_VERIFIER_WORKERS", "3")
    assert default_size() == 3
    monkeypatch.delenv("SAPO_VERIFIER_WORKERS")
    assert default_size() == len(os.sched_getaffinity(0))
    for wrong in ("0", "-1", "many"):
        monkeypatch.setenv("SAPO_VERIFIER_WORKERS", wrong)
        with pytest.raises(TaskError, match="SAPO_VERIFIER_WORKERS must be an integer of at least 1"):
            default_size()


def test_a_pool_without_workers_is_refused():
    with pytest.raises(TaskError, match="at least 1 worker; got 0"):
        WorkerPool(0)
