"""The ``cupycorr`` command."""
