"""Other people's models on the fused kernels: `patch`, `unpatch` and `verify`."""

from leedl_fast.integrations.patching import PatchReport, patch, unpatch
from leedl_fast.integrations.verification import Verification, verify

__all__ = ["PatchReport", "Verification", "patch", "unpatch", "verify"]
