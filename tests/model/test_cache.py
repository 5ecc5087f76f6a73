"""The paged cache: what is written is read back in place, and a block is copied whole."""

import torch

from llama.config import LlamaConfig
from llama.model.cache import KVCache

CONFIG = LlamaConfig(vocab_size=8, hidden_size=24, intermediate_size=8, num_layers=3, num_heads=4,
                     num_kv_heads=2, head_dim=6, max_position_embeddings=64, rope_theta=1e4,
                     rope_scaling=None, rms_norm_eps=1e-5, tie_word_embeddings=False)


def test_a_token_is_read_where_it_was_written_and_nowhere_else():
    cache = KVCache(CONFIG, num_blocks=5, block_size=4, dtype=torch.float32)
    cache.keys.zero_()
    cache.values.zero_()
    slots = torch.tensor([17, 3, 8])
    k, v = torch.randn(2, 3, 2, 6)
    cache.write(1, slots, k, v)
    for row, slot in enumerate(slots.tolist()):
        keys, values = cache.read(1, (slot, slot + 1))
        assert torch.equal(keys[0], k[row]) and torch.equal(values[0], v[row])
    assert cache.keys.count_nonzero() == cache.values.count_nonzero() == k.numel()


def test_a_run_is_a_view_and_not_a_copy():
    cache = KVCache(CONFIG, num_blocks=5, block_size=4, dtype=torch.bfloat16)
    for tensor, part in zip((cache.keys, cache.values), cache.read(2, (6, 15))):
        assert part.shape == (9, 2, 6)
        assert part.data_ptr() == tensor[2, 6].data_ptr()


def test_one_position_takes_the_bytes_that_the_configuration_says():
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16"), (torch.float16, "float16")):
        cache = KVCache(CONFIG, num_blocks=5, block_size=4, dtype=dtype)
        assert cache.keys.nbytes + cache.values.nbytes == (5 + 1) * 4 * CONFIG.kv_bytes_per_token(name)  # and a spare block


def test_the_spare_block_is_no_sequences():
    cache = KVCache(CONFIG, num_blocks=5, block_size=4, dtype=torch.float32)
    assert cache.spare_slot == 20
    cache.keys.zero_()
    k, v = torch.randn(2, 4, 2, 6)
    cache.write(0, cache.spare_slot + torch.arange(4), k, v)
    assert torch.equal(cache.read(0, (20, 24))[0], k) and not cache.read(0, (0, 20))[0].any()


def test_copy_block_copies_every_layer_of_one_block_and_leaves_the_others():
    cache = KVCache(CONFIG, num_blocks=5, block_size=4, dtype=torch.float32)
    cache.keys.normal_()
    cache.values.normal_()
    before = cache.keys.clone(), cache.values.clone()
    cache.copy_block(1, 3)
    for tensor, old in zip((cache.keys, cache.values), before):
        old[:, 12:16] = old[:, 4:8]
        assert torch.equal(tensor, old)
