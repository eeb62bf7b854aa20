"""Plans (the byte ranges that a restore reads), and traces, from which ckptfs makes plans."""
