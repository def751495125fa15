"""The code that we have given out, by which `armt refresh` knows code that somebody has changed."""

from ...version_armt import code_version


# What `code_version()` was for every state of the code before the next release; a release adds its own.
RELEASED = {
    "0.1.0": (
        "717abb06efcb 50c649139199 7dffc76e87f3 b37411eeeb43 c38ed05ce4c9 9bfbea465d94 f68d1774305d 19ce7d0f39cd "
        "222334f83848 f924e65d68f9 64e21baa5edf 51d7c79e8251 817ebb98e7e5 9de23ae7bd30 826e964ff042 941d90c74c79 "
        "0949d2d0ee8f 3bfb1d177cc3 e81ba97ea66d 40c360df2267 6f08b7bc10fe 54201b903325 26b27b59f635 a04148647cdf "
        "6017b3252dc8 15e91dda7acf f6f0ee65c152 ff2ae0abe96e 6e68c11da703 d4d8cce50f02 7c798da6d3b3 46ca070d48df "
        "dd614e30b4ea 359a630e7ff0 a21fc5a358d5 6482295552a6 baa4c58de4e6 37f4082eb4af c16bca9599e3 b6ea412acd23 "
        "32c664595015 7c7cb7e3b6e1 e937fa8c828f 9cfe38875df0 8661c55bb8be ea3df4596024 ae67db39ee17 42e604237c0b "
        "56f079bcda53 26e03dde6f89 22ea55aeefad 791f1ec7c9ef de96ee076938 23e9571b4447 e394b59d5063"
    ),
}


def is_ours(version: str) -> bool:
    """Whether a digest is that of released code, or of this."""
    return version == code_version() or any(version in versions.split() for versions in RELEASED.values())
