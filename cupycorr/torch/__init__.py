"""torch: operators, their derivatives, and the memory of tensors.

Importing this package registers the operators, which is all that a process needs to run an exported
program that holds them.
"""

from cupycorr.torch import lookup as lookup
from cupycorr.torch import operators as operators
from cupycorr.torch import volumes as volumes
