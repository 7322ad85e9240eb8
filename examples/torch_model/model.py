"""
A small PyTorch (CPU) model inside. ``python model.py``.

Make modules and generators while the entry is loaded: torch seeds its generator from the system
once, and a worker can open nothing after its sandbox has closed.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

import pyenclave

Rows = npt.NDArray[np.float32]
torch.manual_seed(1)
network = torch.nn.Sequential(
    torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1), torch.nn.Sigmoid()
)


@pyenclave.ecall
def train(rows: Rows, labels: Rows, steps: int = 200) -> float:
    """Fit the network; return the last loss."""
    x, y = torch.from_numpy(rows), torch.from_numpy(labels)[:, None]
    weights = list(network.parameters())
    loss = torch.zeros(())
    for _ in range(steps):
        loss = torch.nn.functional.binary_cross_entropy(network(x), y)
        # By hand: torch.optim imports a compiler at its first step, which no lock list has unless
        # the entry imports it too (`import torch._dynamo`).
        with torch.no_grad():
            for weight, slope in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.sub_(slope)
    return float(loss)


@pyenclave.ecall
def predict(rows: Rows) -> Rows:
    """Return the probability of class 1 for each row."""
    with torch.inference_mode():
        result: Rows = network(torch.from_numpy(rows))[:, 0].numpy()
    return result


def main() -> None:
    random = np.random.default_rng(1)
    rows = random.normal(size=(500, 4)).astype(np.float32)
    labels = (rows[:, 0] + rows[:, 1] > 0).astype(np.float32)
    with pyenclave.Enclave.from_file(__file__) as enclave:
        print(f"loss {enclave.train(rows, labels):.4f}")
        right = (enclave.predict(rows) > 0.5) == (labels > 0.5)
        print(f"accuracy {right.mean():.3f}")


if __name__ == "__main__":
    main()
