"""All that waits for a GPU, in twelve minutes at most: tests, races, training loops, distillation, photographs.

    python tools/card.py                        # on a GPU; CIFAR-100 where it is found, else Fashion-MNIST
    python tools/card.py --out out/card --small # on a processor, on digits, within minutes: does it all run?

Steps are taken in the order of their weight. Each writes its file into --out when it is done, and `card.json` says what
was done, how long it took and what failed. A step that would begin after the time is left out; one that fails stops no
other. Photographs without weights or files (`--photos`) are made up: they are good for the time, not for what is seen.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent

DISTIL = """
import json, sys, time, torch
from dataclasses import replace
from supermix import create, distill, load_data, pretrained
from supermix.core import write_atomic
from supermix.distillation.distill import make_mixes
from supermix.experiments.throughput import machine_facts
from supermix.recipes import METHODS, Training
from supermix.training import loop

out, data, device, student, images, epochs = sys.argv[1:7]
source, place = load_data(data), torch.device(device)
few = source.train.subset(min(int(images), len(source.train))).to(place)
teacher = pretrained(source.info.name).to(place)
start = time.perf_counter()
stock = make_mixes(teacher, few, len(few))
report = {"data": data, "images": len(few), "student": student, **machine_facts(place), "mixes": len(stock),
          "mixes/s": len(stock) / (time.perf_counter() - start), "ways": {}}
replayed = loop._why_eager
ways = {"pass by pass": lambda *_: "for comparison", "replayed": replayed}
for bfloat16 in (False, True):
    for name, why in ways.items():
        loop._why_eager = why
        torch.manual_seed(0)
        recipe = Training(epochs=int(epochs), milestones=(), lr=0.05, bfloat16=bfloat16)
        network = create(student, num_classes=len(source.info.classes)).to(place)
        history = distill(teacher, network, replace(source, train=few), "kd", stock, recipe)
        report["ways"][name + ", bfloat16" * bfloat16] = {
            "images/s": history.rows[-1]["images/s"], "test": history.test, "updates": history.how}
        print(name, report["ways"][name + ", bfloat16" * bfloat16], flush=True)
write_atomic(out, (json.dumps(report, indent=1) + "\\n").encode())
"""

LARGE = """
import json, sys, torch
from pathlib import Path
from tempfile import TemporaryDirectory
import torch.nn.functional as F
from PIL import Image
from supermix.core import write_atomic
from supermix.experiments.large import large_teacher, measure_large, photographs_in
from supermix.zoo import create

out, device, blocks, slots, sets, photos = sys.argv[1:7]
mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
with TemporaryDirectory() as folder:
    if not photos:  # soft random pictures
        g = torch.Generator().manual_seed(0)
        for i in range(64):
            picture = F.interpolate(torch.rand(1, 3, 12, 12, generator=g), (256, 320), mode="bicubic")[0].clamp(0, 1)
            Image.fromarray((255 * picture).byte().permute(1, 2, 0).numpy()).save(Path(folder) / f"p{i:03d}.jpg")
    try: teacher, mean, std = large_teacher()
    except ImportError:
        torch.manual_seed(0)
        teacher = create("imagenet_resnet34").eval().requires_grad_(False)
    images = photographs_in(photos or folder, teacher, mean, std)
    if len(images.labels.unique()) < 8:  # without weights: spread what it sees
        head = [m for m in teacher.modules() if isinstance(m, torch.nn.Linear)][-1]
        logits = torch.cat([teacher(x) for x, *_ in images.batches(16)])
        head.bias -= logits.mean(0)
        scale = 3 / (logits - logits.mean(0)).std()
        head.weight *= scale
        head.bias *= scale
    result = measure_large(teacher.to(device), images, out, int(sets), int(blocks), int(slots) or None)
if not photos:
    result["folder"] = "made-up pictures: random colours, good for the time and not for what is seen"
    write_atomic(out, (json.dumps(result, indent=1) + "\\n").encode())
print(f"{result['ratio']:.1f} times the baseline", flush=True)
"""


def steps(out, small, device, photos):
    "Name, command and the seconds that a step may take."
    python, supermix = sys.executable, [sys.executable, "-m", "supermix"]
    hundred = "cifar100" if has("cifar100") else "fashion_mnist"
    data = "digits" if small else hundred
    where = ["--device", device]
    race = [*supermix, "race", *where, "--data", data]
    loop = [*supermix, "throughput", *where, "--data", data]
    name = f"engine{'_cifar100' * (data == 'cifar100')}_gpu.json"
    yield (
        "tests",
        [python, "-m", "pytest", "-q", "-x" if small else "--maxfail=20", str(ROOT / "tests" / "test_cuda.py")],
        200,
    )
    rounds = ["--rounds", "1", "--blocks", "1"] if small else ["--rounds", "2", "--blocks", "4"]
    yield "race, k = 2 and 3", [*race, "--out", str(out / name), *rounds], 300
    for network in ("resnet8",) if small else ("resnet20", "wrn_16_2"):
        few = ["--images", "640", "--rounds", "1"] if small else ["--images", "25600", "--rounds", "2"]
        file = f"throughput{'' if network == 'resnet20' else '_' + network}_gpu.json"
        yield f"throughput, {network}", [*loop, "--network", network, "--out", str(out / file), *few], 150
    sizes = ["resnet8", "200", "2"] if small else ["wrn_16_2", "20000", "4"]
    yield "distil with a stock", [python, "-c", DISTIL, str(out / "distil_gpu.json"), data, device, *sizes], 150
    sizes = ["1", "8", "2"] if small else ["8", "0", "32"]  # blocks, slots (0: what suits), sets of the baseline
    yield "photographs", [python, "-c", LARGE, str(out / "large_gpu.json"), device, *sizes, photos], 150


def has(data):
    "Whether a data set is found here; nothing is downloaded."
    from supermix.data import load_data

    try:
        return bool(load_data(data, download=False))
    except FileNotFoundError:
        return False


def take(name, command, seconds):
    "Take a step: what card.json says of it."
    print(f"--- {name} (at most {seconds:.0f} s)", flush=True)
    start = time.perf_counter()
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=seconds, env=os.environ | {"TQDM_DISABLE": "1"}).returncode
    except subprocess.TimeoutExpired:
        code = "out of time"
    return {"step": name, "ended": code, "seconds": round(time.perf_counter() - start, 1)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--small", action="store_true", help="on digits, with hardly any work")
    parser.add_argument("--device", default=None, help="cpu or cuda; a GPU where there is one")
    parser.add_argument("--photos", default="", help="a folder of photographs; else 64 pictures of random colours")
    parser.add_argument("--minutes", type=float, default=12.0, help="for all steps together")
    parser.add_argument("--only", default="", help="a part of the names of the steps that are taken")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    sys.path.insert(0, str(ROOT))
    from supermix.core import write_atomic
    from supermix.experiments.throughput import best_device, machine_facts

    device = best_device(options.device)
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    until, done = time.perf_counter() + 60 * options.minutes, []
    for name, command, seconds in steps(out, options.small, device, options.photos):
        left = until - time.perf_counter()
        if options.only not in name:
            continue
        if left < 20:
            done.append({"step": name, "ended": "left out: no time", "seconds": 0.0})
        else:
            done.append(take(name, command, min(seconds * (4 if options.small else 1), left)))
        write_atomic(out / "card.json", (json.dumps(machine_facts(device) | {"steps": done}, indent=1) + "\n").encode())
    for step in done:
        print(f"{step['step']:22s} {step['ended']!s:18s} {step['seconds']:6.1f} s")
    sys.exit(any(step["ended"] for step in done))


if __name__ == "__main__":
    main()
