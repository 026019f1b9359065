"""Import this before what needs the extra: it raises an ImportError that names the extra if a package is missing."""

import importlib.util

_PACKAGES = ("matplotlib", "monai", "nibabel", "scipy", "tensorboard", "tqdm")
_missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
if _missing:
    raise ImportError(
        f"segmentation needs {', '.join(_missing)}: pip install 'autofocus-kernels[segmentation]'", name=_missing[0]
    )
