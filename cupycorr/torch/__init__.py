"""torch: operators, their derivatives, and the memory of tensors."""
