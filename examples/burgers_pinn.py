"""A physics-informed network for the viscous Burgers equation, plain and with hybridcore.

    u_t + u u_x = 0.05 u_xx,  x in [-1, 1],  t in [0, 1],  u(0, x) = -sin(pi x),  u(t, +-1) = 0

(Raissi, Perdikaris & Karniadakis 2019). The loss differentiates the network by its inputs, so its
forward pass builds a graph and costs more than the usual third of a step; the trainer measures it.

    python examples/burgers_pinn.py --seeds 5
"""

import argparse
import dataclasses
import statistics

import torch

from hybridcore.cli.compare import Run, compare
from hybridcore.cli.workloads import WORKLOADS

parser = argparse.ArgumentParser()
parser.add_argument("--quick", action="store_true", help="one learning rate, fewer steps")
parser.add_argument("--seeds", type=int, default=1)
arguments = parser.parse_args()

torch.set_num_threads(1)
workload = WORKLOADS["burgers"]
if arguments.quick:
    workload = dataclasses.replace(workload, steps=400, learning_rates=(3e-3,))


def watch(rate: float, step: int, run: Run) -> None:
    if step % 250 == 0:
        phase, loss = run.phase[-1], run.loss[-1]
        print(f"  learning rate {rate:g}, step {step}: {phase:7} loss {loss:.2e}", flush=True)


ratios = []
for seed in range(arguments.seeds):
    summary = compare(workload, seed, watch=watch).summary()
    ratios.append(summary["cost_ratio"])
    print(
        f"seed {seed}: plain gets to {summary['target']:.2e} at cost "
        f"{summary['plain_cost_to_target']:.0f}, hybridcore at "
        f"{summary['hybrid_cost_to_target']:.0f} (ratio {summary['cost_ratio']:.2f}; "
        f"{summary['predicted_share']:.0%} of the steps predicted)"
    )
print(f"median ratio {statistics.median(ratios):.2f}")
