"""Whether what was delivered is stored and will be billed: reads it back from OpenMeter, by id."""
