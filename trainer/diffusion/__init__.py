"""The mathematics of sampling: kernels, schedules."""
