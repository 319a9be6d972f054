"""The command line: `mmalign COMMAND`. `app` builds it from the functions of the other files, one a subject."""


def main() -> None:
    """Run the command line (`mmalign.cli.app.main`), which is imported here so that no other file imports it."""
    from mmalign.cli import app

    app.main()
