#!/usr/bin/env bash
# torch 2.14.1: `SGD(fused=True)` with momentum makes its buffers in the first update, of all parameters that have a gradient then.
# A parameter that gets its first gradient later (a head that is switched on, a stage that is unfrozen) has no buffer beside others
# that have one, and the update raises a TypeError. The plain and the foreach way take it, and give the same weights.
# Seen: plain and foreach agree; fused: "expected Tensor as element 1 in argument 2, but got NoneType".
# supermix's recorded updates (chapter 22) use the fused way where every parameter that learns has its gradient from the start.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.14.1
"$folder/venv/bin/python" - <<'PY'
import torch


def weights_after_two_updates(**how):
    early, late = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimiser = torch.optim.SGD([early, late], lr=0.1, momentum=0.9, **how)
    for parts in ([early], [early, late]):
        optimiser.zero_grad()
        sum(part.sum() for part in parts).backward()
        optimiser.step()
    return early.tolist(), late.tolist()


plain, foreach = (weights_after_two_updates(foreach=each) for each in (False, True))
print("plain:", plain)
assert plain == foreach
try:
    weights_after_two_updates(fused=True)
except TypeError as error:
    print("fused:", error)
    assert "got NoneType" in str(error)
else:
    raise SystemExit("fused SGD takes a parameter whose first gradient comes later")
PY
