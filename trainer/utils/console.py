"""Console output of libraries."""


def quiet_libraries() -> None:
    """Turn the progress bars of the libraries off."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
