"""The mathematics of sampling: processes, transition kernels, deterministic solvers and schedules."""
