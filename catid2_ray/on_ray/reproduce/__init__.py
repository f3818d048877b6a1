"""`catid2 reproduce`: the cells of the paper's tables on a recipe's catalogue, each measured once and kept in the store."""
