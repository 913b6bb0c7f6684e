"""Who computes which shard, where it is not one process that computes all."""
