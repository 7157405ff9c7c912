"""Which variables of the environment a job gets: those that an action needs, and no others."""

from __future__ import annotations

from collections.abc import Mapping

from kinegraph.spec import KEY_VARIABLE

NAMES = frozenset(
    (
        *("PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "TZ", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT"),
        *("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH"),
        *("XDG_CACHE_HOME", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
        *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy"),
        *("GOOGLE_APPLICATION_CREDENTIALS", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_HOME"),
    )
)
PREFIXES = (
    *("KINEGRAPH_", "LC_", "AWS_", "FSSPEC_", "AZURE_STORAGE_", "WANDB_", "RAY_"),
    *("OMP_", "MKL_", "OPENBLAS_", "NCCL_", "GLOO_", "NVIDIA_", "PYTORCH_", "TORCH_"),
)


def build_environment(variables: Mapping[str, str], key: str = "") -> dict[str, str]:
    """The variables that a job gets. What torchrun or SLURM set for the caller is not for it.

    `key`: the encryption key of the job, if it does not come from the environment itself.
    """
    chosen = {name: value for name, value in variables.items() if name in NAMES or name.startswith(PREFIXES)}
    return {**chosen, KEY_VARIABLE: key} if key else chosen
