"From the loss of every training step to progress and FMCS labels; no torch modules, no fastai."
