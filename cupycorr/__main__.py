"""``python -m cupycorr`` is the command ``cupycorr``."""

from cupycorr.cli import main  # type: ignore[import-not-found]

main(prog_name="python -m cupycorr")
