"""The parts of a HyperSolver, and how one is fitted to a DEQ."""
