"""Block checksums as the manifest keeps them, for tests that publish by hand."""

from xxhash import xxh3_64_hexdigest


def blocks_of(data: bytes, block_bytes: int) -> str:
    return "".join(xxh3_64_hexdigest(data[at : at + block_bytes]) for at in range(0, len(data), block_bytes))
