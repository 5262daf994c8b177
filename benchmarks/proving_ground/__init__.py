"""The proving ground: what the same loss costs by hybridcore, by its baselines and by its peers.

    python -m benchmarks.proving_ground run --all      # hours; resumes where it was stopped
    python -m benchmarks.proving_ground run --quick    # toy sizes, minutes, to see that it works
    python -m benchmarks.proving_ground table
    python -m benchmarks.proving_ground plot

Every method tunes over the same grid of learning rates and the same number of trials, at the
workload's full budget, on the first seed: the loop as written over the rates at a constant rate,
every other over rates and schedules. The four best settings run on all seeds, those that are
reported, and what has the best median score there then runs at several budgets. Its schedule ends
with the budget, so each budget is a run of its own.

A run's cost is counted from outside: a full step is 1, a forward pass alone its measured share. A
run's score is what a user would keep: the lowest smoothed training loss where every batch is the
whole, the held-out loss at the end elsewhere, at the weights that the method ships.

The cost to a target is where the line through (log cost, log score) of a method's budgets, of one
seed, first reaches it. A speed-up is the baseline's cost to its own final score over that. A method
that leaves passes out gets longer budgets, until it has spent as many as the others; one that does
not get there counts as the largest cost of either, which flatters it, and is marked. So is the best
rate where it is at an end of the grid. Quartiles are over seeds. One thread.
"""
