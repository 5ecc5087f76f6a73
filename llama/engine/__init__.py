"""Requests to tokens: the scheduler, the blocks of the cache, the sampler. Ids only, no text."""
