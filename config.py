"""The shape of a Llama, and shapes known by name."""

from dataclasses import asdict, dataclass, replace

LARGEST = 2**24  # size: the bytes of no tensor overflow 64 bits


def _finite(x: object) -> bool:
    return type(x) in (int, float) and abs(x) < 2**63  # false for NaN, and for 10**400


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama. `rope_scaling` is (factor, low_freq, high_freq, original_length)."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int
    head_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: tuple[float, float, float, int] | None = None
    max_positions: int = 2048
    tied_head: bool = False
    attention_bias: bool = False  # on wqkv
    output_bias: bool = False  # on wo
    ffn_bias: bool = False
    qk_norm: bool = False  # an RMSNorm over each query and key head, before the rotation

    def __post_init__(self):
        sizes = (self.dim, self.n_layers, self.n_heads, self.n_kv_heads, self.ffn_dim)
        sizes = (*sizes, self.vocab_size, self.head_dim, self.max_positions)
        if any(type(n) is not int or not 0 < n < LARGEST for n in sizes):
            raise ValueError(f"sizes must be positive integers below {LARGEST}")
        if self.n_heads * self.head_dim >= LARGEST:
            raise ValueError(f"{self.n_heads} heads of {self.head_dim}")
        if not (_finite(self.norm_eps) and self.norm_eps >= 0):
            raise ValueError(f"the norms' epsilon is {self.norm_eps!r}")
        if not (_finite(self.rope_theta) and self.rope_theta > 0):
            raise ValueError(f"rope_theta is {self.rope_theta!r}")
        scaling = (1.0, 1.0, 2.0, 1) if self.rope_scaling is None else self.rope_scaling
        positive = all(_finite(x) and x > 0 for x in scaling)
        if len(scaling) != 4 or not positive or scaling[1] >= scaling[2]:
            raise ValueError(f"rope scaling by {scaling!r}")
        flags = (self.tied_head, self.attention_bias, self.output_bias, self.ffn_bias, self.qk_norm)
        if any(type(flag) is not bool for flag in flags):
            raise ValueError("tied_head, qk_norm and the biases must be true or false")
        if self.n_heads % self.n_kv_heads or self.head_dim % 2:
            raise ValueError(f"{self.n_heads} heads of {self.head_dim} on {self.n_kv_heads}")

    def to_dict(self) -> dict:
        """Plain values, for a checkpoint's header."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "ModelConfig":
        """Undo `to_dict` (JSON turns the tuple into a list)."""
        scaling = values.get("rope_scaling")
        return cls(**{**values, "rope_scaling": tuple(scaling) if scaling else None})


LLAMA_3_1_SCALING = (8.0, 1.0, 4.0, 8192)
_llama_3_8b = ModelConfig(
    4096, 32, 32, 8, 14336, 128256, 128, rope_theta=500000.0, max_positions=8192
)
_llama_3_1_8b = replace(_llama_3_8b, rope_scaling=LLAMA_3_1_SCALING, max_positions=131072)
_llama_3_2_1b = replace(
    _llama_3_1_8b, dim=2048, n_layers=16, ffn_dim=8192, head_dim=64, tied_head=True,
    rope_scaling=(32.0, 1.0, 4.0, 8192),
)  # fmt: skip
# True shapes, for --random_weights and for tests.
CONFIGS = {
    "llama-2-7b": ModelConfig(4096, 32, 32, 32, 11008, 32000, 128, max_positions=4096),
    "llama-2-13b": ModelConfig(5120, 40, 40, 40, 13824, 32000, 128, max_positions=4096),
    "llama-2-70b": ModelConfig(8192, 80, 64, 8, 28672, 32000, 128, max_positions=4096),
    "llama-3-8b": _llama_3_8b,
    "llama-3-70b": replace(_llama_3_8b, dim=8192, n_layers=80, n_heads=64, ffn_dim=28672),
    "llama-3.1-8b": _llama_3_1_8b,
    "llama-3.1-405b": replace(
        _llama_3_1_8b, dim=16384, n_layers=126, n_heads=128, ffn_dim=53248
    ),
    "llama-3.2-1b": _llama_3_2_1b,
    "llama-3.2-3b": replace(
        _llama_3_2_1b, dim=3072, n_layers=28, n_heads=24, head_dim=128
    ),
    "smollm2-135m": ModelConfig(
        576, 30, 9, 3, 1536, 49152, 64, rope_theta=100000.0, max_positions=8192, tied_head=True
    ),
    "qwen3-0.6b": ModelConfig(
        1024, 28, 16, 8, 3072, 151936, 128, 1e-6, 1000000.0, max_positions=40960, tied_head=True,
        qk_norm=True,
    ),
    "tiny": ModelConfig(64, 2, 4, 2, 160, 512, 16, max_positions=1024),
}  # fmt: skip
