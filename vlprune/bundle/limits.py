"""What a bundle may hold: the names of its members, and how large each may be, decided before anything is allocated."""

import re


KIB, MIB, GIB = 2**10, 2**20, 2**30

MANIFEST, SIGNATURE, WEIGHTS = "manifest.json", "manifest.sig", "weights.bin"
EXAMPLE_IMAGE, EXAMPLE_TEXT, EXPECTED = "example/image.png", "example/text.txt", "example/expected.json"

MAX_MANIFEST = 2 * MIB  # a BLIP-base bundle takes 0.2
MAX_BYTES = 8 * GIB  # of all members together, and of the weights once rebuilt
MAX_RATIO = 200  # bytes of members per byte of the archive; a stream of zeros would give 30,000
MAX_REBUILT = 1000  # bytes of rebuilt weights per byte of the archive
SLACK = MIB  # that both ratios allow in any case: small archives are mostly text
MAX_WINDOW = 2**23  # bytes that zstd may look back, which is the memory it takes
MAX_EXAMPLE = 2**20  # pixels of the stored image
MAX_TEXT = 10_000  # characters of a text

# Every name a member may have, and its most bytes. Nothing here can run; the order is no matter.
_MEMBERS = (
    (r"README\.md", MIB),
    (r"task\.json", 4 * MIB),
    (r"tokenizer\.json", 64 * MIB),
    (r"(tokenizer_config|special_tokens_map|added_tokens|preprocessor_config)\.json", MIB),
    (r"vocab\.(txt|json)", 16 * MIB),
    (r"merges\.txt", 16 * MIB),
    (re.escape(EXAMPLE_IMAGE), 4 * MIB),
    (re.escape(EXAMPLE_TEXT), 64 * KIB),
    (re.escape(EXPECTED), MIB),
    (r"graphs/[a-z][a-z0-9_]{0,63}\.onnx", 8 * MIB),
    (r"weights/[0-9a-f]{64}", MAX_BYTES),
)
REQUIRED = ("README.md", "task.json", "preprocessor_config.json", EXAMPLE_IMAGE, EXPECTED)


def largest(name: str) -> int | None:
    """Tell how large a member may be.

    Args:
        name: of a member other than the manifest and its signature.

    Returns:
        int | None: bytes; None = a bundle holds nothing of that name.
    """
    return next((size for pattern, size in _MEMBERS if re.fullmatch(pattern, name)), None)
