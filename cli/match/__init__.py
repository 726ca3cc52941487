"""``cupycorr match``: where the pixels of one image are seen in another one."""

from .command import match as match
