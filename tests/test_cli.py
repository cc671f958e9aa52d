"""The command line as its users meet it, in processes of its own: what it waits for, what it says, and how it stops."""

import inspect
import os
import random
import re
import signal
import subprocess
import sys
import time
from fcntl import ioctl
from functools import partial
from pathlib import Path
from struct import pack
from termios import TIOCSWINSZ

import pytest

import supermix
from supermix import cli, data
from supermix.cli import COMMANDS, MIXER_NAMES, parse_command
from supermix.experiments import demo, runs, study, throughput
from supermix.experiments.photographs import predict_command
from supermix.mixing.generate import command
from supermix.training import loop
from supermix.training.loop import make_teacher

HEAVY = ("torch", "torchvision", "numpy", "PIL", "matplotlib", "sklearn", "scipy", "skimage", "sympy", "pandas")
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "120"}


def start(*args, launcher=("-m", "supermix"), **kwargs):
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **{"env": ENV, **kwargs},
    )


def ended(process, seconds=60):
    "Exit code, standard output and standard error."
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def fresh(program):
    "What a new Python prints that runs this program."
    code, out, err = ended(start("-c", program, launcher=()))
    assert code == 0, err
    return out.strip()


# ---- what is imported when

LOADED = f"print(*[name for name in {HEAVY + ('torch._dynamo', 'torch.utils.tensorboard')} if name in sys.modules])"


def test_import_supermix_imports_nothing_heavy():
    assert fresh(f"import sys, supermix, supermix.cli, supermix.recipes, supermix.core\n{LOADED}") == ""


def test_the_names_of_the_package_need_torch_and_nothing_that_takes_as_long():
    loaded = fresh(f"import sys\nfrom supermix import *\n{LOADED}").split()
    assert "torch" in loaded and set(loaded) <= {"torch", "numpy", "PIL"}


def test_no_help_imports_torch():
    asked = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    program = f"""
import sys
from supermix.cli import main
for args in {asked}:
    try: main(args)
    except SystemExit as end: assert not end.code, args
    print("=" * 9)
{LOADED}
"""
    *shown, loaded = fresh(program).split("=" * 9)
    assert loaded.strip() == "" and len(shown) == len(COMMANDS) + 2
    assert all(f"usage: supermix {name} " in text for name, text in zip(COMMANDS, shown[2:]))
    assert all(f"• {name}" in shown[0] for name in COMMANDS)


def test_the_command_itself_waits_for_no_more():
    code, out, err = ended(start("generate", "--help", launcher=("-X", "importtime", "-m", "supermix")))
    imported = {line.rpartition("|")[2].strip() for line in err.splitlines()}
    assert code == 0 and "supermix.cli" in imported and not imported & set(HEAVY)


def test_the_names_of_the_package():
    from supermix.distillation.distill import distill
    from supermix.mixing.solver import SuperMix

    assert supermix.distill is distill and supermix.SuperMix is SuperMix
    assert supermix.models.wrn.WRN and supermix.distillation.losses.student_loss  # modules, without imports by name
    assert set(supermix.__all__) <= set(dir(supermix))
    assert not hasattr(supermix, "distil") and not hasattr(supermix, "__wrapped__")
    with pytest.raises(ImportError, match="distil"):
        from supermix import distil  # noqa: F401


# ---- what it says


@pytest.mark.parametrize(
    "command, function",
    [
        ("demo", demo.demo),
        ("teacher", make_teacher),
        ("generate", command),
        ("predict", predict_command),
        ("study", study.study),
        ("throughput", throughput.throughput),
    ],
)
def test_a_command_has_the_options_of_its_function(command, function):
    told, of = (
        {p.name: p.default for p in inspect.signature(f).parameters.values()} for f in (COMMANDS[command], function)
    )
    assert told == of


def test_every_mixer_can_be_named():
    assert set(MIXER_NAMES) == set(runs._ROW_MIXERS) - {""}


def test_all_ways_to_start_it():
    said = f"supermix {supermix.__version__}\n"
    script = Path(sys.executable).with_name("supermix")
    for launcher in (("-m", "supermix"), ("-m", "supermix.cli"), ("-m", "supermix.experiments.runs"), (script,)):
        assert ended(start("--version", launcher=launcher)) == (0, said, ""), launcher
    code, out, err = ended(start("generate", "--count", "0", launcher=("-m", "supermix.cli")))
    assert code == 1 and err.startswith("supermix: Expected a count of 1 or more") and len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "line, message",
    [
        ("distil --method kd", "Unknown command 'distil'. Did you mean 'distill'"),
        ("distill --base crd", "Unknown base 'crd'. Did you mean 'crd_benchmark'"),
        ("distill --scale papre", "Unknown scale 'papre'. Did you mean 'paper'"),
        ("distill --method fitnets --only-cost", "Unknown method 'fitnets'. Did you mean 'fitnet'"),
        ("distill --mixer SuperMix --only-cost", "Unknown mixer 'SuperMix'. Did you mean 'supermix'"),
        ("distill --student resnet21 --only-cost", "Unknown network 'resnet21'. Did you mean 'resnet"),
        ("distill --teacher WRN_40_2 --only-cost", "Unknown network 'WRN_40_2'. Did you mean 'wrn_40_2'"),
        (
            "distill --device gpu --only-cost",
            "Expected a device that this machine has, such as cpu or cuda:0, got 'gpu'",
        ),
        ("train --policy RandAugment --only-cost", "Unknown policy 'RandAugment'. Did you mean 'randaugment'"),
        ("train --policy mine.json --only-cost", "There is no policy file mine.json."),
        ("train --mixer cutmixx --only-cost", "Unknown mixer 'cutmixx'. Did you mean 'cutmix'"),
        ("teacher --data digit", "Unknown teacher's data set 'digit'. Did you mean 'digits'"),
        ("study --groups cor", "Unknown group 'cor'. Did you mean 'core'"),
    ],
)
def test_an_unknown_name_is_one_line_with_the_nearest(line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(line.split())
    assert str(end.value).startswith(f"supermix: {message}") and len(str(end.value).splitlines()) == 1
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
@pytest.mark.parametrize(
    "line",
    ["distill", "train --scale smoke", "teacher --data digits", "study", "race --data digits", "large", "throughput"],
)
def test_a_device_that_is_not_there_is_told_before_anything_is_read(line, device, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def read(*args, **kwargs):
        raise AssertionError("data are read before the device is known")

    for module in (data, loop, runs, study, throughput):
        monkeypatch.setattr(module, "load_data", read)
    with pytest.raises(SystemExit) as end:
        cli.main([*line.split(), "--device", device])
    assert str(end.value).startswith(
        f"supermix: Expected a device that this machine has, such as cpu or cuda:0, got '{device}': "
    )
    assert len(str(end.value).splitlines()) == 1 and not list(tmp_path.rglob("*"))


def optional():
    "Every option of every command that may be left open, as its help shows it."
    for name in COMMANDS:
        shown = ended(start(name, "--help"))[1]
        yield from ((name, option) for option in re.findall(r"(--[\w.-]+) \{?none[|,}]", shown))


def settings_of(work):
    "What a command that was read will work with: a partial function's arguments, or what a function has around it."
    if isinstance(work, partial):
        return work.args, work.keywords
    return inspect.getclosurevars(work).nonlocals


def test_none_has_one_spelling_and_others_are_understood():
    found = list(optional())
    assert {
        ("distill", "--mixer"),
        ("train", "--cutout"),
        ("train", "--mixer"),
        ("distill", "--low-lr"),
        ("generate", "--mixing.hold"),
        ("generate", "--train-images"),
        ("distill", "--results"),
        ("teacher", "--root"),
    } <= set(found) and len(found) > 20
    for name in dict.fromkeys(name for name, _ in found):
        options = [option for command, option in found if command == name]
        if name in ("distill", "train"):  # some options need a mixer
            options = [option for option in options if option != "--mixer"]
        mixed = ["--mixer", "supermix"]
        needed = {
            "teacher": ["--data", "digits"],
            "predict": ["a.png", "--weights", "b.pt"],
            "distill": mixed,
            "train": mixed,
        }
        needed = needed.get(name, [])
        flat = [option.replace("hold", "start") for option in options if option.endswith("mixing.hold")]  # regions hold
        needed += [word for option in flat for word in (option, "flat")]
        plain, *others = (
            settings_of(parse_command([name, *needed, *(word for option in options for word in (option, spelling))]))
            for spelling in ("none", "None", "NONE")
        )
        assert all(other == plain for other in others), name
    for spelling in ("none", "None"):
        assert parse_command(["train", "--policy", spelling]).args[1] == supermix.recipes.Variant()
        assert parse_command(["distill", f"--mixer={spelling}"]).args[1].mixer is None
        assert parse_command(["generate", "--out", f"./{spelling}"]).args[-1] == Path(spelling)  # a folder of this name


def test_whoever_stops_reading_hears_no_complaint():
    process = start("distill", "--help")
    process.stdout.close()  # as `| head` does
    process.stdout = None
    code, _, err = ended(process)
    assert (code, err) == (141, "")


# ---- refused commands

TINY = [
    "--scale",
    "smoke",
    "--train-images",
    "40",
    "--training.epochs",
    "1",
    "--training.milestones",
    "--training.first-stage",
    "1",
    "--teacher-training.epochs",
    "1",
    "--teacher-training.milestones",
]


@pytest.mark.parametrize(
    "line, message",
    [
        ("distill --mixer supermix --mixing.k 11", "at least k = 11 classes"),
        ("distill --mixer supermix --mixing.mask-size 33", "no larger than the images"),
        ("distill --mixer supermix --mixing.start region", "Unknown start 'region'. Did you mean 'regions'"),
        ("distill --mixer supermix --mixing.step 0", "step above 0"),
        ("distill --training.held-out 40", "hold out fewer than the 40 images"),
        ("distill --teacher-training.held-out 320", "hold out fewer than the 320 images"),
        ("distill --training.lr -1", "lr above 0"),
        ("distill --teacher-training.lr nan", "lr above 0"),
        ("distill --method ab --training.first-stage 1", "shorter than the 1 epochs"),
        ("distill --method fsp --teacher wrn_16_2", "wrn_16_2 → resnet8 by fsp"),
        ("distill --size 64", "Expected size=None"),
        ("distill --minutes nan", "0 or more minutes"),
        ("distill --student imagenet_resnet18 --training.batch-size 39", "choose another batch_size than 39"),
        ("distill --teacher-file nowhere.pth", "no teacher's file nowhere.pth"),
        ("train --policy RandAugment", "Did you mean 'randaugment'"),
        ("distill --network resnet56", "Expected --teacher FILE with --network resnet56, a file of its weights"),
        ("distill --teacher wrn_40_2 --network resnet56", "Expected --teacher FILE with --network resnet56"),
        ("train --network timm/resnet18", "Expected --teacher FILE with --network timm/resnet18"),
        ("train --label softmax", "Expected --mixer NAME with --label"),
        ("distill --mixes 1000", "Expected --mixer supermix with --mixes, got --mixer none"),
        ("distill --mixer mixup --mixing.k=3", "Expected --mixer supermix with --mixing.k, got --mixer mixup"),
        ("distill --mixed_pad none --mixer none", "Expected --mixer supermix with --mixed-pad, got --mixer none"),
        ("train --mixer cutmix --mixes 24", "Expected --mixer supermix with --mixes, got --mixer cutmix"),
        ("train --mixer supermix --mixing.k 1", "k of 2 or more"),
    ],
)
def test_a_refused_run_has_trained_nothing_and_leaves_nothing(line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def spy(*args, kept=runs._open_teacher):
        "Opens a teacher's file; where one would be trained, it only takes down that."
        return kept(*args) if args[3] else trained.append(args)

    monkeypatch.setattr(runs, "_open_teacher", spy)
    (command, *options), trained = line.split(), []
    with pytest.raises(SystemExit) as end:
        cli.main([command, *TINY, *options])
    shown = f"{end.value} {capsys.readouterr().err}"
    told = " ".join(shown.replace("│", " ").split())  # tyro's errors stand in a box
    assert message in told and "Traceback" not in told and not trained
    left = [path for path in tmp_path.rglob("*") if path.is_file() and "miniature" not in path.parts]
    assert not left, "the data's miniature apart, nothing is written"


@pytest.mark.slow
def test_the_corrected_command_runs(tmp_path):
    small = ["generate", "--data", "digits", "--count", "60", "--shard", "128", "--out", tmp_path / "store"]
    code, _, err = ended(start(*small, "--mixing.mask-size", "64"))
    assert code == 1 and "no larger than the images" in err and not (tmp_path / "store").exists()
    code, out, err = ended(start(*small))
    assert code == 0 and "60 mixed images" in out, err


# ---- progress

HELD = """
import os
import tqdm
from supermix.core import progress
lock = tqdm.tqdm.get_lock()  # a semaphore that forked processes share
child = os.fork()
if child == 0:
    lock.acquire()
    os._exit(0)  # as if it were killed in the middle of a bar
os.waitpid(child, 0)
print(sum(progress(range(4), "work", delay=0)))
"""


def test_a_process_that_dies_within_tqdm_blocks_no_later_bar():
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout == "6\n", done.stderr


BARS = """
import time
from supermix.core import _Lines, progress
_Lines.longest = {longest}
for _ in progress(range({n}), "work", **{options}): time.sleep(0.02)
"""


@pytest.mark.parametrize(
    "longest, options, least, most",
    [
        (30.0, {"mininterval": 0, "delay": 0.1}, lambda took: 9, lambda took: 11),  # a line at each tenth
        (30.0, {"delay": 0.1}, lambda took: 2, lambda took: took + 1),  # but a second apart, at least
        (30.0, {"delay": 60}, lambda took: 0, lambda took: 0),  # nothing where it is soon over
        # what shall vanish leaves lines only where it takes long
        (0.5, {"delay": 0.1, "leave": False}, lambda took: 1, lambda took: took / 0.5),
        (30.0, {"delay": 0.1, "leave": False}, lambda took: 0, lambda took: 0),
        (30.0, {"delay": 0.1, "disable": True}, lambda took: 0, lambda took: 0),
    ],
    ids=["tenths", "seconds apart", "soon over", "vanishes", "vanishes soon", "disabled"],
)
def test_where_nobody_watches_there_are_lines(longest, options, least, most):
    began = time.monotonic()
    code, out, err = ended(start("-c", BARS.format(longest=longest, n=100, options=options), launcher=()))
    lines, took = err.splitlines(), time.monotonic() - began
    assert code == 0 and out == "" and least(took) <= len(lines) <= most(took), err
    assert "\r" not in err and "█" not in err and all(re.match(r"work: \d+%, \d+/100 \[", line) for line in lines)
    if options.get("leave", True) and lines:
        assert lines[-1].startswith("work: 100%, 100/100 ")


def test_in_a_terminal_there_is_a_bar():
    ours, theirs = os.openpty()
    ioctl(theirs, TIOCSWINSZ, pack("HHHH", 24, 80, 0, 0))  # its lines and columns
    program = BARS.format(longest=30.0, n=100, options={"delay": 0.1})
    process = subprocess.Popen([sys.executable, "-c", program], stderr=theirs, env=ENV)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += (more := os.read(ours, 1000))
        except OSError:
            break  # the other end was closed
        if not more:
            break
    assert process.wait() == 0 and shown.count(b"\rwork: ") > 3 and b"100/100" in shown


def test_a_bar_goes_on_and_knows_what_it_is_told():
    program = """
from supermix.core import progress
with progress(title="images", total=100, initial=45, unit="image", delay=0, mininterval=0) as bar:
    for i in range(11):
        bar.set_postfix(loss=i, refresh=False)
        bar.update(5)
"""
    _, _, err = ended(start("-c", program, launcher=()))
    found = [(line.split(",")[0], line.rpartition("loss=")[2]) for line in err.splitlines()]
    assert found == [
        ("images: 50%", "0]"),
        ("images: 60%", "2]"),
        ("images: 70%", "4]"),
        ("images: 80%", "6]"),
        ("images: 90%", "8]"),
        ("images: 100%", "10]"),
    ]


# ---- Ctrl-C


def during_imports(line):
    "Start a command that imports all it has, send SIGINT when so many modules were imported, and see it end."
    args = ("generate", "--data", "digits", "--out", "/nowhere/store")
    process = start(*args, launcher=("-X", "importtime", "-m", "supermix"))
    ours = False
    for text in process.stderr:
        ours = ours or text.endswith("| supermix\n")
        line -= ours
        if line < 0:
            break
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process, 30)
    return code, text.rpartition("|")[2].strip(), [t for t in err.splitlines() if not t.startswith("import time:")]


def points(slow):
    "After how many imports: the third is the first that comes after the handler."
    return [3, 10, 60, 300, 700, 1000] if not slow else [*range(3, 100, 5), *range(100, 1100, 25)]


def test_ctrl_c_during_imports_is_one_line(request):
    for line in points(request.config.getoption("--slow")):
        code, module, rest = during_imports(line)
        assert (code, rest) == (130, ["supermix: stopped."]), (line, module)


SWALLOWED = {  # works that do not end by a KeyboardInterrupt in the main thread
    "every exception is caught": """
        while True:
            try: time.sleep(100)
            except BaseException: pass""",
    "in a destructor": """
        class Slow:
            def __del__(self): time.sleep(1)
        while True: Slow()""",
    "another thread": """
        threading.Thread(target=time.sleep, args=(100,)).start()
        time.sleep(100)""",
    "a pool of threads": """
        with ThreadPoolExecutor(2) as pool: list(pool.map(time.sleep, [100, 100]))""",
    "a pool of forked processes": """
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(2, context) as pool: list(pool.map(time.sleep, [100, 100]))""",
    "a pool of spawned processes": """
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(2, context) as pool: list(pool.map(time.sleep, [100, 100]))""",
    "another error on the way": """
        try: time.sleep(100)
        finally: raise ValueError("what became of it")""",
}
PROGRAM = """
import multiprocessing, sys, threading, time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from supermix import cli
def spin():
    "At work."
    def work():
        print("begun", flush=True){work}
    return work
if __name__ == "__main__":
    cli.COMMANDS["spin"] = spin
    if len(sys.argv) > 1: cli.Stop.__init__.__defaults__ = (float(sys.argv[1]),)  # its patience
    sys.argv = ["supermix", "spin"]
    cli.main()
"""


def children(pid):
    "The processes that a process started."
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid:
            found.append(int(stat.parent.name))
    return found


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(true, seconds=60):
    "Whether it becomes true in time."
    end = time.monotonic() + seconds
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.02)
    return found


def test_ctrl_c_ends_what_swallows_it(tmp_path):
    "All at the same time, for each takes its seconds. The signal goes to the command alone, not to its workers."
    running = {}
    for i, (name, work) in enumerate(SWALLOWED.items()):
        file = tmp_path / f"spin{i}.py"
        file.write_text(PROGRAM.format(work=work))
        running[name] = start(file, launcher=())
    for process in running.values():
        assert process.stdout.readline() == "begun\n"
    workers = {
        name: wait_for(lambda: len(c := children(running[name].pid)) >= 2 and c)
        for name in running
        if "processes" in name
    }
    time.sleep(0.3)
    for process in running.values():
        process.send_signal(signal.SIGINT)
    for name, process in running.items():
        code, _, err = ended(process, 30)  # they would take 100 seconds
        assert (code, err) == (130, "supermix: stopped.\n"), name
    assert len(workers) == 2 and all(workers.values())
    assert wait_for(lambda: not any(alive(pid) for pids in workers.values() for pid in pids), 5)


def test_a_second_ctrl_c_does_not_wait(tmp_path):
    (tmp_path / "spin.py").write_text(PROGRAM.format(work=SWALLOWED["every exception is caught"]))
    process = start(tmp_path / "spin.py", 1000, launcher=())
    process.stdout.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)  # the first one got lost
    process.send_signal(signal.SIGINT)
    assert ended(process)[::2] == (130, "supermix: stopped.\n")


def test_a_job_in_the_background_is_left_alone(tmp_path):
    "The shell has switched SIGINT off for it, and it stays so."
    (tmp_path / "spin.py").write_text(PROGRAM.format(work="\n        time.sleep(0.5)\n        print('done')"))
    ignore = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = start(tmp_path / "spin.py", launcher=(), preexec_fn=ignore)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert ended(process) == (0, "done\n", "")


@pytest.mark.parametrize(
    "name, resumed", [(name, name in ("distill", "train", "teacher", "study")) for name in COMMANDS]
)
def test_a_stopped_command_says_whether_it_can_be_resumed(name, resumed, monkeypatch, capsys):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "parse_command", stop)
    with pytest.raises(SystemExit) as end:
        cli.main([name])
    said = "supermix: stopped." + " Run the same command again to resume it." * resumed
    assert end.value.code == 130 and capsys.readouterr().err == said + "\n"


def test_whoever_calls_main_keeps_their_ctrl_c(capsys):
    before = signal.getsignal(signal.SIGINT)
    cli.main(["--version"])
    with pytest.raises(SystemExit):
        cli.main(["demo", "--help"])
    assert signal.getsignal(signal.SIGINT) is before and "supermix 0." in capsys.readouterr().out


WORK = {  # commands at work: how they are started, and when they have begun
    "generate": (
        ["generate", "--data", "digits", "--count", "100000", "--out", "store"],
        lambda folder, process: list(folder.glob("store/.0*.lock")),
    ),
    "distill": (
        ["distill", *TINY, "--teacher-training.epochs", "500", "--out", "out"],
        lambda folder, process: list(folder.glob("out/teachers/*/step*")),
    ),
    "puzzlemix": (
        [
            "distill",
            *TINY,
            "--mixer",
            "puzzlemix",
            "--training.epochs",
            "500",
            "--training.batch-size",
            "8",
            "--out",
            "out",
        ],
        lambda folder, process: list(folder.glob("out/students/*/step*")),
    ),
    "supermix": (
        ["distill", *TINY, "--mixer", "supermix", "--mixes", "100000", "--out", "out"],
        lambda folder, process: list(folder.glob("out/mixes/*/.0*.lock")),
    ),
    "teacher": (
        ["teacher", "--data", "digits", "--out", "out"],
        lambda folder, process: "resnet20 on digits" in process.stderr.readline(),
    ),
    "race": (
        ["race", "--data", "digits", "--out", "out/race.json"],
        lambda folder, process: len(children(process.pid)) > 1,
    ),
    "throughput": (
        ["throughput", "--data", "digits", "--images", "1200", "--out", "out/t.json"],
        lambda folder, process: len(children(process.pid)) > 1,
    ),
}


def stopped(name, folder, everybody, delay):
    "Start a command, send SIGINT when it has been at work for a while, and see how it ends."
    command, begun = WORK[name]
    threads = "2" if name == "race" else "1"
    process = start(*command, cwd=folder, start_new_session=True, env=ENV | {"OMP_NUM_THREADS": threads})
    assert wait_for(lambda: process.poll() is not None or begun(folder, process), 120)
    time.sleep(delay)
    helpers, began = children(process.pid), time.monotonic()
    if everybody:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    else:
        process.send_signal(signal.SIGINT)
    code, out, err = ended(process, 60)
    took, rest = time.monotonic() - began, [line for line in err.splitlines() if not re.search(r": \d+%, \d", line)]
    assert code == 130 and len(rest) == 1, (name, everybody, delay, code, out, err)
    assert rest[0].startswith("Stopped: " if name == "generate" else "supermix: stopped."), err
    assert wait_for(lambda: not any(map(alive, helpers)), 10)
    return took


@pytest.mark.parametrize("name, everybody", [("generate", False), pytest.param("race", True, marks=pytest.mark.slow)])
def test_ctrl_c_ends_a_command_at_work(name, everybody, tmp_path):
    stopped(name, tmp_path, everybody, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("everybody", [True, False], ids=["everybody", "the command"])
@pytest.mark.parametrize("name", WORK)
def test_ctrl_c_always_ends_a_command_at_work(name, everybody, tmp_path):
    chance = random.Random(f"{name} {everybody}")
    for i in range(12):
        (tmp_path / str(i)).mkdir()
        assert stopped(name, tmp_path / str(i), everybody, chance.uniform(0, 4)) < 30
