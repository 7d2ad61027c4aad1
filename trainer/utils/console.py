"""What the libraries print."""


def quiet_libraries() -> None:
    """Keep the libraries' loading bars out of the run's own output."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
