"""nnU-Net with autofocus layers: the trainer ``nnUNetTrainerAutofocus``.

nnU-Net (2.8 or newer, ``pip install 'autofocus-kernels[nnunet]'``) looks for trainers in its own package and then in
the folders that the environment variable ``nnUNet_extTrainer`` lists; this package is such a folder::

    export nnUNet_extTrainer="$(python -c 'from autofocus_kernels import nnunet; print(nnunet.FOLDER)')"
    nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerAutofocus

Prediction and continued training look the trainer up again, so the variable must be set there as well. nnU-Net imports
every other module of this folder in that search, under its bare name.
"""

import os

FOLDER = os.path.dirname(os.path.abspath(__file__))
