"""A run on disk and its processes: directory, launcher, recorder, metrics, watchdog, progress, sample grids."""
