"""How much of f a second evaluation needs: ``python results/hypersolver/parts.py RUN --data DIR``.

Writes ``parts.csv`` into a folder of the run's name beside this file. After f(0), f is evaluated
once more, but with only its finest maps computed anew and the coarser ones as they were in the
first evaluation: how far a solver would get between two evaluations if it knew that much of f
exactly. On every fourth validation image; distances are ``||z - z*|| / ||z*||``.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from curves import relative
from torch import Tensor

from deqsolvers.hypersolver.targets import Teacher
from polypseg.data import PolypDataset, batches, split_for
from polypseg.inference import load_model
from polypseg.models import PolypDEQ


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    given = parser.parse_args()
    model, config = load_model(given.run, "anderson")
    assert isinstance(model, PolypDEQ)
    f, teacher = model.deq.f, Teacher(model.deq, tol=1e-5, max_steps=300)
    pairs = split_for(given.data, config.seed).val[::4]
    dataset = PolypDataset(pairs, config.data.size, train=False, seed=0)
    distances: dict[str, list[Tensor]] = {}
    parameters = {"f(0)": 0}
    with torch.no_grad():
        for batch in batches(dataset, 4, False, 0, 0):
            e = model.features(batch["image"])
            exact = teacher.deq.solve(e).z
            before = f.maps(model.zero_state(e), e)
            once = f.decoder(before)  # f(0)
            anew = f.maps(once, e)
            distances.setdefault("f(0)", []).append(relative(once, exact))
            for count in range(1, len(anew) + 1):
                name = ("injection", "+ stage 2", "+ stage 3", "+ stage 4: f(f(0))")[count - 1]
                z = f.decoder(anew[:count] + before[count:])
                distances.setdefault(name, []).append(relative(z, exact))
                modules = [f.injection, f.decoder, *f.stages[: count - 1]]
                parameters[name] = sum(
                    p.numel()
                    for module in modules
                    if module is not None
                    for p in module.parameters()
                )
    folder = Path(__file__).parent / given.run.resolve().name
    folder.mkdir(exist_ok=True)
    with open(folder / "parts.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["computed anew", "parameters of it", "images", "distance", "worst distance"]
        )
        for name, found in distances.items():
            each = torch.cat(found)
            row = [parameters[name], len(each), f"{each.mean():.4f}", f"{each.max():.4f}"]
            writer.writerow([name, *row])
            print(name, *row)


if __name__ == "__main__":
    main()
