"""From x to y: measure, merge, normalize. No Flax, no running statistics."""
